"""Steps that all ranks do together: a failure on one is the same error on all."""

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices

T = TypeVar("T")


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
    try:
        mine: tuple[T | None, str | None] = (action(), None)
    except Exception as error:
        mine = (None, cause(error))
    outcomes = devices.gather_objects(mine)
    failures = {index: error for index, (_, error) in enumerate(outcomes) if error is not None}
    if failures:
        raise _error(doing, failures, fix)
    return [result for result, _ in outcomes]


def on_first(doing: str, action: Callable[[], object], *, fix: str = "") -> None:
    """Run ``action`` on rank 0 while the others wait; its failure is everyone's."""

    def mine() -> None:
        if devices.rank() == 0:
            action()

    on_all(doing, mine, fix=fix)


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


def _error(doing: str, failures: dict[int, str], fix: str) -> TitansError:
    first = min(failures)
    others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    return TitansError(f"{doing} failed: {failures[first]}", where=f"rank {first}{others}", fix=fix)
