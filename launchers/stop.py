"""``titans stop``: have a run save and end, or end it at once. No torch here."""

import time
from collections.abc import Callable, Sequence
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
    if not state.living and not state.is_alive:
        state.directory.stop.unlink(missing_ok=True)
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


def _ask(state: RunState) -> None:
    """Have the ranks that train save and end; other stages keep what they have finished."""
    training = [job for job in state.training if job.running]
    _cancel(state, [job for job in state.living if job not in training])
    if training or state.is_alive:
        with atomic_file(state.directory.stop, "w"):
            pass
        who = ", ".join(f"job {job.id}" for job in training) or "ranks outside of SLURM"
        print(
            f"asked {who} to stop: the run saves after the step under way and is not queued again"
        )


def _end(state: RunState) -> None:
    """Cancel what runs and tell what that costs."""
    if state.is_alive and not state.training:
        hosts = sorted({str(beat.get("host")) for beat in state.beats.values()})
        raise UserError(
            "no job of SLURM holds the ranks that train, so there is none to cancel",
            where=f"processes in ranks.json, on {', '.join(hosts)}",
            fix="leave out --now to have them save and end, or kill them there",
        )
    saved = _saved(state)
    _cancel(state, state.living)
    if state.metrics.step > saved and state.is_alive:
        print(f"steps {saved + 1} to {state.metrics.step} are lost, and any after them")


def _cancel(state: RunState, jobs: Sequence[Job]) -> None:
    """Cancel jobs, those of the latest stages first, so that none begins meanwhile.

    An array is one job, unless the run is an element of it.
    """
    stages = {row.job: row.stage for row in state.submitted}
    order = {job: number for number, job in enumerate(stages)}
    runs: dict[str, bool] = {}
    for job in jobs:
        base = run_state.base(job.id)
        name = base if base in stages else job.id
        runs[name] = runs.get(name, False) or job.running
    for name in sorted(runs, key=lambda name: -order.get(name, -1)):
        slurm_utils.cancel(name)
        stage = stages.get(name, run_state.TRAIN)
        kept = "; what it has finished is kept" if runs[name] and stage != run_state.TRAIN else ""
        print(f"cancelled job {name} ({stage}), which {'ran' if runs[name] else 'waited'}{kept}")


def _saved(state: RunState) -> int:
    """Step of the newest checkpoint."""
    from titans_pretrain.checkpoint import format as layout

    return max(layout.steps(state.directory.checkpoints), default=0)


def _wait(run: Path, tell: Callable[[str], None]) -> None:
    """Return when the run has ended; a word now and then meanwhile."""
    told = time.monotonic()
    while True:
        state = _look(run)
        if not state.living and not state.is_alive:
            state.directory.stop.unlink(missing_ok=True)
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
