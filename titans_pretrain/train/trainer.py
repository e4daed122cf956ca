"""The training loop."""

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.background import Progress
from titans_pretrain.checkpoint.load import load
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Batch
from titans_pretrain.data.prefetch import ReadAhead
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train import (
    build,
    guard,
    initial,
    outcome,
    rollback,
    schedule,
    stopping,
    validation,
)
from titans_pretrain.train.build import Data
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease
from titans_pretrain.train.metrics import has_validation, last_rollback
from titans_pretrain.train.outcome import Outcome
from titans_pretrain.train.passes import Passes
from titans_pretrain.train.records import Records
from titans_pretrain.train.saving import Saves, awaited
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.speed import Speed
from titans_pretrain.train.stopping import Stopping
from titans_pretrain.train.trace import traced

VERSIONED = ("titans-pretrain", "torch", "deepspeed", "transformers")


class Trainer:
    """One rank's part of a run.

    Args:
        config: the run.
        parallel: this rank's part in the mesh; its whereabouts are told where the rank stands.
        device: where this rank computes.
        data: from ``open_data``.
        directory: the run's, prepared.
        stop: whether this rank was asked to stop.
        tell: prints a sentence on rank 0's terminal, nothing elsewhere.
        begin: told that a piece of work begins, see ``Watch.begin``.
        lease: this start's right to write; None where no other start can take the run over.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        device: torch.device,
        data: Data,
        directory: RunDirectory,
        stop: StopRequest,
        tell: Callable[[str], None],
        begin: Callable[[str], None] = lambda work: None,
        lease: Lease | None = None,
    ) -> None:
        self._config, self._parallel, self._device = config, parallel, device
        self._data, self._directory, self._tell = data, directory, tell
        self._lease = lease or Lease(directory.lock)
        self._stopping = Stopping(stop, directory)
        self._tokenizer = data.corpus.tokenizer.read_bytes()  # its file may not outlive the run
        self._begin = begin
        self._mesh, self._whereabouts = parallel.mesh, parallel.whereabouts
        self._data_rank = parallel.groups.data_rank
        self._counts = parallel.groups.tensor_rank == 0  # what they share is added up once
        self._engine = build.build_engine(config, parallel, device)
        self._passes = Passes(self._engine, parallel, config, device)
        self._batches = ReadAhead(
            self._read,
            tokens=self._tokens_per_step,
            steps=config.train.steps,
            workers=config.data.workers,
        )
        self._speed = Speed(config, parallel.mesh.ranks, device)
        self._guard = guard.Guard(config.guard)
        self._saver = Saves(
            config.checkpoint,
            directory,
            self._lease,
            self._stopping.triggers.saved,
            awaited(config, directory, self._lease),
        )
        self._restored = self._save_asked = False
        self._initial: Mapping[str, Any] = {}
        self._step = self._position = self._updates = 0

    def initialise(self, directory: Path, told: Mapping[str, Any]) -> None:
        """Begin with an exported model's weights instead of the seed's.

        Args:
            directory: what ``initial.check`` allowed.
            told: what it returned, for the checkpoints to come.
        """
        devices.together(lambda: initial.fill(directory, self._engine.shards()))
        self._engine.restore(0)
        self._initial = told
        self._tell(f"initial weights: {directory}")

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, and where the run rolled back to it, from after the bad batch.

        Raises:
            UserError: it was trained on other data.
            TitansError: it cannot be read.
        """
        state = load(path, self._engine.shards())
        devices.together(lambda: build.check_data(self._data, state, self._config))
        self._restored = True
        self._step, self._position = state["step"], state["position"]
        self._saver.loaded(self._step)
        self._updates = state.get("updates", self._step)
        self._guard.restore(state.get("guard", {}))
        self._initial = state.get("initial", {})
        self._engine.restore(self._updates)
        build.set_random_state(state["rng"])
        undone = devices.from_first(lambda: last_rollback(self._directory.metrics, self._step))
        if undone is not None:
            self._position = undone["position"]
            self._guard.keep_row(undone)

    def run(self) -> None:
        """Train to the last step; metrics, validations and checkpoints on the way.

        Raises:
            StoppedEarly: a signal or a file asked for it; the state is saved if time allowed.
            Fenced: another start has taken the run over.
            TitansError: the guard stopped the run, or a checkpoint could not be written.
        """
        train, records = self._config.train, self._open_records()
        if told := self._data.loader.repetitions(train.steps * train.global_batch_size):
            self._tell(told)
        if self._stop_agreed():
            self._end_early(records)
        if self._restored and self._owes_validation() and self._validate(records, stoppable=True):
            self._end_early(records)
        while self._step < train.steps:
            accepted, stop = self._train_step(records)
            if not accepted:
                continue
            last = self._step == train.steps
            if last or (not stop and _due(self._step, train.validation_every)):
                stop = self._validate(records, stoppable=not last)
            if stop and not last:
                self._end_early(records)
            due = _due(self._step, self._config.checkpoint.every) or self._save_asked
            if last or due:
                self._enter("saving")
                records.sync()
                self._save(wait=last)
        self._enter("ending")
        steps = f"all {train.steps} steps are done"
        seconds = round(self._saver.last_seconds, 3)
        self._conclude(Outcome("done", steps, "", self._step, self._saver.whole, "now", seconds))
        records.close()

    def _end_early(self, records: Records) -> NoReturn:
        """Save the state if that fits into the time that is left, and say how the run ended.

        Raises:
            StoppedEarly: always.
        """
        self._enter("saving")
        records.sync()
        stop = self._stopping.agree(self._step, self._saver)
        if stop.decision.save:
            self._save(wait=True)
        elif stop.decision.wait:
            self._saver.wait()
        told = stop.outcome(self._step, self._config.train.steps, self._saver)
        self._conclude(told)
        self._enter("stopping")
        records.close()
        devices.gather_objects(None)  # a rank that left first would have the others killed
        raise stopping.stopped(told, self._directory)

    def _conclude(self, told: Outcome) -> None:
        """Write down how this start ended, which answers the files that asked for it."""
        if devices.rank() == 0:
            outcome.write(self._directory, self._lease, told)
            self._stopping.consume(told)

    def _open_records(self) -> Records:
        if not self._restored and self._config.guard.policy == "rollback":
            self._enter("saving")
            self._save(wait=True)  # there is always a state to go back to
        begun = self._step if self._restored else None
        return Records(self._config, self._directory, begun, self._tell, self._lease)

    def _train_step(self, records: Records) -> tuple[bool, bool]:
        """One optimizer step: whether it stays, and whether a rank was asked to stop."""
        started, step = time.perf_counter(), self._step + 1
        tracing = step == self._config.run.trace_step
        self._enter("reading", step=step, work="traced step" if tracing else "step")
        trace = traced(self._directory.trace(devices.rank()), self._device)
        with trace if tracing else contextlib.nullcontext():
            batch = self._batches.take(self._step, self._position)
            valid = self._count_valid(batch)
            losses = self._passes.train(batch, valid)
            self._whereabouts.enter("reducing")
            total, norm, stop = self._agree(sum(losses), self._engine.gradient_norm())
            verdict = self._guard.judge(step, total / valid, norm)
            seen = self._ask_all(verdict, losses)
            if verdict.action in ("stop", "rollback"):
                self._undo(records, verdict, seen)
                return False, stop
            rate = schedule.learning_rate(self._step, self._config.train)
            self._whereabouts.enter("updating")
            if verdict.action == "accept":
                self._engine.step(rate)
                self._updates += 1
            else:
                self._engine.discard()
        self._step, self._position = step, self._position + self._tokens_per_step
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {
            "step": step,
            "loss": total / valid,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": self._position,
            **self._speed.row(batch.tokens.shape[1] - 1, seconds),
        }
        if verdict.action == "skip":  # JSON has no number that is not finite
            row = {name: value for name, value in row.items() if math.isfinite(value)}
            row |= {"skipped": verdict.reason, "where": seen}
        records.step(row)
        return True, stop

    @property
    def _tokens_per_step(self) -> int:
        return self._config.train.global_batch_size * self._config.data.sequence_length

    def _read(self, step: int, position: int) -> Batch:
        return self._data.loader.batch(
            step=step,
            position=position,
            sequences=self._config.train.global_batch_size,
            rank=self._data_rank,
            ranks=self._mesh.data,
        )

    def _count_valid(self, batch: Batch) -> int:
        """Targets that count, over all ranks."""
        if batch.target_mask is None:
            return batch.tokens[:, 1:].numel() * self._mesh.data
        whole = self._counts and self._parallel.groups.sequence_rank == 0
        valid = int(devices.all_sum(batch.target_mask.sum() * whole))
        if not valid:
            raise UserError(
                f"no target of step {self._step + 1} counts: all are masked",
                where=f"data position {self._position}",
                fix="use a larger train.global_batch_size, or mask fewer targets",
            )
        return valid

    def _agree(self, loss: float, norm: float) -> tuple[float, float, bool]:
        """The whole loss, the gradient norm and the wish to stop, the same on all ranks.

        The same message tells whether a save is asked for, and how far one under way is.
        """
        written = self._saver.poll()
        shares = [
            loss if self._counts else 0.0,
            norm if devices.rank() == 0 else 0.0,
            *self._stopping.flags,
            float(written == Progress.BUSY),
            float(written == Progress.FAILED),
        ]
        sums = devices.all_sum(torch.tensor(shares, dtype=torch.float64)).tolist()
        total, norm, asking, saving, busy, failed = sums
        self._save_asked = saving > 0
        states = {Progress.FINISHED: 1, Progress.BUSY: busy, Progress.FAILED: failed}
        if failed:
            self._enter("saving")  # ranks that are still writing are waited for
        self._saver.advance([state for state, ranks in states.items() if ranks])
        return total, norm, asking > 0

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks."""
        asked = torch.tensor(self._stopping.flags[0])
        return devices.all_sum(asked).item() > 0

    def _ask_all(self, verdict: guard.Verdict, losses: list[float]) -> str:
        """Where a bad number comes from; asked only then."""
        if verdict.action == "accept":
            return ""
        own = guard.Witness(tuple(losses), self._engine.own_gradient_finite())
        return guard.blame(verdict.number, devices.gather_objects(own), self._mesh)

    def _undo(self, records: Records, verdict: guard.Verdict, seen: str) -> None:
        """Stop the run at a bad step, or go back to an earlier checkpoint.

        Raises:
            TitansError: the guard stops the run.
        """
        where = f"{seen}; data position {self._position}"
        event = {
            "step": self._step + 1,
            "event": verdict.action,
            "reason": verdict.reason,
            "where": where,
            "from_step": self._step + 1,
            "position": self._position + self._tokens_per_step,
            **self._guard.row(),
        }
        self._enter("saving")
        self._saver.wait()
        if verdict.action == "stop":
            records.stop(event)
            raise TitansError(
                f"{verdict.reason} at step {self._step + 1}",
                where=where,
                fix=guard.ADVICE[self._config.guard.policy],
            )
        self._enter("rolling back")
        self._engine.discard()
        back = self._config.guard.rollback_steps
        path = devices.from_first(
            lambda: rollback.choose(self._directory.checkpoints, self._step, back)
        )
        devices.from_first(lambda: rollback.remove_later(path, self._lease.check))
        records.rollback(event | {"step": int(path.name.removeprefix("step-"))})
        self.restore(path)

    def _validate(self, records: Records, *, stoppable: bool) -> bool:
        """Tell the mean loss of the held-out targets, if there are any; whether to stop instead.

        Where it is ``stoppable`` it gives up between batches for a signal: the time that is left
        is for the checkpoint.
        """
        if not self._data.loader.validation_sequences:
            return False
        self._enter("validating", work="validation")
        self._engine.train(False)
        total = validation.total_loss(
            self._config.train,
            self._data,
            self._passes,
            self._parallel,
            enter=lambda: self._enter("validating", work="validation batch"),
            stop_agreed=self._stop_agreed if stoppable else None,
        )
        self._engine.train()
        self._enter("validated", work="validation")
        if total is None:
            return True
        step, position = self._step, self._position
        loss = validation.mean(*total, counts=self._counts, step=step, position=position)
        records.validation(self._step, loss)
        return False

    def _owes_validation(self) -> bool:
        """Whether the validation of the restored state was left out, as the run was stopped."""
        return _due(self._step, self._config.train.validation_every) and devices.from_first(
            lambda: not has_validation(self._directory.metrics, self._step)
        )

    def _save(self, *, wait: bool) -> None:
        """Begin to save this step's state; wait for the disk if asked to, here or by the run.

        A state whose save was begun already, or that was loaded, is not saved again.
        """
        if self._save_asked and devices.rank() == 0:
            self._stopping.triggers.serve_save(self._step, self._saver.whole)
        if self._saver.begun != self._step:
            self._saver.begin(
                self._step,
                self._engine.shards(),
                state={
                    "step": self._step,
                    "position": self._position,
                    "updates": self._updates,
                    "guard": self._guard.state(),
                    "initial": self._initial,
                    "fingerprint": self._data.corpus.fingerprint,
                    "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
                    "rng": build.random_state(),
                },
                files={
                    "config.yaml": run_config.dump(self._config).encode(),
                    "tokenizer.model": self._tokenizer,
                },
            )
        if wait or not self._config.checkpoint.asynchronous:
            self._saver.wait()

    def _enter(self, phase: str, *, step: int | None = None, work: str = "") -> None:
        """Tell the watch what begins."""
        self._whereabouts.enter(phase, step=step)
        self._begin(work or phase)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
