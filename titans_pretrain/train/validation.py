"""The loss of held-out data, at the state that a run is in."""

import math
from collections.abc import Callable

import torch

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train.build import Data
from titans_pretrain.train.passes import Passes


@torch.no_grad()
def total_loss(
    train: TrainSection,
    data: Data,
    passes: Passes,
    parallel: Parallel,
    *,
    enter: Callable[[], None],
    stop_agreed: Callable[[], bool] | None,
) -> tuple[float, int] | None:
    """This rank's summed validation loss and its targets; None where it gave up for a stop.

    Args:
        train: sizes of a validation.
        data: of the run.
        passes: of the model, in evaluation mode.
        parallel: this rank's part in the mesh.
        enter: told that a batch begins.
        stop_agreed: whether any rank was asked to stop, asked between batches: the time that is
            left is for the checkpoint; None does not ask.
    """
    mesh = parallel.mesh
    batches = data.loader.validation_batches(
        sequences=train.micro_batch_size * mesh.data,
        limit=train.validation_sequences,
        rank=parallel.groups.data_rank,
        ranks=mesh.data,
    )
    total, valid, stop = 0.0, 0, False
    for number, batch in enumerate(batches):
        # Asking brings the sequence ranks in step: not more often than there are such.
        if stop_agreed is not None and number % mesh.sequence == 0 and stop_agreed():
            stop = True
            break
        enter()
        loss, count = passes.evaluate(batch)
        total, valid = total + loss.item(), valid + count
    parallel.links.drain()
    return None if stop else (total, valid)


def mean(total: float, valid: int, *, counts: bool, step: int, position: int) -> float | None:
    """The mean of all ranks' summed validation losses; None without a target.

    Args:
        total: of this rank.
        valid: targets of this rank.
        counts: whether they are added up; ranks that share a tensor have the same ones.
        step: steps done.
        position: tokens consumed.

    Raises:
        TitansError: it is not finite.
    """
    own = torch.tensor([total, valid], dtype=torch.float64)
    whole, targets = devices.all_sum(own if counts else own.zero_()).tolist()
    if not math.isfinite(whole):
        shares = devices.gather_objects(total)
        bad = [str(rank) for rank, share in enumerate(shares) if not math.isfinite(share)]
        raise TitansError(
            f"the validation loss is {whole} at step {step}",
            where=f"rank {', '.join(bad)}; data position {position}",
            fix="resume from a checkpoint before this step with a lower train.learning_rate",
        )
    return whole / targets if targets else None
