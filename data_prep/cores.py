"""Independent jobs on all cores."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from titans_pretrain.errors import TitansError

PROGRESS_SECONDS = 10.0

Job = Callable[[], None]


def on_cores(jobs: Sequence[Job], workers: int | None, what: str) -> None:
    """Call every job, each once, in other processes that end with this one.

    Args:
        jobs: can be pickled.
        workers: processes; None: one a core; 0 or 1: none, the jobs are called here.
        what: is done, for the progress line: ``hashing texts``.

    Raises:
        Exception: what a job raised; those that are not yet begun are left out then.
        TitansError: a process was killed.
    """
    cores = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(jobs))
    if cores <= 1:
        _told((job() for job in jobs), len(jobs), what)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, _end_with_parent) as pool:
        futures = [pool.submit(_call, job) for job in jobs]
        try:
            _told((future.result() for future in as_completed(futures)), len(jobs), what)
        except BrokenProcessPool:
            raise TitansError(
                f"a worker process was killed while {what}",
                fix="if memory ran out use fewer --workers; repeat the command: what is finished "
                "is kept",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _call(job: Job) -> None:
    job()


def _end_with_parent() -> None:
    """Exit as soon as the parent is gone, however it went; an interrupt is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _told(results: Iterable[None], count: int, what: str) -> None:
    """Take all results, saying now and then how far it is."""
    start = shown = time.monotonic()
    for done, _ in enumerate(results, start=1):
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            eta = time.strftime("%H:%M:%S", time.gmtime((now - start) / done * (count - done)))
            print(f"{what}: {done}/{count}, ETA {eta}", file=sys.stderr, flush=True)
