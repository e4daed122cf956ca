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

from launchers import slurm_utils
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel import LISTENER, mesh
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import ASKING, StopRequest, on_asking

LAUNCHER = "TITANS_LAUNCHER"
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
STOP_GRACE_SECONDS = 10.0
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # the batch script's and the interactive one's are above
CAUSES: dict[int, str] = {
    signal.SIGBUS: "a file of the data was cut while it was read, or its disk failed: run "
    "`titans data verify` on the prepared directory",
}


def train(
    config: RunConfig,
    *,
    ranks: int | None,
    resume: bool,
    arguments: Sequence[str],
    stop: StopRequest,
) -> int:
    """Train with the ranks that are there, or start them; the exit code.

    Args:
        config: the run.
        ranks: local ranks to start; None takes one a GPU, or one.
        resume: continue the run in its directory.
        arguments: of ``titans``, for the ranks that are started.
        stop: whether this process was asked to stop.

    Raises:
        UserError: ranks and configuration do not fit, or the run may not start.
        StoppedEarly: a signal came before the ranks were started.
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

        return work(config, resume=resume, stop=stop)
    refuse_several_nodes(os.environ)
    count = ranks if ranks is not None else default_ranks()
    mesh.plan(count, config.mesh, config.train)
    RunDirectory(Path(config.run.directory)).check(config, resume=resume)
    if stop.name:
        raise _unstarted(stop.name)
    return start(arguments, count, stop)


def refuse_several_nodes(environment: Mapping[str, str]) -> None:
    """Start local ranks only where no other node of a SLURM allocation would stand idle.

    Raises:
        UserError: the allocation, or the step of one task, has several nodes.
    """
    in_step = (
        "SLURM_PROCID" in environment
        and int(environment.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) < FIRST_SPECIAL_STEP
    )
    name = "SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES"
    nodes = environment.get(name, environment.get("SLURM_NNODES", "1"))
    if "SLURM_JOB_ID" in environment and nodes != "1":
        raise UserError(
            f"the SLURM allocation has {nodes} nodes, but without srun only this one would train",
            where=f"job {environment['SLURM_JOB_ID']}, {name}",
            fix="submit the run with `titans submit`, or start one task a rank: "
            "srun --kill-on-bad-exit=1 --ntasks-per-node=RANKS titans train CONFIG",
        )


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
    counts = slurm_utils.tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = int(environment["SLURM_NODEID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or slurm_utils.hostnames(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(slurm_utils.master_port(environment)),
    }


def hosts_of_ranks(environment: Mapping[str, str]) -> list[str]:
    """The host of each rank of a SLURM step, in their order; empty outside of one."""
    nodes, tasks = (
        environment.get(name) for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    )
    if not nodes or not tasks or environment.get("SLURM_PROCID") != environment.get("RANK"):
        return []
    counts = zip(slurm_utils.hostnames(nodes), slurm_utils.tasks_per_node(tasks), strict=False)
    return [host for host, count in counts for _ in range(count)]


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


def start(arguments: Sequence[str], ranks: int, stop: StopRequest) -> int:
    """Run ``titans ARGUMENTS`` as that many ranks of this machine; the exit code.

    A signal that came meanwhile is passed on to them.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    local = []
    # rank 0 inherits the socket: a port that is let go for a moment may be another's
    with socket.create_server(("127.0.0.1", 0), backlog=max(ranks, 128)) as listener:
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
                "MASTER_PORT": str(listener.getsockname()[1]),
                LAUNCHER: str(os.getpid()),
            }
            if rank == 0:
                environment[LISTENER] = str(listener.fileno())
            complaints = _complaints()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "titans_pretrain.cli", *arguments],
                env=environment,
                stdout=None if rank == 0 else complaints,
                stderr=complaints,
                start_new_session=True,  # Ctrl-C reaches the ranks through the launcher only
                pass_fds=[listener.fileno()] if rank == 0 else [],
            )
            local.append(LocalRank(rank, process, complaints))
    watch = _Watch(local)
    if stop.name:
        watch.pass_on(signal.Signals[stop.name], None)
    return watch.wait()


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
        on_asking(self.pass_on)

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
        if -code in ASKING and self._asked:
            return str(_unstarted(signal.Signals(-code).name)), errors.STOPPED
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

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop after their step; the second Ctrl-C ends them at once."""
        self._asked += 1
        self._interrupts += number == signal.SIGINT
        passed = signal.SIGTERM if number == signal.SIGINT else number  # Python's own is louder
        if self._interrupts > 1:
            passed = signal.SIGKILL
        for rank in self._local:
            if rank.process.poll() is None:
                rank.process.send_signal(passed)


def _unstarted(name: str) -> StoppedEarly:
    return StoppedEarly(f"stopped by {name} before the first step", fix="continue with --resume")
