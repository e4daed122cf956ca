"""What a run tells: ``metrics.jsonl`` (the truth), wandb, a progress line. No torch here."""

import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.config import RunConfig
from titans_pretrain.files import atomic_file
from titans_pretrain.plan.flops import scaled
from titans_pretrain.train.evaluation_feed import PREFIX, STEP

WANDB_SECONDS = 20
PROGRESS_SECONDS = 1.0


class MetricsLog:
    """Appends rows to ``metrics.jsonl``; a row is whole or, after a crash, cut off at resume.

    Later rows than the step the run goes on from are removed, except the guard's decisions: events
    whose ``step`` is then that one, marked as undone.

    Args:
        path: the file.
        step: the step the run goes on from; None where it begins, whatever the file holds.
    """

    def __init__(self, path: Path, *, step: int | None) -> None:
        self._path = path
        self._keep(step)

    def undo(self, step: int, event: Mapping[str, Any]) -> None:
        """Remove the rows after ``step`` and append the event that undid them, in one go."""
        self._file.close()
        self._keep(step, json.dumps(event) + "\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the rows survive a power cut; before a checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def _keep(self, step: int | None, more: str = "") -> None:
        """Leave the rows up to ``step`` and the decisions after it, then ``more``."""
        if self._path.exists():
            kept = [_cut(row, step) for row in _whole_rows(self._path)]
            with atomic_file(self._path, "w") as handle:
                handle.writelines([*kept, more])
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run


def last_rollback(path: Path, step: int) -> dict[str, Any] | None:
    """The newest event of rolling back to the state after ``step``, None if there is none.

    One that is undone does not count: since then the run went on from an earlier step, and made the
    state after ``step`` again.
    """
    rows = [json.loads(row) for row in _whole_rows(path)] if path.exists() else []
    events = [
        row
        for row in rows
        if row.get("event") == "rollback" and row["step"] == step and not row.get("undone")
    ]
    return events[-1] if events else None


def has_validation(path: Path, step: int) -> bool:
    """Whether there is a validation's row of the state after ``step``."""
    rows = [json.loads(row) for row in _whole_rows(path)] if path.exists() else []
    return any(row["step"] == step and "validation_loss" in row for row in rows)


def _cut(line: str, step: int | None) -> str:
    """What is left of a row when the run goes on from ``step``: nothing, unless the guard spoke."""
    row = json.loads(line)
    if step is not None and row["step"] <= step:
        return line
    if "skipped" in row:
        row = {
            "event": "skip",
            "reason": row["skipped"],
            "where": row["where"],
            "from_step": row["step"],
            "position": row["tokens"],
        }
    if "event" not in row:
        return ""
    return json.dumps(row | {"step": step or 0, "undone": True}) + "\n"


def _whole_rows(path: Path) -> list[str]:
    """The lines of the file up to the first that is no JSON object with a step."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                whole = line.endswith("\n") and isinstance(json.loads(line)["step"], int)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                break
            rows.append(line)
    return rows


class WandbLog:
    """Rows to wandb under one run id; its failures are told once and never stop the run.

    Offline where WANDB_API_KEY is not set (``wandb sync`` uploads later); WANDB_MODE overrides.

    Args:
        config: the run; ``run.wandb_project`` None turns wandb off.
        directory: the run's directory, which keeps the run id.
        tell: prints a sentence.
    """

    def __init__(self, config: RunConfig, directory: Path, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._run: Any = None
        if config.run.wandb_project is not None:
            self._try("start", lambda: self._start(config, directory))

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one row at its step; one without a step after all others."""
        if self._run is not None:
            values = {name: value for name, value in row.items() if name != "step"}
            self._try("log", lambda: self._run.log(values, step=row.get("step")))

    def close(self) -> None:
        """Finish the run, for at most WANDB_SECONDS."""
        if self._run is not None:
            self._try("finish", self._finish)

    def _start(self, config: RunConfig, directory: Path) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=config.run.name or directory.name,
            id=run_id(directory),
            resume="allow" if mode == "online" else None,
            dir=directory,
            config=config.model_dump(),
            mode=mode,
            settings=wandb.Settings(
                init_timeout=WANDB_SECONDS, silent=True, console="off", disable_git=True
            ),
        )
        if config.pipeline.eval.every:  # they come later than the step they are of
            self._run.define_metric(f"{PREFIX}/*", step_metric=STEP)

    def _finish(self) -> None:
        finishing = threading.Thread(target=self._run.finish, daemon=True)
        finishing.start()
        finishing.join(WANDB_SECONDS)
        if finishing.is_alive():
            raise TimeoutError(f"not done after {WANDB_SECONDS} s")

    def _try(self, doing: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            self._tell(
                f"wandb could not {doing}: {_without_key(f'{type(error).__name__}: {error}')}; "
                "going on with metrics.jsonl only"
            )


def run_id(directory: Path) -> str:
    """The wandb id of the run, made once and kept in its directory."""
    path = directory / "wandb-id"
    if not path.exists():
        with atomic_file(path, "w") as handle:
            handle.write(uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _without_key(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return (text.replace(key, "(key)") if key else text).splitlines()[0]


class Progress:
    """One line a step on the terminal, at most one a second.

    Args:
        steps: steps of the whole run.
        tell: prints a line.
    """

    def __init__(self, steps: int, tell: Callable[[str], None]) -> None:
        self._steps, self._tell = steps, tell
        self._shown = float("-inf")
        self._seconds: deque[float] = deque(maxlen=50)

    def show(self, row: Mapping[str, Any]) -> None:
        """Tell one step's row."""
        self._seconds.append(row["seconds"])
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS and row["step"] < self._steps:
            return
        self._shown = now
        mean = sum(self._seconds) / len(self._seconds)
        left = mean * (self._steps - row["step"])
        self._tell(progress_line(row, self._steps, left))


def progress_line(row: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """Step, loss, gradient norm, learning rate, speed and time left."""
    return (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  "
        f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  "
        f"{_utilisation(row)}{duration(seconds_left)} left"
    )


def _utilisation(row: Mapping[str, Any]) -> str:
    """A rank's model FLOPs a second and, where known, their share of its peak."""
    if "flops_per_second" not in row:
        return ""
    share = f" (MFU {row['mfu']:.1%})" if "mfu" in row else ""
    return f"{scaled(row['flops_per_second'])}FLOP/s a rank{share}  "


def duration(seconds: float) -> str:
    """``3d04h``, ``2h05m``, ``7m30s`` or ``12s``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"
