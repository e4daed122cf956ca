"""Stopping at numbers that are not finite, before a checkpoint holds them."""

import math
from dataclasses import dataclass

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    Attributes:
        step: the optimizer step under way, from 1.
        position: tokens consumed before it.
    """

    step: int
    position: int


FIX = (
    "the checkpoints before this step are good; look at the data at this position, "
    "or resume with a lower train.learning_rate"
)


def check_loss(total: float, own: float, place: Place, what: str = "loss") -> None:
    """Raise on all ranks if any rank's loss is not finite.

    Args:
        total: the loss summed over all ranks.
        own: this rank's share of it.
        place: where the run stands.
        what: the name of the number.

    Raises:
        TitansError: names the step, the ranks and the place in the data.
    """
    if math.isfinite(total):
        return
    shares = devices.gather_objects(own)
    bad = [rank for rank, share in enumerate(shares) if not math.isfinite(share)]
    raise TitansError(
        f"the {what} is {total} at step {place.step}",
        where=f"rank {', '.join(map(str, bad))}; data position {place.position}",
        fix=FIX,
    )


def check_gradient(norm: float, place: Place) -> None:
    """Raise if the global gradient norm, equal on all ranks, is not finite.

    Raises:
        TitansError: names the step and the place in the data; the parameters are unchanged.
    """
    if not math.isfinite(norm):
        raise TitansError(
            f"the gradient norm is not finite at step {place.step}, though the loss is",
            where=f"all ranks; data position {place.position}",
            fix=FIX,
        )
