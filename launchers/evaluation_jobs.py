"""The jobs that evaluate a run's checkpoints while it trains, submitted by its attempt. No torch.

They never disturb the training: a thread of the attempt looks for new checkpoints, and whatever
goes wrong there is told and no more.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launchers import job as jobs
from launchers import slurm_utils, submitted
from launchers.job_log import say
from launchers.slurm_command import SlurmUnanswered
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError
from titans_pretrain.files import atomic_file

LOOK_SECONDS = 10.0
ASK_SECONDS = 60.0  # between two questions to SLURM
LAST_SECONDS = 10.0  # for the checkpoint that the attempt ends with
TRIES = 3  # in a row that finish nothing new
AGAIN_SECONDS = 300.0  # before a job is repeated; twice that after each that finished nothing new
REFUSALS = 5


@dataclass
class Refusal:
    """A job that SLURM did not take.

    Attributes:
        count: how often.
        again: monotonic time of the next try.
    """

    count: int = 0
    again: float = 0.0


class EvaluationJobs:
    """Submits an evaluation of each checkpoint that awaits one, while the block runs.

    Args:
        config: the run.
        config_path: its file, as the nodes see it.
        run: its directory.
        is_ours: whether this attempt is the run's still.
    """

    def __init__(
        self, config: RunConfig, config_path: Path, run: Path, is_ours: Callable[[], bool]
    ) -> None:
        self._config, self._config_path, self._run = config, config_path, run
        self._is_ours = is_ours
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="evaluations", daemon=True)
        self._refused: dict[int, Refusal] = {}
        self._ended: dict[str, float] = {}  # monotonic time at which a job was first seen to be
        self._under_way: set[int] = set()
        self._failures: set[str] = set()
        self._asked = float("-inf")
        self._told = ""

    def __enter__(self) -> "EvaluationJobs":
        if self._config.pipeline.eval.every:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(LAST_SECONDS)

    def look(self) -> None:
        """Submit what is due, once; see after what was submitted.

        Raises:
            TitansError: SLURM does not answer.
            OSError: the run's directory cannot be read or written.
        """
        chosen = self._config.pipeline.eval
        steps = layout.steps(self._run / "checkpoints")
        # after the last save none gives way any more: all that are there get their jobs
        over = bool(steps) and steps[-1] >= self._config.train.steps
        at_most = None if over else chosen.at_once
        waiting = evaluations.awaited(self._run, chosen.every, at_most, steps)
        for step in sorted(self._under_way.difference(waiting)):
            self._under_way.discard(step)
            self._tell_failure(step)
        under_way = {step: evaluations.jobs(self._run, step) for step in waiting}
        for step, ids in under_way.items():
            if not ids:
                self._submit(step)
        under_way = {step: ids for step, ids in under_way.items() if ids}
        self._under_way.update(under_way)
        if under_way and time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            self._follow(under_way)

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            evaluations.tidy(self._run)
        while not self._over.wait(LOOK_SECONDS):
            self._try()
        self._try()

    def _try(self) -> None:
        try:
            self.look()
            self._told = ""
        except Exception as error:
            told = error.what if isinstance(error, TitansError) else str(error)
            if told != self._told:  # once, however long it lasts
                say(f"evaluations: {told}; the training goes on, and they are tried again")
            self._told = told

    def _follow(self, under_way: dict[int, list[str]]) -> None:
        """Submit again what ended without a result, or give it up."""
        known = {job.id: job for job in slurm_utils.jobs([ids[-1] for ids in under_way.values()])}
        for step, ids in under_way.items():
            job = known.get(ids[-1])
            if job is not None and self._is_of(step, job) and not job.finished:
                continue
            if ids[-1] not in self._ended:  # its file may come late over the network
                self._ended[ids[-1]] = time.monotonic()
            elif not evaluations.is_settled(self._run, step):
                self._repeat(step, ids, job.state if job is not None else "unknown to SLURM")

    def _repeat(self, step: int, ids: list[str], state: str) -> None:
        """Submit the evaluation of a step again when it is time, or give it up.

        Not while another process evaluates it, by hand for instance: the job gave way to that.
        """
        if evaluations.is_under_way(self._run, step):
            return
        fruitless = evaluations.fruitless(self._run, step)
        if fruitless >= TRIES:
            self._give_up(step, f"{len(ids)} jobs ended without a result, the last: {state}")
        elif time.monotonic() - self._ended[ids[-1]] >= AGAIN_SECONDS * 2**fruitless:
            if step not in self._refused:
                say(f"evaluations: job {ids[-1]} of step {step} ended without a result: {state}")
            self._submit(step, fruitless)

    def _tell_failure(self, step: int) -> None:
        """Say why a job found that a step cannot be evaluated; of several the same, once."""
        found = evaluations.of_step(self._run, step)
        if found is not None and found.failure and found.failure not in self._failures:
            self._failures.add(found.failure)
            say(f"evaluations: step {step} cannot be evaluated: {found.failure}")

    def _submit(self, step: int, fruitless: int = 0) -> None:
        """Submit the evaluation of a step, unless its job is queued or SLURM refused it just now.

        Args:
            step: of the checkpoint.
            fruitless: jobs before this one that ended with nothing new finished.

        Raises:
            SlurmUnanswered: SLURM does not answer.
        """
        refusal = self._refused.setdefault(step, Refusal())
        if time.monotonic() < refusal.again or not self._is_ours():
            return
        try:
            script = self._written(step)
            ids = self._queued(step)  # by a start that was killed before it put that down
            job = ids[-1] if ids else slurm_utils.submit(script)
        except SlurmUnanswered:
            raise
        except TitansError as error:
            refusal.count += 1
            refusal.again = time.monotonic() + ASK_SECONDS * 2**refusal.count
            if refusal.count < REFUSALS:
                say(f"evaluations: step {step} is not submitted yet: {error.what}")
            else:
                self._give_up(step, f"SLURM refused its job {refusal.count} times: {error.what}")
            return
        del self._refused[step]
        submitted.record(self._run, jobs.evaluation(step), job, [], script)
        evaluations.add_job(self._run, step, job, fruitless)
        self._under_way.add(step)
        say(f"evaluations: job {job} evaluates step {step}")

    def _queued(self, step: int) -> list[str]:
        mine = slurm_utils.jobs()
        return [job.id for job in mine if self._is_of(step, job) and not job.finished]

    def _written(self, step: int) -> Path:
        """The job file of a step."""
        path = submitted.script_of(self._run, jobs.evaluation(step))
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path, "w") as handle:
            handle.write(jobs.text(self._spec(step)))
        return path

    def _spec(self, step: int) -> jobs.JobSpec:
        return jobs.evaluation_spec(
            self._config, directory=self._run, config_path=self._config_path, step=step
        )

    def _is_of(self, step: int, job: slurm_utils.Job) -> bool:
        """Whether a job evaluates the step, whatever the run was called when it was submitted."""
        ours = jobs.is_name_of(job.name, self._run)
        return ours and job.name.endswith(f"-{jobs.evaluation(step)}")

    def _give_up(self, step: int, why: str) -> None:
        checkpoint = self._run / "checkpoints" / layout.step_name(step)
        identity = evaluations.identity(checkpoint)
        evaluations.fail(self._run, step, identity, why)
        self._under_way.discard(step)
        say(f"evaluations: step {step} is given up: {why}; titans eval-checkpoint {checkpoint}")
