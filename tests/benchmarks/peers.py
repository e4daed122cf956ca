"""The programs we are compared with: their environment, and what a command costs.

``python tests/benchmarks/peers.py`` makes ``.venv-peers`` in the checkout from ``peers.txt``; it is
made again when that file changes. Linux only: processes are watched through ``/proc``.
"""

import fcntl
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.errors import TitansError

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENT = CHECKOUT / ".venv-peers"
PINS = Path(__file__).with_name("peers.txt")
WATCH_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
# Libraries compute in one thread each: then processes alone decide how many cores are used.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Measured:
    """What a command cost and said.

    Attributes:
        wall: seconds from its start to its end.
        cpu: seconds of processor time of all its processes.
        main_peak: bytes that its first process had resident at most.
        child_peak: bytes that the largest of its other processes had resident at most, 0 if none.
        output: its standard output.
    """

    wall: float
    cpu: float
    main_peak: int
    child_peak: int
    output: str

    def result(self) -> Any:
        """The JSON that is the last line of the output."""
        return json.loads(self.output.splitlines()[-1])


def environment() -> Path:
    """The interpreter of ``.venv-peers``, which is made or brought up to date first.

    Raises:
        TitansError: pip cannot install what ``peers.txt`` pins.
    """
    interpreter = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / ".ready"
    wanted = f"{sys.version}\n{PINS.read_text()}"
    with open(PINS) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            print(f"making {ENVIRONMENT}, minutes", file=sys.stderr, flush=True)
            install = [str(interpreter), "-m", "pip", "install", "--quiet", "-r", str(PINS)]
            for command in ([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], install):
                run(command)
            ready.write_text(wanted)
    return interpreter


def run(command: Sequence[str | Path], *, directory: Path | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        TitansError: it failed; with the last lines that it wrote.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
    _check(words, done.returncode, done.stderr or done.stdout)
    return done.stdout


def measure(
    command: Sequence[str | Path],
    *,
    cores: int | None = None,
    variables: dict[str, str] | None = None,
) -> Measured:
    """Run a command to its end and say what it cost.

    Args:
        command: program and arguments.
        cores: how many of this process's cores it may use; all if None.
        variables: of the environment, beside this process's and those that keep libraries to one
            thread.

    Raises:
        TitansError: it failed; with the last lines that it wrote.
    """
    words = [str(word) for word in command]
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    seen: dict[int, tuple[int, float]] = {}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=errors,
            env={**os.environ, **ONE_THREAD, **(variables or {})},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        ended = os.pidfd_open(process.pid)
        try:
            while not select.select([ended], [], [], WATCH_SECONDS)[0]:
                for pid in _tree(process.pid):
                    if found := _held(pid):
                        seen[pid] = found
            wall = time.perf_counter() - started
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            os.close(ended)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        _check(words, process.returncode, errors.read())
        output.seek(0)
        said = output.read()
    watched = sum(seconds for _, seconds in seen.values())
    return Measured(
        wall=wall,
        # A child that nobody waited for is missing from the kernel's sum.
        cpu=max(usage.ru_utime + usage.ru_stime, watched),
        main_peak=seen.get(process.pid, (0, 0.0))[0],
        child_peak=max((peak for pid, (peak, _) in seen.items() if pid != process.pid), default=0),
        output=said,
    )


def _tree(root: int) -> list[int]:
    """A process and all its descendants."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found.extend(map(int, children.read_text().split()))
            except OSError:
                continue  # the thread has ended
    return found


def _held(pid: int) -> tuple[int, float] | None:
    """Peak resident bytes and processor seconds of a process so far; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    if peak is None:
        return None  # a zombie
    return int(peak.split()[1]) * 1024, (int(fields[11]) + int(fields[12])) / TICKS


def _check(words: list[str], code: int, said: str) -> None:
    if code:
        lines = "\n".join(said.strip().splitlines()[-12:])
        raise TitansError(f"exit code {code}\n{lines}", where=" ".join(words))


if __name__ == "__main__":
    print(environment())
