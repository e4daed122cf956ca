"""Ranks of this machine that measure something and tell it. No torch here."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import LISTENER
from titans_pretrain.train import launch

POLL_SECONDS = 0.05
TAIL = 12


def run(module: str, options: dict[str, Any], ranks: int) -> list[Any]:
    """Run ``python -m MODULE OPTIONS`` as that many ranks, on gloo with a thread each.

    Args:
        module: whose process writes JSON on the last line of its output.
        options: given as one argument of JSON.
        ranks: how many.

    Returns:
        What they wrote, by rank.

    Raises:
        TitansError: a rank failed; the others are ended, and its last lines told.
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory(prefix="titans-bench-ranks-") as folder,
    ):
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank, file in enumerate(files):
                command = [sys.executable, "-P", "-m", module, json.dumps(options)]
                started.append(_start(command, rank, ranks, listener, file))
            _wait(started, files)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [json.loads(file.read_text().splitlines()[-1]) for file in files]


def _start(
    command: Sequence[str], rank: int, ranks: int, listener: socket.socket, file: Path
) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        launch.LAUNCHER: str(os.getpid()),
    }
    if rank == 0:
        environment[LISTENER] = str(listener.fileno())
    with open(file, "wb") as out, open(file.with_suffix(".err"), "wb") as errors:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=errors,
            pass_fds=[listener.fileno()] if rank == 0 else [],
        )


def _wait(started: Sequence["subprocess.Popen[bytes]"], files: Sequence[Path]) -> None:
    """Until all have ended well.

    Raises:
        TitansError: one has not.
    """
    while True:
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code:
                lines = files[rank].with_suffix(".err").read_text(errors="replace").splitlines()
                told = "\n".join(lines[-TAIL:])
                raise TitansError(f"rank {rank} ended with exit code {code}\n{told}")
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_SECONDS)
