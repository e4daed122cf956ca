"""Run a function on several forked gloo ranks."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist


class RankDiedError(Exception):
    """A rank ended without a result."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank; their results in rank order.

    What a rank raises is returned as its result; RankDiedError if one dies.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as store:
        queue = context.Queue()
        processes = [
            context.Process(
                target=_rank, args=(rank, world, f"{store}/store", queue, function, arguments)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        while len(results) < world:
            try:
                results.update([queue.get(timeout=0.5)])
            except Empty:
                if any(process.exitcode for process in processes):
                    break
        for process in processes:
            process.join(timeout=30)
            process.kill()
    if len(results) < world:
        raise RankDiedError(f"only ranks {sorted(results)} ended well")
    return [results[rank] for rank in range(world)]


def _rank(
    rank: int, world: int, store: str, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    try:
        result = function(rank, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    queue.put((rank, result))
    dist.destroy_process_group()
