"""Starting ranks: by itself on this machine, or as the rank that torchrun or srun made. No torch.

The exit code is that of the rank that failed first; its error is printed last.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel import mesh
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import on_asking

LAUNCHER = "TITANS_LAUNCHER"
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
STOP_GRACE_SECONDS = 10.0
CAUSES: dict[int, str] = {
    signal.SIGBUS: "a file of the data was cut while it was read, or its disk failed: run "
    "`titans data verify` on the prepared directory",
}


def train(config: RunConfig, *, ranks: int | None, resume: bool, arguments: Sequence[str]) -> int:
    """Train with the ranks that are there, or start them; the exit code.

    Args:
        config: the run.
        ranks: local ranks to start; None takes one a GPU, or one.
        resume: continue the run in its directory.
        arguments: of ``titans``, for the ranks that are started.

    Raises:
        UserError: ranks and configuration do not fit, or the run may not start.
    """
    given = given_ranks(os.environ)
    if given:
        if ranks is not None and ranks != int(given["WORLD_SIZE"]):
            raise UserError(
                f"--ranks {ranks} given, but torchrun or srun started {given['WORLD_SIZE']}",
                where="command line",
                fix="leave --ranks out",
            )
        os.environ.update(given)
        end_with_launcher()
        from titans_pretrain.train.worker import work

        return work(config, resume=resume)
    count = ranks if ranks is not None else default_ranks()
    mesh.plan(count, config.mesh, config.train)
    RunDirectory(Path(config.run.directory)).check(config, resume=resume)
    return start(arguments, count)


def given_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and so on, as torchrun set them or as srun implies; empty if neither did.

    A step of one task counts as none: ranks are started in it.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {"RANK": environment["RANK"], "WORLD_SIZE": environment["WORLD_SIZE"]}
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks == "1":
        return {}
    node = int(environment["SLURM_NODEID"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(10000 + (job * 16 + step) % 20000),
    }


def tasks_per_node(text: str) -> list[int]:
    """SLURM's ``2(x3),1`` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as ``gpu[003-006,9],login1``."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],  # noqa: S607 - SLURM's, wherever it lies
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        match = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
        if match is None:
            raise TitansError(
                f"no host in SLURM_STEP_NODELIST {nodes!r}",
                where="environment of the rank",
                fix="set MASTER_ADDR to the host of rank 0",
            ) from None
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def default_ranks() -> int:
    """One rank a GPU; one on a machine without."""
    import torch

    return max(1, torch.cuda.device_count())


def end_with_launcher() -> None:
    """Have the kernel kill this rank if the launcher dies, so that no rank trains on unseen."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(errors.FAILED)


def start(arguments: Sequence[str], ranks: int) -> int:
    """Run ``titans ARGUMENTS`` as that many ranks of this machine; the exit code."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    local = []
    for rank in range(ranks):
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",  # where MASTER_ADDR is, whatever the host's name means
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            LAUNCHER: str(os.getpid()),
        }
        complaints = _complaints()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "titans_pretrain.cli", *arguments],
            env=environment,
            stdout=None if rank == 0 else complaints,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C reaches the ranks through the launcher only
        )
        local.append(LocalRank(rank, process, complaints))
    return _Watch(local).wait()


def _complaints() -> IO[str]:
    """A file for what a rank writes to stderr, which may be any bytes."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class LocalRank:
    """A rank this process started.

    Attributes:
        number: the rank.
        process: its process.
        complaints: what it wrote to stderr before its log opened, and its error.
    """

    number: int
    process: "subprocess.Popen[bytes]"
    complaints: IO[str]

    def told(self) -> str:
        """The text of ``complaints``."""
        self.complaints.seek(0)
        return self.complaints.read().strip()


def told_error(texts: Sequence[str]) -> str:
    """The first error among what ranks told, without the noise before it; else the first text."""
    for text in texts:
        if error := re.search(r"^error: ", text, re.MULTILINE):
            return text[error.start() :]
    return next((text for text in texts if text), "a rank failed")


class _Watch:
    """Waits for ranks, passes signals on, ends all when one fails."""

    def __init__(self, local: Sequence[LocalRank]) -> None:
        self._local = local
        self._asked = self._interrupts = 0
        on_asking(self._pass_on)

    def wait(self) -> int:
        """The exit code of the first rank that failed, or 0."""
        first: LocalRank | None = None
        deadline = float("inf")
        while running := [rank for rank in self._local if rank.process.poll() is None]:
            if first is None and (first := self._first_failed()):
                stopped = first.process.returncode == errors.STOPPED
                deadline = time.monotonic() + (STOP_GRACE_SECONDS if stopped else GRACE_SECONDS)
            if time.monotonic() > deadline:
                for rank in running:
                    rank.process.kill()
            time.sleep(POLL_SECONDS)
        first = first or self._first_failed()
        if first is None:
            return errors.DONE
        sentence, code = self._outcome(first)
        with contextlib.suppress(OSError):  # the terminal may be closed; the code still tells
            print(sentence, file=sys.stderr, flush=True)
        return code

    def _first_failed(self) -> LocalRank | None:
        """Of ranks that failed since the last look, one that was killed before one that noticed."""
        failed = [rank for rank in self._local if rank.process.poll()]
        return min(failed, key=lambda rank: rank.process.returncode >= 0, default=None)

    def _outcome(self, first: LocalRank) -> tuple[str, int]:
        """The error of the first rank that failed, or of one that failed with it; the exit code."""
        code = first.process.returncode
        if code == -signal.SIGTERM and self._asked:
            stopped = StoppedEarly("stopped by a signal before the first step", fix="use --resume")
            return str(stopped), errors.STOPPED
        if code == -signal.SIGKILL and self._interrupts > 1:
            ended = TitansError(
                "ended at once by a second Ctrl-C; steps after the last checkpoint are lost",
                fix="continue with --resume",
            )
            return str(ended), errors.FAILED
        if code < 0:
            cause = CAUSES.get(-code, "see whether the machine ran out of memory")
            killed = TitansError(
                f"rank {first.number} was killed by {signal.Signals(-code).name}",
                where=f"process {first.process.pid}; logs/rank-{first.number}.log",
                fix=f"{cause}; continue with --resume",
            )
            return str(killed), errors.FAILED
        failed = (first, *(rank for rank in self._local if rank.process.returncode))
        known = code in (errors.USER_ERROR, errors.STOPPED)
        return told_error([rank.told() for rank in failed]), code if known else errors.FAILED

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop after their step; the second Ctrl-C ends them at once."""
        self._asked += 1
        self._interrupts += number == signal.SIGINT
        for rank in self._local:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL if self._interrupts > 1 else signal.SIGTERM)
