"""Judging a step by its loss and gradient norm before the weights take it. Pure; no torch here.

All ranks judge the same two numbers, so all decide alike without asking each other.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from titans_pretrain.config import GuardSection
from titans_pretrain.parallel.mesh import Mesh

Action = Literal["accept", "skip", "rollback", "stop"]
Number = Literal["loss", "gradient norm"]


@dataclass(frozen=True)
class Verdict:
    """What happens to a step.

    Attributes:
        action: what is done.
        number: which number is bad; None where the step is accepted.
        reason: why, empty where it is accepted.
    """

    action: Action
    number: Number | None = None
    reason: str = ""


ACCEPTED = Verdict("accept")
_LOOK = (
    "the checkpoints before this step are good; look at the data at this position, and resume with "
    "a lower train.learning_rate"
)
ADVICE = {
    "stop": f"{_LOOK}, or with guard.policy=skip",
    "skip": f"{_LOOK}, guard.policy=rollback or a higher guard.limit; another policy or limit "
    "begins the row of bad steps anew",
    "rollback": f"{_LOOK}, guard.policy=skip or a higher guard.limit; another policy or limit "
    "begins the row of bad steps anew",
}


class Guard:
    """The bounds a step must keep, from the steps accepted before it.

    Args:
        section: policy, bounds and limit.

    Attributes:
        bad: bad steps in a row; going back over them does not end the row before the run is past
            the furthest of them.
    """

    def __init__(self, section: GuardSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.window)
        self._gradients: deque[float] = deque(maxlen=section.window)
        self.bad = self._furthest = 0

    def judge(self, step: int, loss: float, gradient: float) -> Verdict:
        """The verdict on a step, which is remembered.

        Args:
            step: the optimizer step under way, from 1.
            loss: mean over the global batch.
            gradient: global norm before clipping.
        """
        number, reason = self._problem(loss, gradient)
        if number is None:
            self._losses.append(loss)
            self._gradients.append(gradient)
            if step > self._furthest:
                self.bad = 0
            return ACCEPTED
        self.bad += 1
        self._furthest = max(self._furthest, step)
        policy = self._section.policy
        if policy != "stop" and self.bad >= self._section.limit:
            return Verdict("stop", number, f"{reason}, bad step {self.bad} in a row")
        return Verdict(policy, number, reason)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON returns it unchanged."""
        return {
            "losses": list(self._losses),
            "gradients": list(self._gradients),
            **self.row(),
        }

    def row(self) -> dict[str, Any]:
        """The row of bad steps, and the policy and limit it was counted under."""
        return {
            "bad": self.bad,
            "furthest": self._furthest,
            "policy": self._section.policy,
            "limit": self._section.limit,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; an empty one, of a checkpoint without, begins anew."""
        window = self._section.window
        self._losses = deque(state.get("losses", ()), maxlen=window)
        self._gradients = deque(state.get("gradients", ()), maxlen=window)
        self.keep_row(state)

    def keep_row(self, row: Mapping[str, Any]) -> None:
        """Go on with a row of bad steps, undone ones included; under other rules it begins anew.

        Args:
            row: from ``row``, among other keys or not.
        """
        rules = (self._section.policy, self._section.limit)
        same = (row.get("policy"), row.get("limit")) == rules
        self.bad, self._furthest = (row["bad"], row["furthest"]) if same else (0, 0)

    def _problem(self, loss: float, gradient: float) -> tuple[Number | None, str]:
        if not math.isfinite(loss):
            return "loss", f"the loss is {loss}"
        if not math.isfinite(gradient):
            return "gradient norm", "the gradient norm is not finite"
        section = self._section
        if spike := self._spike(loss, self._losses, section.loss_spike):
            return "loss", f"the loss {spike}"
        if spike := self._spike(gradient, self._gradients, section.gradient_spike):
            return "gradient norm", f"the gradient norm {spike}"
        return None, ""

    def _spike(self, value: float, accepted: Sequence[float], factor: float) -> str:
        """Too few accepted steps are no measure: a quarter of the window is needed."""
        if not factor or len(accepted) < math.ceil(self._section.window / 4):
            return ""
        middle = median(accepted)
        if value <= factor * middle:
            return ""
        return (
            f"{value:.4g} exceeds {factor:g} times {middle:.4g}, the median of the last "
            f"{len(accepted)} accepted steps"
        )


@dataclass(frozen=True)
class Witness:
    """What one rank saw of a bad step.

    Attributes:
        losses: its summed loss of each micro-batch.
        gradient_finite: whether its own gradients were finite before any reduction.
    """

    losses: tuple[float, ...]
    gradient_finite: bool


def blame(number: Number | None, witnesses: Sequence[Witness], mesh: Mesh) -> str:
    """The ranks, and their micro-batches, that a bad number comes from.

    What is not finite goes on with memory states to later sequence ranks, and with the states'
    gradients back to earlier ones: those it reached are told apart.

    Args:
        number: the bad one.
        witnesses: of all ranks, in rank order.
        mesh: the grid of ranks.
    """
    if number == "gradient norm":
        bad = {rank: "" for rank, seen in enumerate(witnesses) if not seen.gradient_finite}
        if bad:
            return _origin(bad, mesh, last=True)
        return "all ranks: each one's own gradient is finite"
    bad = {}
    for rank, seen in enumerate(witnesses):
        places = [str(m) for m, loss in enumerate(seen.losses) if not math.isfinite(loss)]
        if places:
            bad[rank] = f" (micro-batch {', '.join(places)})"
    if bad:
        return _origin(bad, mesh, last=False)
    shares = [
        (loss, rank, place)
        for rank, seen in enumerate(witnesses)
        for place, loss in enumerate(seen.losses)
    ]
    largest, rank, place = max(shares, key=lambda share: share[0])
    return f"rank {rank} (micro-batch {place}) has the largest share, {largest:.4g}"


def _origin(bad: Mapping[int, str], mesh: Mesh, *, last: bool) -> str:
    """The bad ranks with the last (or first) span of their sequences, and those reached from there.

    Args:
        bad: what is told of each bad rank.
        mesh: the grid of ranks.
        last: whether it spread to earlier spans, or to later ones.
    """
    spans: dict[int, int] = {}
    for rank in bad:
        _, data, span = mesh.coordinates(rank)
        choose = max if last else min
        spans[data] = choose(span, spans.get(data, span))
    first = [rank for rank in bad if mesh.coordinates(rank)[2] == spans[mesh.coordinates(rank)[1]]]
    told = "rank " + ", rank ".join(f"{rank}{bad[rank]}" for rank in first)
    reached = [str(rank) for rank in bad if rank not in first]
    return told + (f"; from there it reached rank {', '.join(reached)}" if reached else "")
