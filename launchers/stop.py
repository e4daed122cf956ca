"""``titans stop``: have a run save and end, or end it at once. No torch here."""

import time
from collections.abc import Callable
from pathlib import Path

from launchers import run_state, slurm_command, slurm_utils
from launchers.run_state import RunState
from launchers.slurm_jobs import Job
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import atomic_file

POLL_SECONDS = 2.0
TOLD_SECONDS = 30.0


def stop(run: Path, *, now: bool = False, wait: bool = False) -> int:
    """Stop a run: its queued jobs are cancelled, ranks that train save first.

    Args:
        run: the run's directory.
        now: cancel its jobs without a save.
        wait: return when it has ended.

    Returns:
        The exit code.

    Raises:
        UserError: no run; or ``now`` for ranks that no job of SLURM holds.
        TitansError: SLURM does not answer, or a job cannot be cancelled.
    """
    run_state.check(run)
    state = _look(run)
    if state.jobs is None and state.submitted:
        print("SLURM's commands are not here: jobs that wait are not cancelled")
    for job in state.evaluating:
        print(f"job {job.id} evaluates a checkpoint and goes on; scancel {job.id} ends it")
    if not state.living and state.is_over:
        _forget(state)
        print(f"nobody runs {run}: {_where_it_stands(state)}")
        return 0
    if now:
        _end(state)
    else:
        _ask(state)
    if wait:
        _wait(run, print)
    elif not now:
        print(f"`titans status {run}` tells when it has ended")
    print(f"to go on with it: {_command(state)} --resume")
    return 0


def _look(run: Path) -> RunState:
    """The run's state.

    Raises:
        TitansError: jobs were queued for it, and SLURM does not answer: they might begin later.
    """
    (state,) = run_state.read([run])
    if state.jobs is None and (state.submitted or state.attempts) and slurm_command.available():
        raise TitansError(
            "SLURM does not answer, and the run may have jobs in its queue",
            where="scontrol ping",
            fix=f"repeat this when it answers; `touch {state.directory.stop}` stops ranks that "
            "train already",
        )
    return state


def _forget(state: RunState) -> None:
    """Take away a request that nobody will hear.

    It stays where an attempt did not tell its end: SLURM may not know its job by that name.
    """
    newest = state.attempts[-1] if state.attempts else None
    job = (state.jobs or {}).get(newest.job) if newest else None
    gone = newest is None or newest.ended is not None or (job is not None and job.finished)
    if gone and not state.unreadable:
        state.directory.stop.unlink(missing_ok=True)


def _ask(state: RunState) -> None:
    """Have the ranks that train save and end; other stages keep what they have finished."""
    state = _cancel(state, lambda state, job: not (job.running and job in state.training))
    training = [f"job {job.id}" for job in state.training if job.running]
    if not training and not state.is_alive and state.jobs is not None:
        return
    _touch(state)
    unknown = "its job, if SLURM starts one," if state.submitted or state.attempts else ""
    who = ", ".join(training) or (not state.is_alive and unknown) or "ranks outside of SLURM"
    print(f"asked {who} to stop: the run saves after the step under way and is not queued again")


def _end(state: RunState) -> None:
    """Cancel all jobs and tell what that costs.

    Raises:
        UserError: SLURM cannot be asked, or holds no job of the ranks that train.
    """
    if state.jobs is None and (state.submitted or state.attempts):
        raise UserError(
            "SLURM's commands are not here, and --now cancels jobs",
            where="PATH: scancel",
            fix="repeat this on a login node, or leave out --now to have the run save and end",
        )
    if state.is_alive and not state.training:
        hosts = sorted({str(beat.get("host")) for beat in state.beats.values()})
        raise UserError(
            "no job of SLURM holds the ranks that train, so there is none to cancel",
            where=f"processes in ranks.json, on {', '.join(hosts)}",
            fix="leave out --now to have them save and end, or kill them there",
        )
    saved = _saved(state)
    _touch(state)  # a job that is queued for the run meanwhile ends by it
    after = _cancel(state, lambda state, job: True)
    if all(job.state == "COMPLETING" for job in after.living):
        after.directory.stop.unlink(missing_ok=True)
    if state.metrics.step > saved and state.is_alive:
        print(f"steps {saved + 1} to {state.metrics.step} are lost, and any after them")


def _touch(state: RunState) -> None:
    with atomic_file(state.directory.stop, "w"):
        pass


def _cancel(state: RunState, chosen: Callable[[RunState, Job], bool]) -> RunState:
    """Cancel jobs until none is chosen; the state afterwards.

    Those of the latest stages go first, so that none begins meanwhile. One that waited at the look
    is cancelled only while it does, and looked at again: it may have begun to train.
    """
    done: dict[str, bool] = {}
    while True:
        runs: dict[str, bool] = {}
        for job in state.living:
            if chosen(state, job):
                name = _cancelled_as(state, job)
                runs[name] = runs.get(name, False) or job.running
        order = {row.job: number for number, row in enumerate(state.submitted)}
        names = [name for name, ran in runs.items() if name not in done or ran > done[name]]
        names.sort(key=lambda name: -order.get(name, -1))
        if not names:
            return state
        for name in names:
            slurm_utils.cancel(name, waiting=not runs[name])
            done[name] = runs[name]
        state = _look(state.directory.path)
        begun = {_cancelled_as(state, job) for job in state.living if job.running}
        for name in names:
            if runs[name] or name not in begun:
                _tell(state, name, ran=runs[name])


def _cancelled_as(state: RunState, job: Job) -> str:
    """What a job is cancelled by: an array as one, unless the run is an element of it."""
    base = run_state.base(job.id)
    return base if base in {row.job for row in state.submitted} else job.id


def _tell(state: RunState, name: str, *, ran: bool) -> None:
    stage = {row.job: row.stage for row in state.submitted}.get(name, run_state.TRAIN)
    kept = "; what it has finished is kept" if ran and stage != run_state.TRAIN else ""
    print(f"cancelled job {name} ({stage}), which {'ran' if ran else 'waited'}{kept}")


def _saved(state: RunState) -> int:
    """Step of the newest checkpoint."""
    from titans_pretrain.checkpoint import format as layout

    return max(layout.steps(state.directory.checkpoints), default=0)


def _wait(run: Path, tell: Callable[[str], None]) -> None:
    """Return when the run has ended; a word now and then meanwhile."""
    told = time.monotonic()
    while True:
        state = _look(run)
        heard = state.jobs is None and not (state.is_alive or state.directory.stop.exists())
        if not state.living and (state.is_over or heard):
            _forget(state)
            tell(f"ended: {_where_it_stands(state)}")
            return
        if time.monotonic() - told >= TOLD_SECONDS:
            told = time.monotonic()
            tell(f"waiting: {state.word}, step {state.metrics.step}")
        time.sleep(POLL_SECONDS)


def _where_it_stands(state: RunState) -> str:
    of_all = "" if state.steps is None else f" of {state.steps}"
    saved = f"saved at step {_saved(state)}{of_all}"
    return f"{state.word}, {saved}" if _saved(state) else f"{state.word}, nothing saved"


def _command(state: RunState) -> str:
    """What the run goes on with, in the way in which it was started."""
    if state.submitted or state.attempts:
        frozen = state.directory.jobs / "config.yaml"
        return f"titans submit {frozen if frozen.exists() else state.directory.config}"
    return f"titans train {state.directory.config}"
