"""Rows of a run to all its listeners; evaluations, which jobs of their own make, to wandb."""

from collections.abc import Callable
from typing import Any

from titans_pretrain.checkpoint import evaluations
from titans_pretrain.config import RunConfig
from titans_pretrain.parallel import devices
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.evaluation_feed import EvaluationFeed
from titans_pretrain.train.lease import Lease
from titans_pretrain.train.metrics import MetricsLog, Progress, WandbLog


class Records:
    """``metrics.jsonl``, wandb and the terminal, on rank 0; nothing elsewhere.

    Args:
        config: the run.
        directory: the run's.
        step: the step the run goes on from; None where it begins.
        tell: prints a sentence.
        lease: this start's right to write.

    Raises:
        Fenced: on rank 0, the run is another start's; ``rollback`` raises it likewise.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        step: int | None,
        tell: Callable[[str], None],
        lease: Lease,
    ) -> None:
        self._lease = lease
        self._tell = tell
        self._active = devices.rank() == 0
        if self._active:
            lease.check()
            self._metrics = MetricsLog(directory.metrics, step=step)
            lease.check()  # from here on another start puts a new file in the place of this one
            evaluations.undo(directory.path, step or 0)
            lease.check()
            self._wandb = WandbLog(config, directory.path, tell)
            self._feed = EvaluationFeed(directory.path)
            self._directory, self._steps, self._last = directory, config.train.steps, 0
            self._progress = Progress(config.train.steps, tell)

    def step(self, row: dict[str, Any]) -> None:
        """A training step's row."""
        if self._active:
            self._metrics.write(row)
            self._wandb.write(row | self._feed.next())
            self._last = row["step"]
            if "skipped" in row:
                self._tell(f"step {row['step']}  skipped: {row['skipped']}; {row['where']}")
            else:
                self._progress.show(row)

    def validation(self, step: int, loss: float | None) -> None:
        """A validation's result; None is none."""
        if self._active and loss is not None:
            row = {"step": step, "validation_loss": loss}
            self._metrics.write(row)
            self._wandb.write(row)
            self._tell(f"step {step}  validation loss {loss:.4f}")

    def stop(self, event: dict[str, Any]) -> None:
        """The guard's decision to end the run; the error that follows tells it."""
        if self._active:
            self._metrics.write(event)
            self._metrics.sync()

    def rollback(self, event: dict[str, Any]) -> None:
        """Going back to the state after ``event["step"]``: later rows are undone."""
        if self._active:
            self._lease.check()
            self._metrics.undo(event["step"], event)
            evaluations.undo(self._directory.path, event["step"])
            self._feed.look()  # those that were undone do not come any more
            self._lease.check()
            self._tell(
                f"step {event['from_step']}  {event['reason']}; {event['where']}; going on from "
                f"step {event['step']} with the data after position {event['position']}"
            )

    def sync(self) -> None:
        """Before a checkpoint: what was told so far survives a power cut."""
        if self._active:
            self._metrics.sync()
            self._feed.look()

    def close(self) -> None:
        """Nothing comes any more."""
        if self._active:
            if self._last >= self._steps:  # else the next start has rows to put them in
                self._feed.look()
                while values := self._feed.next():
                    self._wandb.write(values)
            self._wandb.close()
