"""Whether a save fits into the time that is left. Pure; no torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from titans_pretrain.errors import UserError

JOB_END = "TITANS_JOB_END"
PREEMPT_SECONDS = "TITANS_PREEMPT_SECONDS"
FACTOR = 1.5
SPARE_SECONDS = 1.0


def seconds_left(environment: Mapping[str, str], now: float, terminated: float | None) -> float:
    """Seconds until this rank is killed; infinite where nobody told.

    Args:
        environment: TITANS_JOB_END, when the job's time limit kills it (seconds since 1970), and
            TITANS_PREEMPT_SECONDS, how long after SIGTERM a preempted job is killed. Both were told
            at the start; an end that has passed was put off since, as this rank lives.
        now: seconds since 1970.
        terminated: when the first SIGTERM came, in seconds since 1970; None if none did.

    Raises:
        UserError: a variable is no number.
    """
    left = _number(environment, JOB_END) - now
    if left < 0:
        left = math.inf
    if terminated is not None:
        left = min(left, terminated + _number(environment, PREEMPT_SECONDS) - now)
    return left


@dataclass(frozen=True)
class Save:
    """A save in time.

    Attributes:
        step: whose state.
        seconds: it has been under way.
    """

    step: int
    seconds: float


@dataclass(frozen=True)
class Decision:
    """What is done about the state when the run stops.

    Attributes:
        wait: the save under way is waited for.
        save: the state is saved.
        saved: what that makes of it, see ``outcome.Outcome``.
        needed: seconds that were too many, 0 where they fit.
    """

    wait: bool
    save: bool
    saved: Literal["now", "before", "no"]
    needed: float = 0.0


def decide(
    step: int,
    begun: int | None,
    under_way: Save | None,
    save_seconds: float | None,
    left: float,
) -> Decision:
    """Whether to save the state after ``step`` and to wait for a save under way.

    Args:
        step: steps done.
        begun: the step of the last state whose save was begun or that was loaded.
        under_way: the save that is not whole yet.
        save_seconds: what a save takes; None if none was measured: then it is tried.
        left: seconds until the end.
    """
    rest = 0.0
    if under_way is not None and save_seconds is not None:
        rest = max(0.0, save_seconds - under_way.seconds)
    can_wait = under_way is not None and fits(rest, left)
    if begun == step:
        if under_way is None:
            return Decision(False, False, "before")
        return Decision(can_wait, False, "now" if can_wait else "no", 0.0 if can_wait else rest)
    needed = rest + (save_seconds or 0.0)
    if fits(needed if save_seconds is not None else 0.0, left):
        return Decision(can_wait, True, "now")
    return Decision(can_wait, False, "no", needed)


def fits(seconds: float, left: float) -> bool:
    """Whether work of so many seconds, half as much again and one more, ends in time.

    What takes no measured time is always tried.
    """
    return not seconds or seconds * FACTOR + SPARE_SECONDS <= left


def _number(environment: Mapping[str, str], name: str) -> float:
    text = environment.get(name, "inf")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UserError(
            f"{name}={text!r} is no number of seconds",
            where="environment of the rank",
            fix="unset it, or start the run with `titans submit`",
        )
    return number
