"""Steps that all ranks do together: a failure on one is the same error on all."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices

T = TypeVar("T")
R = TypeVar("R")
Outcome = tuple[T | None, str | None]  # the result, or the cause of the failure


def on_all(doing: str, action: Callable[[], T], *, fix: str = "") -> list[T]:
    """Run ``action`` on every rank and exchange the results; collective over the default group.

    Args:
        doing: the action in words, for the error.
        action: what to do; what it returns is sent to the other ranks.
        fix: what the user can do when it fails.

    Returns:
        The results in rank order.

    Raises:
        TitansError: on every rank alike, naming the first rank that failed and the cause.
    """
    outcomes = devices.gather_objects(_attempt(action))
    if failures := _failures(outcomes):
        raise _error(doing, failures, fix)
    return [cast(T, result) for result, _ in outcomes]


def on_first(doing: str, action: Callable[[], object], *, fix: str = "") -> None:
    """Run ``action`` on rank 0 while the others wait; its failure is everyone's."""

    def mine() -> None:
        if devices.rank() == 0:
            action()

    on_all(doing, mine, fix=fix)


def through_first(
    doing: str, action: Callable[[], T], join: Callable[[list[T]], list[R]], *, fix: str = ""
) -> R:
    """Run ``action`` on every rank, join the results on rank 0, and give each rank its part.

    Collective over the default group. Unlike ``on_all`` it sends no rank what is another's.

    Args:
        doing: the action in words, for the error.
        action: what to do; what it returns is sent to rank 0.
        join: from the results in rank order to the parts in rank order; runs on rank 0.
        fix: what the user can do when it fails.

    Raises:
        TitansError: on every rank alike, naming the first rank that failed and the cause.
    """
    outcomes = _gather_on_first(_attempt(action))
    part, failures = _scatter_from_first(_answers(outcomes, join) if outcomes else [])
    if failures:
        raise _error(doing, failures, fix)
    return cast(R, part)


def translate(doing: str, error: CheckpointException, *, fix: str = "") -> TitansError:
    """The error of torch.distributed.checkpoint, known to all ranks, in our words."""
    return _error(
        doing, {index: cause(failure[0]) for index, failure in error.failures.items()}, fix
    )


def cause(error: BaseException) -> str:
    """One line on what went wrong, with the file where there is one."""
    if isinstance(error, TitansError):
        return f"{error.what} ({error.where})" if error.where else error.what
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _attempt(action: Callable[[], T]) -> Outcome[T]:
    try:
        return action(), None
    except Exception as error:
        return None, cause(error)


def _failures(outcomes: list[Outcome[T]]) -> dict[int, str]:
    return {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}


def _answers(
    outcomes: list[Outcome[T]], join: Callable[[list[T]], list[R]]
) -> list[tuple[R | None, dict[int, str]]]:
    """Of every rank: its part, or why there is none."""
    failures = _failures(outcomes)
    if not failures:
        parts, error = _attempt(lambda: join([cast(T, result) for result, _ in outcomes]))
        if parts is not None:
            return [(part, {}) for part in parts]
        failures = {0: str(error)}
    return [(None, failures)] * len(outcomes)


def _gather_on_first(value: T) -> list[T]:
    """The values of all ranks on rank 0, nothing elsewhere."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * devices.ranks() if devices.rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def _scatter_from_first(values: list[T]) -> T:
    """Of rank 0's values the one that is this rank's."""
    if not dist.is_initialized():
        return values[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, values)
    return cast(T, own[0])


def _error(doing: str, failures: dict[int, str], fix: str) -> TitansError:
    first = min(failures)
    others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    return TitansError(f"{doing} failed: {failures[first]}", where=f"rank {first}{others}", fix=fix)
