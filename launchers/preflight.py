"""Checks every node of a job and the network between them before training begins. No torch here.

One step of all nodes runs ``launchers.preflight_node``; what each node tells is judged here.
Nothing is read until the step is over: a network file system would keep on saying "no such file"
of a file that was looked for too early.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import checks
from launchers.job_step import inherited, interpreter, step_command
from launchers.preflight_facts import Task
from launchers.preflight_judge import judge
from launchers.preflight_node import MARK, PARTS
from launchers.preflight_peers import speeds
from launchers.preflight_types import Expected, Heard, Problem
from launchers.slurm_utils import Allocation
from titans_pretrain.config import RunConfig
from titans_pretrain.config_job import JobSection
from titans_pretrain.errors import TitansError
from titans_pretrain.files import write_json
from titans_pretrain.train.directory import RunDirectory

__all__ = ["Problem", "Verdict", "check"]

STEP_SHARE = 0.93
END_SECONDS = 2.0
PAUSE_SECONDS = 3.0
AGAIN_SHARE = 0.5
MARGIN = 1.05
WRITE_BYTES, LEAST_WRITE_BYTES = 2**26, 2**20
OWN_WORDS = re.compile(rf"\s*\d+: {MARK} (\S+) (.*)")
TASK_WORDS = re.compile(r"\s*(srun: error: \S+: task )?(\d+): (?!Killed)(\S.*)")
STEP_WORDS = re.compile(r"srun: (?:error|fatal): ((?!\S+: tasks? ).*)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        problems: empty if training may begin.
        write_bytes_per_second: at which all nodes together write to the run's directory; 0 where
            no node could tell.
        seconds: the check took.
    """

    problems: tuple[Problem, ...]
    write_bytes_per_second: float
    seconds: float

    @property
    def suspects(self) -> list[str]:
        """Nodes to leave out of the next try."""
        return sorted({problem.node for problem in self.problems if problem.node})


def check(allocation: Allocation, config: RunConfig, *, config_path: Path) -> Verdict:
    """Check the nodes of a job, in its batch process, within ``job.preflight_seconds``.

    Leaves ``preflight.json`` in the run's directory, and the step's output in its logs.

    Args:
        allocation: the job's nodes.
        config: the run.
        config_path: its file, as the nodes see it.

    Raises:
        TitansError: the run's directory cannot be written here, or there is no srun.
    """
    begun, clock = time.monotonic(), time.time()
    run = RunDirectory(Path(config.run.directory).absolute())
    name = f"{allocation.job}-{allocation.restarts}"
    directory = run.path / "preflight" / name
    log = run.logs / f"preflight-{name}.log"
    nonce = secrets.token_hex(16)
    try:
        _prepare(directory, nonce)
        log.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256(config_path.read_bytes()).hexdigest()
        _step(_command(allocation, config, config_path, directory, clock), log, config.job)
    except OSError as error:
        raise TitansError(
            f"the nodes cannot be checked: {error.strerror or error}",
            where=str(error.filename or directory),
            fix="see that the batch host can write there and has srun",
        ) from None
    expected = Expected(
        nodes=allocation.nodes,
        nonce=nonce,
        config=digest,
        needed_bytes=needed_bytes(config, run),
        gpus=config.job.gpus_per_node,
        memory_bytes=_bytes(config.job.memory_per_node),
        all_memory=asks_all(config.job.memory_per_node),
        slow_factor=config.job.slow_factor,
        seconds=config.job.preflight_seconds,
        begun=clock,
        over=time.time(),
    )
    heard = listen(directory, log, allocation.nodes)
    verdict = Verdict(judge(heard, expected), write_rate(heard), time.monotonic() - begun)
    write_json(run.preflight, _record(allocation, heard, expected, verdict))
    shutil.rmtree(directory, ignore_errors=True)
    return verdict


def _prepare(directory: Path, nonce: str) -> None:
    """An empty directory with the file that nodes must see; those of earlier checks go."""
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "nonce").write_text(nonce, encoding="ascii")


