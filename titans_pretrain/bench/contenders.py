"""The processes that contenders are measured in, and whose turn it is. No torch here."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import TitansError

WORKER = Path(__file__).with_name("worker.py")
LEAST_SECONDS = 0.2
TAIL = 12


class ContenderFailed(TitansError):
    """A contender could not be built or ended; ``kind`` is the exception's name, or a signal's."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", kind: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_failed, (self.what, self.where, self.fix, self.kind))


def _failed(what: str, where: str, fix: str, kind: str) -> ContenderFailed:
    return ContenderFailed(what, where=where, fix=fix, kind=kind)


@dataclass(frozen=True)
class Contender:
    """Who is measured, and where.

    Attributes:
        name: in tables.
        file: holds the function that builds it.
        function: see ``worker.py``.
        options: for the function, beside those of a run.
        python: the interpreter that has what it needs.
        required: whether the run fails if it does; others are left out.
        variables: of its environment, beside this process's.
    """

    name: str
    file: Path
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    required: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What contenders may use: ``cpu`` or ``cuda``, threads of a library, cores (0: all)."""

    device: str
    threads: int
    cores: int = 0


class Worker:
    """A contender's process; ends with the ``with`` block.

    Args:
        contender: who.
        machine: what it may use.
    """

    def __init__(self, contender: Contender, machine: Machine) -> None:
        self.contender = contender
        self._stderr: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115 - closed by __exit__
            "w+", encoding="utf-8", errors="replace"
        )
        threads = str(machine.threads)
        keys = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        command = [str(contender.python), str(WORKER), machine.device, str(machine.cores)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, **dict.fromkeys(keys, threads), **contender.variables},
            )
        except OSError as error:
            self._stderr.close()
            raise ContenderFailed(
                f"cannot be started: {error.strerror}",
                where=f"{contender.name}: {contender.python}",
                fix="give an interpreter that runs",
                kind=type(error).__name__,
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:
            pass  # closes the pipes, with what nobody read, and waits
        self._stderr.close()

    def build(self, **options: Any) -> dict[str, Any]:
        """Build the contender anew; returns its facts."""
        contender = self.contender
        return self._ask(
            "build",
            file=str(contender.file),
            function=contender.function,
            options={**contender.options, **options},
        )

    def drop(self) -> None:
        """Have it forget what was built."""
        self._ask("drop")

    def time(self, name: str, least_seconds: float = LEAST_SECONDS) -> dict[str, float]:
        """``seconds`` by the clock and ``processor`` seconds of a call of a pass."""
        return self._ask("time", name=name, least_seconds=least_seconds)

    def peak(self, name: str) -> int:
        """Bytes that a pass needs at most, beyond what was held before."""
        return int(self._ask("peak", name=name)["bytes"])

    def _ask(self, verb: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": verb, **request}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            what = f"{answer['error']}: {answer['told']}"
            raise ContenderFailed(what, where=self.contender.name, kind=answer["error"])
        return answer

    def _ended(self) -> ContenderFailed:
        code = self._process.wait()
        self._stderr.seek(0)
        told = "\n".join(self._stderr.read().strip().splitlines()[-TAIL:])
        if code >= 0:
            what, kind = f"ended with exit code {code}\n{told}", "exit"
        else:
            what, kind = f"was killed by signal {-code}", "signal"
        return ContenderFailed(
            what, where=self.contender.name, fix="see whether memory ran out", kind=kind
        )


class Field:
    """Contenders that take turns; one that fails and is not required is left out from then on.

    Args:
        workers: their processes.
        tell: takes notices and progress.
    """

    def __init__(self, workers: Sequence[Worker], tell: Tell) -> None:
        self._workers, self._tell = list(workers), tell
        self._out: set[str] = set()

    @classmethod
    @contextlib.contextmanager
    def of(cls, contenders: Sequence[Contender], machine: Machine, tell: Tell) -> Iterator["Field"]:
        """Start every contender's process; they end with the block."""
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(one, machine)) for one in contenders]
            yield cls(workers, tell)

    def build(
        self, names: Sequence[str] | None = None, **options: Any
    ) -> dict[str, dict[str, Any]]:
        """Build those named, all if None; facts by name of those that are there."""
        found = {}
        for worker in self._chosen(names):
            with self._left_out(worker):
                found[worker.contender.name] = worker.build(**options)
        return found

    def drop(self) -> None:
        """Have all forget what was built."""
        for worker in self._chosen(None):
            with self._left_out(worker):
                worker.drop()

    def times(
        self, passes: Sequence[tuple[str, str]], rounds: int, what: str = ""
    ) -> dict[tuple[str, str], list[dict[str, float]]]:
        """Times of ``(contender, pass)`` in every round, each in its turn; a first is not counted.

        Args:
            passes: in the order of a round.
            rounds: that count.
            what: is measured, for the progress line.
        """
        taken: dict[tuple[str, str], list[dict[str, float]]] = {job: [] for job in passes}
        for number in range(rounds + 1):
            for job in passes:
                for worker in self._chosen([job[0]]):
                    told = f"round {number} of {rounds}" if number else "first pass, not counted"
                    self._tell.progress(f"{what}{told}: {job[0]}, {job[1]}")
                    with self._left_out(worker):
                        found = worker.time(job[1], LEAST_SECONDS if number else 0.0)
                        if number:
                            taken[job].append(found)
        return {job: found for job, found in taken.items() if len(found) == rounds}

    def _chosen(self, names: Sequence[str] | None) -> list[Worker]:
        return [
            worker
            for worker in self._workers
            if (names is None or worker.contender.name in names)
            and worker.contender.name not in self._out
        ]

    @contextlib.contextmanager
    def _left_out(self, worker: Worker) -> Iterator[None]:
        try:
            yield
        except ContenderFailed as error:
            if worker.contender.required:
                raise
            self._out.add(worker.contender.name)
            self._tell.notice(f"{worker.contender.name} is left out: {error.what}")


def peak(contender: Contender, machine: Machine, name: str, **options: Any) -> int:
    """Bytes that one pass needs beyond what is held before it, in a fresh process.

    Args:
        contender: who.
        machine: what it may use.
        name: the pass.
        options: of the build.
    """
    with Worker(contender, machine) as worker:
        worker.build(**options)
        return worker.peak(name)
