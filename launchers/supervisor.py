"""An attempt at work: its nodes are checked, its ranks started and watched, its end acted upon.

No torch here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launchers import (
    checks,
    evidence,
    history,
    judge,
    nodes,
    policy,
    preflight,
    resubmit,
    slurm_utils,
    staging,
    step_number,
)
from launchers import job as jobs
from launchers.asked import AskedToStop
from launchers.evaluation_jobs import EvaluationJobs
from launchers.history import Attempt
from launchers.job_end import JobEnd
from launchers.job_log import say
from launchers.job_step import interpreter
from launchers.policy import Action, Asked, Decision, Outcome
from launchers.slurm_utils import Allocation, SlurmError
from launchers.steps import Limits, Step, StepEnd, rank_environment
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError
from titans_pretrain.train import heartbeat
from titans_pretrain.train import outcome as outcomes
from titans_pretrain.train.directory import RunDirectory

UNANSWERED_SECONDS = 86400.0
RETRY_SECONDS = 10.0
END_MARGIN_SECONDS = 15.0  # SLURM kills at the time limit or up to half a minute later


@dataclass(frozen=True)
class Supervisor:
    """What one attempt needs to know.

    Attributes:
        config: the run.
        config_path: its file.
        directory: the run's.
        allocation: the job's nodes.
        attempt: this one.
        job_end: what SLURM says of the job's end.
        asked: signals that reached this process.
    """

    config: RunConfig
    config_path: Path
    directory: RunDirectory
    allocation: Allocation
    attempt: Attempt
    job_end: JobEnd
    asked: AskedToStop

    def outcome(self) -> Outcome:
        """Check the nodes, train, and tell how that ended."""
        try:
            bad = self._check_nodes()
            if bad is not None:
                return bad
            if not self._is_ours():
                return Outcome("killed", "another start of the job has the run")
            if self.asked:
                kind = self._who_asked()
                return Outcome("stopped", "asked to stop before the first step", kind)
            step_number.set_apart(self.allocation.job, self.allocation.restarts)
            with EvaluationJobs(
                self.config, self.config_path, self.directory.path, self._is_newest
            ):
                ended = self._train()
            return self._judge(ended)
        except TitansError as error:
            print(error, file=sys.stderr, flush=True)
            refused = error.exit_code == errors.USER_ERROR
            return Outcome("refused" if refused else "failed", error.what)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return Outcome("failed", str(error))

    def current(self) -> slurm_utils.Job | None:
        """This job, while it is what goes on with the run; see ``resubmit.is_current``."""
        return resubmit.is_current(self.directory.path, self.attempt.number, self.allocation)

    def decide(self, outcome: Outcome, before: Sequence[Attempt]) -> Decision | None:
        """What follows, from the policy and from what SLURM can do.

        Returns:
            None if the run is in another start's hands.

        Raises:
            SlurmError: SLURM did not answer until the job's time limit.
        """
        job = self.config.job
        if outcome.verdict == "done":  # needs nothing of SLURM
            newest = resubmit.is_newest(self.directory.path, self.attempt.number)
            return policy.decide(outcome, before, job) if newest else None
        spare = 0
        if outcome.suspects:
            with contextlib.suppress(SlurmError):
                known = nodes.states(self.allocation.partition)
                spare = nodes.spare(known, job.nodes, job.exclude)
        current = self._current_at_last()
        if current is None:
            return None
        decision = policy.decide(outcome, before, job, current=self.allocation.job, spare=spare)
        return self._as_slurm_lets(decision, current)

    def end(self, outcome: Outcome, decision: Decision) -> None:
        """Put the attempt's end down, before anything that ends this process."""
        ended = judge.ended(self.directory, self.attempt, outcome)
        next_job = self.allocation.job if decision.action == "requeue" else ""
        ended = replace(ended, action=decision.action, next_job=next_job)
        history.write(self.directory.path, ended)
        say(ended.line())

    def act(self, decision: Decision) -> int:
        """Do what was decided; the exit code."""
        if decision.action in ("requeue", "resubmit"):
            return self._go_on(decision)
        if decision.exit_code == errors.STOPPED:
            say(f"this job ends here: {decision.reason}; titans submit goes on with the run")
        elif decision.action == "end":
            print(f"error: the run ends here: {decision.reason}", file=sys.stderr)
            print(f"where: {self.directory.path}", file=sys.stderr)
            print(f"fix:   {decision.fix}", file=sys.stderr, flush=True)
        return decision.exit_code

    def _go_on(self, decision: Decision) -> int:
        """Requeue or resubmit the job; the one where SLURM refuses the other.

        Raises:
            TitansError: it refuses both.
        """
        refusal: TitansError | None = None
        while True:
            current = self._current_at_last()  # the user may have cancelled it meanwhile
            if current is None:
                say("the run goes on in another start of the job: nothing more is done here")
                return errors.STOPPED
            decision = self._as_slurm_lets(decision, current)
            if decision.action == "end":
                self._note("end", "")
                say(f"this job ends here: {decision.reason}; titans submit goes on with the run")
                return decision.exit_code
            try:
                if decision.action == "resubmit":
                    self._resubmit(decision.exclude)
                else:
                    self._requeue()
                return decision.exit_code
            except TitansError as error:
                if refusal is not None:
                    self._note("end", "")
                    raise
                refusal = error
                say(f"SLURM does not {decision.action} the job: {error.what}")
                other: Action = "requeue" if decision.action == "resubmit" else "resubmit"
                decision = replace(decision, action=other, exclude=())

    def _as_slurm_lets(self, decision: Decision, current: slurm_utils.Job) -> Decision:
        """What is left of a decision to go on, by the state of the job."""
        if decision.action not in ("requeue", "resubmit"):
            return decision
        has_file = resubmit.script(self.directory.path) is not None
        over = current.finished or current.state == "COMPLETING"
        if over and current.reason != "TimeLimit":
            if has_file and self._is_cancelled_for_another():
                return replace(decision, action="resubmit")
            told = f"SLURM is ending the job itself; {decision.reason}"
            return Decision("end", errors.STOPPED, told)
        if decision.action == "resubmit" and not has_file:
            say("there is no job file to submit again: the job is requeued")
            return replace(decision, action="requeue", exclude=())
        return decision

    def _is_cancelled_for_another(self) -> bool:
        """Whether SLURM preempts the job where that is for good."""
        with contextlib.suppress(SlurmError):
            preempted = self.job_end.is_preempted()
            return preempted and nodes.preempt_mode(self.allocation.partition) == "CANCEL"
        return False

    def _current_at_last(self) -> slurm_utils.Job | None:
        """``current``, asked until SLURM answers or the job's time is over.

        Raises:
            SlurmError: it did not answer until then.
        """
        deadline = time.monotonic() + UNANSWERED_SECONDS
        while True:
            try:
                return self.current()
            except SlurmError as error:
                over = time.monotonic() > deadline
                if over or self.job_end.is_within(END_MARGIN_SECONDS):
                    raise
                say(f"SLURM is asked again what becomes of the job: {error.what}")
                time.sleep(RETRY_SECONDS)

    def _note(self, action: Action, next_job: str) -> None:
        """Put down what came next after all."""
        found = history.attempts(self.directory.path)
        ended = next(one for one in found if one.number == self.attempt.number)
        history.write(self.directory.path, replace(ended, action=action, next_job=next_job))

    def _requeue(self) -> None:
        say(f"job {self.allocation.job} is requeued")
        self._note("requeue", self.allocation.job)
        resubmit.requeue(self.allocation, self.asked)

    def _check_nodes(self) -> Outcome | None:
        """What preflight found, if training must not begin.

        Raises:
            UserError: any try would be in vain, on other nodes too, or the grace is too short.
        """
        config = self.config
        proven = any(one.progress for one in history.attempts(self.directory.path))
        if config.job.preflight:
            found = preflight.check(self.allocation, config, config_path=self.config_path)
            for problem in found.problems:
                say(f"{problem.node or 'all nodes'}: {problem.what}; {problem.fix}")
            if found.problems:
                return judge.unfit(found.problems, self.allocation.nodes)
            if (
                not proven
                and not config.job.storage_bytes_per_second
                and found.write_bytes_per_second
            ):
                # one measurement, at a bad moment perhaps: no reason to give the nodes back
                rate = found.write_bytes_per_second
                if told := checks.doubt(config, self.directory.path, rate):
                    say(f"at the {rate / 1e6:,.0f} MB/s that the nodes wrote just now, {told}")
        if proven and (told := checks.doubt(config, self.directory.path)):
            say(told)
        checks.of_run(config, self.directory.path, proven=proven)
        return None

    def _train(self) -> StepEnd:
        """Start the ranks and wait for their end."""
        job, number, limit = self.config.job, self.attempt.number, self.job_end.limit()
        command = [interpreter(job, in_step=True), "-P", "-m", "titans_pretrain.cli"]
        command += ["train", str(self.config_path), *staging.overrides(self.config)]
        command += ["--ranks", str(job.ranks), "--resume"]
        environment = rank_environment(
            os.environ,
            job.environment,
            attempt=number,
            end=None if limit is None else limit - END_MARGIN_SECONDS,
            preempt_seconds=self._preempt_seconds(),
            cpus_per_rank=job.cpus_per_rank,
        )
        place = history.evidence(self.directory.path, number)
        return Step(
            jobs.step_command(job, command, nodes=job.nodes, tasks_per_node=job.ranks_per_node),
            environment,
            beats=self._beats,
            ended=self._has_told,
            asked=self.asked,
            is_ours=self._is_ours,
            forward=self._forward,
            limits=Limits(
                job.start_seconds,
                is_over=lambda: self.job_end.is_within(END_MARGIN_SECONDS),
                is_due=lambda: self.job_end.is_within(job.signal_seconds),
            ),
            save_evidence=lambda why: self._save_evidence(place, why),
        ).run()

    def _judge(self, step: StepEnd) -> Outcome:
        number, start = self.attempt.number, self.attempt.step_from
        told = outcomes.read(self.directory, attempt=number)
        if told is not None and told["outcome"] == "done":  # SLURM has nothing to add
            steps = self.config.train.steps
            done = judge.Situation(number, start, steps, "", self.allocation.nodes)
            return judge.outcome(self.directory, done, step)
        lost: tuple[str, ...] = ()
        with contextlib.suppress(SlurmError):
            lost = nodes.lost(self.allocation.nodes, nodes.states(self.allocation.partition))
        situation = judge.Situation(
            number,
            start,
            self.config.train.steps,
            self._who_asked(),
            self.allocation.nodes,
            signalled=bool(self.asked) or self.job_end.is_preempted(),
        )
        suspects = judge.named([*step.suspects, *lost], self.allocation.nodes)
        return judge.outcome(self.directory, situation, replace(step, suspects=suspects))

    def _beats(self) -> dict[int, dict[str, object]]:
        number = self.attempt.number
        beats = heartbeat.read(self.directory)
        return {rank: beat for rank, beat in beats.items() if beat.get("attempt") == number}

    def _has_told(self) -> bool:
        number = self.attempt.number
        if outcomes.read(self.directory, attempt=number) is not None:
            return True
        return bool(judge.failure(self.directory, number))

    def _forward(self, process: "subprocess.Popen[bytes]", name: str) -> None:
        """Tell the ranks of a signal that reached this process only.

        Long before the time limit it may be a preemption, which they know by SIGTERM.
        """
        kind = self._who_asked()
        say(f"{name} received ({kind or 'of unknown origin'}): the ranks are asked to stop")
        if kind != "limit":
            with contextlib.suppress(SlurmError):
                slurm_utils.cancel(self.allocation.job, signal="TERM")
                return
        process.send_signal(signal.SIGUSR1)

    def _save_evidence(self, place: Path, why: str) -> None:
        say(f"the step is ended: {why}; evidence: {place}")
        evidence.save(self.directory, self.allocation, place, why)

    def _is_ours(self) -> bool:
        """Whether this attempt is the run's still; the records tell where SLURM does not."""
        try:
            return self.current() is not None
        except SlurmError:
            return resubmit.is_newest(self.directory.path, self.attempt.number)

    def _is_newest(self) -> bool:
        return resubmit.is_newest(self.directory.path, self.attempt.number)

    def _who_asked(self) -> Asked:
        limit, seconds = self.job_end.limit(), self.config.job.signal_seconds
        return judge.asked_by(time.time(), limit, seconds, preempted=self.job_end.is_preempted)

    def _preempt_seconds(self) -> float | None:
        job = self.config.job
        if job.preempt_seconds is not None:
            return job.preempt_seconds
        with contextlib.suppress(SlurmError):
            grace = slurm_utils.grace_seconds(self.allocation.partition, qos=job.qos)
            return float(grace) if grace else None
        return None

    def _resubmit(self, exclude: Sequence[str]) -> None:
        """Submit the run's job file again, and have those that wait for this job wait for that.

        Raises:
            TitansError: there is none, or SLURM refuses it.
        """
        path = resubmit.script(self.directory.path)
        if path is None:
            raise TitansError(
                "the run does not go on: no job file to submit again",
                where=str(self.directory.jobs),
                fix="submit the job again, as it was",
            )
        every = list(dict.fromkeys([*self.config.job.exclude, *exclude]))
        new = resubmit.resubmit(self.directory.path, path, every)
        self._note("resubmit", new)
        without = f" without {', '.join(exclude)}" if exclude else ""
        say(f"job {new} goes on with the run{without}, once this one has ended")
        resubmit.move_dependents(self.allocation.job, new, say)
