"""One wish to stop, agreed by all ranks, and what becomes of the state then."""

import os
import time
from dataclasses import dataclass
from typing import Literal

from titans_pretrain.errors import StoppedEarly
from titans_pretrain.parallel import devices
from titans_pretrain.train import deadline
from titans_pretrain.train.deadline import Decision
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.outcome import Outcome
from titans_pretrain.train.saving import Saves
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.triggers import Triggers


@dataclass(frozen=True)
class Wish:
    """What one rank knows when the run is to stop.

    Attributes:
        rank: which.
        signal: that came, or None.
        file: the file ``stop`` is there.
        left: seconds until it is killed; infinite where unknown.
        save_seconds: what a save takes; None where unknown.
    """

    rank: int
    signal: str | None
    file: bool
    left: float
    save_seconds: float | None


@dataclass(frozen=True)
class Stop:
    """An agreed stop, the same on all ranks.

    Attributes:
        reason: what asked for it, in words.
        asked_by: the kind of it.
        left: the least time left over the ranks, in seconds.
        decision: what becomes of the state.
    """

    reason: str
    asked_by: Literal["signal", "file"]
    left: float
    decision: Decision

    def outcome(self, step: int, steps: int, saves: Saves) -> Outcome:
        """What is told about it after ``step`` of ``steps``, once the decision is carried out."""
        reason = f"stopped by {self.reason} {_after(step, steps)}"
        if self.decision.saved == "no":
            reason += f"; {self._loss(step, saves.whole or 0)}"
        return Outcome(
            outcome="stopped",
            reason=reason,
            asked_by=self.asked_by,
            step=step,
            saved_step=saves.whole,
            saved=self.decision.saved,
            seconds=round(saves.last_seconds, 3) if self.decision.saved == "now" else 0.0,
        )

    def _loss(self, step: int, kept: int) -> str:
        if step == kept:
            return "there is nothing to save"
        steps = f"step {step}" if kept + 1 == step else f"steps {kept + 1} to {step}"
        return (
            f"not saved, as that takes {self.decision.needed:.1f} s and {max(self.left, 0):.1f} s "
            f"are left: {steps} will be repeated"
        )


class Stopping:
    """This rank's part in the agreement.

    Args:
        request: whether a signal came.
        directory: the run's; rank 0 looks for the files in it.
    """

    def __init__(self, request: StopRequest, directory: RunDirectory) -> None:
        self._request = request
        self.triggers = Triggers(directory)

    @property
    def flags(self) -> tuple[float, float]:
        """Whether this rank asks for a stop, and for a save: 0 or 1, to be added over all."""
        if devices.rank() == 0:
            self.triggers.look()
        stop = self._request.name is not None or self.triggers.stop
        return float(stop), float(self.triggers.save)

    def agree(self, step: int, saves: Saves) -> Stop:
        """Exchange why, and how much time is left; collective.

        Raises:
            UserError: on all ranks alike, a variable that tells the time is no number.
        """
        wishes = devices.gather_objects(devices.together(lambda: self._wish(saves)))
        left = min(wish.left for wish in wishes)
        known = [wish.save_seconds for wish in wishes if wish.save_seconds is not None]
        under_way = devices.gather_objects(saves.under_way)[0]
        decision = (
            deadline.decide(step, saves.begun, under_way, max(known, default=None), left)
            if step or saves.begun is not None
            else Decision(False, False, "no")  # the initial weights come from the seed again
        )
        file = ["the file `stop`"] if any(wish.file for wish in wishes) else []
        signals = [f"{wish.signal} on rank {wish.rank}" for wish in wishes if wish.signal]
        reason = " and ".join([*file, *signals[:1]])  # the user's wish outlasts that of SLURM
        return Stop(reason, "file" if file else "signal", left, decision)

    def consume(self, told: Outcome) -> None:
        """Forget the files that an end, now written down, answers; rank 0.

        A ``stop`` that nobody saw before the end for another reason is for the next start, and so
        is a ``save`` where the state is not saved.
        """
        if told.saved == "no":
            self.triggers.saved(told.saved_step)
        else:
            self.triggers.consume_save()
        if told.outcome == "done" or told.asked_by == "file":
            self.triggers.consume_stop()

    def _wish(self, saves: Saves) -> Wish:
        request = self._request
        left = deadline.seconds_left(os.environ, time.time(), request.terminated)
        rank = devices.rank()
        return Wish(rank, request.name, self.triggers.stop, left, saves.slowest)


def stopped(outcome: Outcome, directory: RunDirectory) -> StoppedEarly:
    """The error that ends a run which was asked to stop."""
    saved = outcome.saved_step
    place = directory.checkpoints if saved is None else directory.checkpoints / f"step-{saved}"
    return StoppedEarly(outcome.reason, where=str(place), fix="continue with --resume")


def check_environment() -> None:
    """Refuse times that are none before the run begins.

    Raises:
        UserError: a variable that tells the time is no number.
    """
    deadline.seconds_left(os.environ, time.time(), time.time())


def _after(step: int, steps: int) -> str:
    return f"after step {step} of {steps}" if step else "before the first step"
