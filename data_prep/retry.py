"""Trying again what a network may have cut: remote files and the Hugging Face hub."""

import errno
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Answer = TypeVar("Answer")

TRIES = 5
FIRST_WAIT = 1.0  # seconds; doubled after every try

PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
PASSING_KINDS = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseStreamingError",
    "google.TransportError",
    "http.IncompleteRead",
    "httpcore.NetworkError",
    "httpcore.ProtocolError",
    "httpcore.TimeoutException",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.ChunkedEncodingError",
    "requests.ConnectionError",
    "requests.Timeout",
    "urllib.URLError",
    "urllib3.HTTPError",
}
PASSING_ERRORS = (ConnectionError, EOFError, TimeoutError)
LASTING_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
LASTING_KINDS = {"huggingface_hub.OfflineModeIsEnabled", "aiohttp.InvalidURL"}
LASTING_NUMBERS = {
    errno.EBADF,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EROFS,
}


def retry(
    do: Callable[[], Answer], what: str, *, again: Callable[[], object] = lambda: None
) -> Answer:
    """Call ``do``, up to five times as long as its failure is one that can pass.

    Args:
        do: the call; it must be safe to repeat.
        what: is tried, for the line on stderr: ``reading s3://bucket/a.parquet``.
        again: run before each further try, e.g. to drop a broken connection.

    Raises:
        Exception: the failure of the last try, or the first that cannot pass.
    """
    wait = FIRST_WAIT
    for left in reversed(range(TRIES)):
        try:
            return do()
        except Exception as error:
            if not left or not can_pass(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{what}: {reason}; again in {wait:g} s", file=sys.stderr, flush=True)
        time.sleep(wait)
        wait *= 2
        again()
    raise AssertionError("the last try returns or raises")


def can_pass(error: BaseException) -> bool:
    """Whether a later try may do better: no answer, a cut answer, or a server that is busy."""
    for cause in _causes(error):
        status = _status(cause)
        if status is not None:
            return status in PASSING_STATUS
        if isinstance(cause, LASTING_ERRORS) or not LASTING_KINDS.isdisjoint(_kinds(cause)):
            return False
        if isinstance(cause, PASSING_ERRORS) or not PASSING_KINDS.isdisjoint(_kinds(cause)):
            return True
        if isinstance(cause, OSError):
            return cause.errno is not None and cause.errno not in LASTING_NUMBERS
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that a client library's error carries."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for value in (
        getattr(error, "status", None),
        getattr(error, "status_code", None),
        getattr(error, "code", None),
        getattr(response, "status_code", response),
    ):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def _kinds(error: BaseException) -> set[str]:
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
