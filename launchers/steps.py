"""The step that trains: started with srun, told of signals, watched from outside. No torch here.

The ranks watch themselves; this watch is for what they cannot see: that none of them moves, that
none ever began, or that the step does not end although its ranks have.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from launchers.asked import AskedToStop
from launchers.job_step import inherited
from titans_pretrain.train import heartbeat

POLL_SECONDS = 0.5
LOOK_SECONDS = heartbeat.SECONDS  # between two readings of all ranks' records
SILENT_SECONDS = 120.0
ENDING_SECONDS = 120.0
KILL_SECONDS = 30.0
FROZEN_SECONDS = 5.0  # between two looks: this host stood still meanwhile
SLOWER = 10
_KILLED = re.compile(
    rb"srun: error: (?P<node>[^\s:]+): tasks? [\d,-]+: "
    rb"(?P<how>Killed|Bus error|Segmentation fault|Illegal instruction|Out Of Memory)"
)
_ERROR = b"error: "
_FIRST_END = re.compile(rb"srun: error: [^\s:]+: tasks? [\d,-]+: |Job step aborted|Terminating ")


@dataclass(frozen=True)
class Limits:
    """When a step is ended from outside.

    Attributes:
        start: seconds until the first sign of life.
        is_over: whether it must have ended by itself, as the time limit is near.
        is_due: whether its ranks are to be asked to stop, even if no signal came.
    """

    start: float
    is_over: Callable[[], bool] = lambda: False
    is_due: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class StepEnd:
    """How a step ended.

    Attributes:
        code: srun's exit code.
        why: it was ended from outside, in one sentence; empty if it ended by itself.
        late: it was ended since the time limit was near.
        told: what srun said of the first task that died.
        error: the first error that a rank printed.
        suspects: nodes that may be the cause.
    """

    code: int
    why: str = ""
    late: bool = False
    told: str = ""
    error: str = ""
    suspects: tuple[str, ...] = field(default=())


class Step:
    """One srun.

    Args:
        command: srun with all its arguments.
        environment: of srun, which hands it to the ranks.
        beats: the signs of life of this attempt's ranks, by rank.
        ended: whether the ranks have told how they ended.
        asked: signals that reached this process.
        is_ours: whether the job still makes this attempt; else its step is another start's.
        forward: tells the ranks of a signal by its name.
        limits: when it is ended from outside.
        save_evidence: keeps what tells why, before it is ended from outside.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        beats: Callable[[], Mapping[int, Mapping[str, Any]]],
        ended: Callable[[], bool],
        asked: AskedToStop,
        is_ours: Callable[[], bool],
        forward: Callable[["subprocess.Popen[bytes]", str], None],
        limits: Limits,
        save_evidence: Callable[[str], None],
    ) -> None:
        self._command, self._environment = command, environment
        self._beats, self._ended, self._asked = beats, ended, asked
        self._is_ours, self._late = is_ours, False
        self._forward, self._limits, self._save_evidence = forward, limits, save_evidence
        self._silence = Silence()
        self._ending = 0.0
        self._since_start = 0.0
        self._unread = LOOK_SECONDS

    def run(self) -> StepEnd:
        """Start the ranks and wait for them."""
        process = subprocess.Popen(
            self._command,
            env=dict(self._environment),
            stderr=subprocess.PIPE,
            process_group=0,
        )
        assert process.stderr is not None
        complaints = Complaints(process.stderr)
        why = self._watch(process)
        complaints.join()
        suspects = self._silent_nodes() if why else complaints.nodes  # not by this kill
        return StepEnd(
            process.wait(),
            why,
            self._late,
            complaints.first,
            complaints.error,
            tuple(dict.fromkeys(suspects)),
        )

    def _watch(self, process: "subprocess.Popen[bytes]") -> str:
        """Until the step ends; why it was ended from outside, if it was."""
        told, last = 0, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            waited, last = now - last, now
            if not self._asked and self._limits.is_due():
                self._asked.names.append("no signal yet")
            names = self._asked.names[told:]
            why = self._look(min(waited, 3 * LOOK_SECONDS))  # one that was frozen did not wait
            if (names or why or waited > FROZEN_SECONDS) and not self._keeps(process):
                return "another start of the job has the run"
            for name in names:
                self._forward(process, name)
            told += len(names)
            if why:
                if not self._late:
                    self._save_evidence(why)
                _kill(process)
                return why
            time.sleep(POLL_SECONDS)
        return ""

    def _keeps(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether the step is this attempt's still; if not, srun is gone afterwards.

        A later start's step has the same number, and srun or its helper would end that one for
        its own: both stand still until that is known, and die at once.
        """
        os.killpg(process.pid, signal.SIGSTOP)
        ours = self._is_ours()
        os.killpg(process.pid, signal.SIGCONT if ours else signal.SIGKILL)
        return ours

    def _look(self, elapsed: float) -> str:
        """Why the step must be ended from outside; empty while it need not."""
        self._since_start += elapsed
        self._unread += elapsed
        if self._unread >= LOOK_SECONDS:  # thousands of ranks on a slow file system take long
            self._silence.add(self._beats(), self._unread)
            self._ending = self._ending + self._unread if self._ended() else 0.0
            self._unread = 0.0
        self._late = self._limits.is_over()
        if self._late:
            return "the ranks did not stop before the time limit"
        if self._ending > ENDING_SECONDS:
            return f"the step goes on {self._ending:.0f} s after its ranks told their end"
        if not self._silence.begun:
            if self._since_start > self._limits.start:
                return f"no rank gave a sign of life within {self._limits.start:g} s of the start"
            return ""
        if self._silence.seconds > self._silence.limit:
            return f"no rank gave a sign of life for {self._silence.seconds:.0f} s"
        return ""

    def _silent_nodes(self) -> list[str]:
        """Of a step that was ended: the nodes that fell silent before others did."""
        return [] if self._late else self._silence.nodes()


class Silence:
    """How long no rank has given a sign of life.

    Attributes:
        begun: whether any rank ever did.
        seconds: since the last one.
    """

    def __init__(self) -> None:
        self.begun, self.seconds = False, 0.0
        self._longest = 0.0
        self._seen: dict[int, Any] = {}
        self._heard: dict[str, float] = {}
        self._clock = 0.0

    @property
    def limit(self) -> float:
        """Seconds of silence that are too many: ten times the longest so far, or two minutes."""
        return max(SILENT_SECONDS, SLOWER * self._longest)

    def add(self, beats: Mapping[int, Mapping[str, Any]], elapsed: float) -> None:
        """Take a look's records, and the seconds since the look before."""
        self._clock += elapsed
        self.seconds += elapsed
        for rank, record in beats.items():
            if self._seen.get(rank) != record.get("time"):
                self._seen[rank] = record.get("time")
                self._heard[str(record.get("host"))] = self._clock
                self._longest = max(self._longest, self.seconds if self.begun else 0.0)
                self.begun, self.seconds = True, 0.0

    def nodes(self) -> list[str]:
        """Hosts that fell silent long before the last one did; none if all did together."""
        last = max(self._heard.values(), default=0.0)
        return [host for host, at in self._heard.items() if last - at > SILENT_SECONDS / 2]


class Complaints:
    """Passes on what srun and the ranks write to stderr, and notes the first task that died.

    Attributes:
        first: srun's words.
        error: the first error that a rank printed.
        nodes: where it was killed, if it was.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.first = self.error = ""
        self.nodes: tuple[str, ...] = ()
        self._stream = stream
        self._thread = threading.Thread(target=self._pass_on, name="stderr", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until all is passed on; a rank that outlives srun may hold it open."""
        self._thread.join(KILL_SECONDS)

    def _pass_on(self) -> None:
        for line in self._stream:
            if not self.first and _FIRST_END.search(line):
                self.first = line.decode(errors="replace").strip()
                if match := _KILLED.search(line):
                    self.nodes = (match["node"].decode(),)
            if not self.error and line.startswith(_ERROR):
                self.error = line.removeprefix(_ERROR).decode(errors="replace").strip()
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()


def rank_environment(
    environment: Mapping[str, str],
    extra: Mapping[str, str],
    *,
    attempt: int,
    end: float | None,
    preempt_seconds: float | None,
    cpus_per_rank: int,
) -> dict[str, str]:
    """What the ranks find in their environment.

    Args:
        environment: of the batch process.
        extra: ``job.environment``.
        attempt: its number.
        end: unix time of the time limit; None if there is none.
        preempt_seconds: that a preempted job is left; None where it is unknown.
        cpus_per_rank: threads of a rank, unless OMP_NUM_THREADS is set.
    """
    told = {"TITANS_ATTEMPT": str(attempt), "PYTHONFAULTHANDLER": "1", "SLURM_EXPORT_ENV": "ALL"}
    if end is not None:
        told["TITANS_JOB_END"] = f"{end:.0f}"
    if preempt_seconds is not None:
        told["TITANS_PREEMPT_SECONDS"] = f"{preempt_seconds:g}"
    return {"OMP_NUM_THREADS": str(cpus_per_rank), **inherited(environment), **extra, **told}


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a step: srun kills its ranks at SIGTERM; one that cannot is left behind."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
        return
    process.kill()