def _command(
    allocation: Allocation, config: RunConfig, config_path: Path, directory: Path, clock: float
) -> list[str]:
    job, nodes = config.job, len(allocation.nodes)
    task = Task(
        directory=str(directory),
        config=str(config_path.absolute()),
        seconds=job.preflight_seconds,
        begun=clock,
        write_bytes=max(WRITE_BYTES // nodes, LEAST_WRITE_BYTES),
        gpus=job.gpus_per_node,
        scratch=job.local_directory if job.stage_data else "",
    )
    program = [interpreter(job, in_step=True), "-P", "-m", "launchers.preflight_node"]
    return step_command(
        job,
        [*program, json.dumps(dataclasses.asdict(task))],
        nodes=nodes,
        tasks_per_node=1,
        options=["--kill-on-bad-exit=0", "--label"],  # one bad node must not silence the others
    )


def _step(command: Sequence[str], log: Path, job: JobSection) -> None:
    """Run the step until it ends or its time has passed; again if SLURM did not start it."""
    begun, seconds = time.monotonic(), job.preflight_seconds
    threads = {"OMP_NUM_THREADS": str(job.cpus_per_rank)}
    environment = threads | inherited(os.environ) | job.environment
    with open(log, "wb") as output:
        while True:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
            _wait(process, seconds * STEP_SHARE - (time.monotonic() - begun))
            late = time.monotonic() - begun + PAUSE_SECONDS > seconds * AGAIN_SHARE
            if process.returncode == 0 or late or MARK.encode() in log.read_bytes():
                return
            time.sleep(PAUSE_SECONDS)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for srun to end, and end it when the time has passed."""
    for limit, number in ((seconds, signal.SIGTERM), (END_SECONDS, signal.SIGKILL)):
        try:
            process.wait(limit)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    process.wait()


def listen(directory: Path, log: Path, nodes: Sequence[str]) -> Heard:
    """What the nodes wrote to their files and, where they could not, to the step's output."""
    answers, words = {}, _words(log.read_text("utf-8", "replace"), nodes)
    for node in nodes:
        try:
            answer = json.loads((directory / f"{node}.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(answer, dict) and answer.keys() >= PARTS:
            answers[node] = answer
        else:
            words[node] = "its answer has another form; it runs other code than the batch host"
    return Heard(answers, words)


def _words(text: str, nodes: Sequence[str]) -> dict[str, str]:
    """The last thing that the step's output says of each node, by who says it.

    Its own words go before what its programs printed, that before how SLURM says they ended, and
    that before what SLURM says of the whole step.
    """
    own: dict[str, str] = {}
    printed: dict[str, str] = {}
    ended: dict[str, str] = {}
    step: dict[str, str] = {}
    for line in text.splitlines():
        if told := OWN_WORDS.match(line):
            own[told[1]] = told[2]
        elif (told := TASK_WORDS.match(line)) and int(told[2]) < len(nodes):
            (ended if told[1] else printed)[nodes[int(told[2])]] = told[3][:300]
        elif told := STEP_WORDS.match(line):
            step = dict.fromkeys(nodes, told[1][:300])
    return step | ended | printed | own


def needed_bytes(config: RunConfig, run: RunDirectory) -> int:
    """Free space that the checkpoints to come need beside those that are there."""
    keep = config.checkpoint.keep
    there = min(keep, sum(1 for _ in run.checkpoints.glob("step-*")))
    return int((keep + 1 - there) * checks.checkpoint_bytes(config) * MARGIN)


def _bytes(memory: str) -> int:
    """SLURM's ``900G`` in bytes; without a unit it counts in MiB; 0 for all or the default."""
    if not memory:
        return 0
    return int(memory.rstrip("KMGT")) * UNITS.get(memory[-1], UNITS["M"])


def asks_all(memory: str) -> bool:
    """Whether SLURM takes a job's memory for all that a node has: it reads 0 so."""
    return memory != "" and _bytes(memory) == 0


def write_rate(heard: Heard) -> float:
    """Bytes a second that all nodes wrote together."""
    return sum(
        answer["values"].get("write_bytes_per_second", 0.0) for answer in heard.answers.values()
    )


def _record(
    allocation: Allocation, heard: Heard, expected: Expected, verdict: Verdict
) -> Mapping[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": allocation.job,
        "restart": allocation.restarts,
        "seconds": round(verdict.seconds, 2),
        "write_bytes_per_second": round(verdict.write_bytes_per_second),
        "needed_bytes": expected.needed_bytes,
        "problems": [dataclasses.asdict(problem) for problem in verdict.problems],
        "nodes": {node: speeds(heard.answers.get(node)) for node in allocation.nodes},
    }
