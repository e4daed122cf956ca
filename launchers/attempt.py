"""One attempt of a run: the batch process of its job, from the allocation to what comes next.

``run`` is the whole of it, top to bottom. No torch here.
"""

import os
from pathlib import Path

from launchers import judge, opening
from launchers.asked import AskedToStop
from launchers.job_end import JobEnd
from launchers.job_log import say
from launchers.supervisor import Supervisor
from titans_pretrain import config as run_config
from titans_pretrain import errors
from titans_pretrain.train.directory import RunDirectory


def run(config_path: Path, asked: AskedToStop) -> int:
    """Make one attempt of a run as the batch process of its job; the job's exit code.

    Args:
        config_path: the run's configuration, as the nodes see it.
        asked: the signals that reach this process, from its beginning on.

    Raises:
        UserError: outside of a job, in one that does not fit the mesh, or beside a running one.
        TitansError: the run's files or SLURM cannot tell what is needed.
    """
    config = run_config.load(config_path)
    allocation = opening.checked_allocation(config, os.environ)
    directory = RunDirectory(Path(config.run.directory))
    before = opening.close_open(directory, allocation, config.train.steps)
    if judge.is_finished(directory, config.train.steps):
        say(f"finished already: {config.train.steps} steps in {directory.path}")
        return errors.DONE
    if opening.consume_stop(directory, allocation, before):
        say("the user asked to stop: nothing is done; titans submit goes on with the run")
        return errors.STOPPED
    opening.refuse_fruitless(before, allocation, config)
    job_end = JobEnd(allocation.job)
    attempt = opening.claim(directory, allocation, before)
    supervisor = Supervisor(
        config, config_path.resolve(), directory, allocation, attempt, job_end, asked
    )
    outcome = supervisor.outcome()
    decision = supervisor.decide(outcome, before)
    if decision is None:
        say("SLURM has given this run to another start of the job: nothing more is done here")
        return errors.STOPPED
    supervisor.end(outcome, decision)
    return supervisor.act(decision)
