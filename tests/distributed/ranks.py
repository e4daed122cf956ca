"""Run a function on N gloo ranks of this machine."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from multiprocessing.connection import wait

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "titans_pretrain.model.modeling_titans",
        "titans_pretrain.parallel.tensor_layers",
        "titans_pretrain.train.worker",
        "deepspeed",
    ]
)


def run_ranks(function, count, *arguments, timeout=240):
    """``function(*arguments)`` on every rank, inside a process group; the results in rank order.

    Raises:
        AssertionError: a rank failed or hung; holds the tracebacks of all that failed.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_rank, args=(function, arguments, rank, count, port, theirs), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    outcomes = _collect(pipes, time.monotonic() + timeout)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    failures = [
        f"--- rank {rank}: {outcomes.get(rank, ('', 'hung'))[1]}"
        for rank in range(count)
        if outcomes.get(rank, ("failed",))[0] != "done"
    ]
    assert not failures, "\n".join(failures)
    return [outcomes[rank][1] for rank in range(count)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _collect(pipes, deadline):
    """What each rank sent; after the first failure the others get five seconds more."""
    outcomes, open_pipes = {}, dict(enumerate(pipes))
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes.values()), left):
            rank = next(number for number, other in open_pipes.items() if other is pipe)
            del open_pipes[rank]
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = ("failed", "died without a word")
            if outcomes[rank][0] == "failed":
                deadline = min(deadline, time.monotonic() + 5)
    return outcomes


def _rank(function, arguments, rank, count, port, pipe):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch

    from titans_pretrain.parallel import devices

    torch.set_num_threads(1)
    try:
        with devices.process_group(torch.device("cpu")):
            outcome = ("done", function(*arguments))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))  # whole tensors, not handles that end with this process
    pipe.close()
    os._exit(0)
