"""The training loop and what it needs at its start."""

import base64
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.load import load
from titans_pretrain.checkpoint.save import save
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Batch, SequenceLoader
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import StoppedEarly, UserError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.train import guard, optimizer, schedule
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.loss import rank_loss, token_loss_sum
from titans_pretrain.train.metrics import MetricsLog, Progress, WandbLog
from titans_pretrain.train.signals import StopRequest

VERSIONED = ("titans-pretrain", "torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Data:
    """The prepared data and the order it is read in."""

    shards: TokenShards
    loader: SequenceLoader


def open_data(config: RunConfig) -> Data:
    """Open the data of a run and check that the model can read it.

    Raises:
        UserError: see ``TokenShards.open`` and ``SequenceLoader``; more pieces than the model has.
    """
    data = config.data
    shards = TokenShards.open(data.manifest)
    if shards.vocab_size > config.model["vocab_size"]:
        raise UserError(
            f"model.vocab_size: {config.model['vocab_size']} is less than the tokenizer's "
            f"{shards.vocab_size} pieces",
            where=data.manifest,
            fix=f"use model.vocab_size={shards.vocab_size} or more",
        )
    loader = SequenceLoader(
        shards,
        sequence_length=data.sequence_length,
        seed=data.seed,
        validation_fraction=data.validation_fraction,
        length_schedule=data.length_schedule,
    )
    loader.check_step(config.train.global_batch_size)
    return Data(shards, loader)


class Trainer:
    """One rank's part of a run.

    Args:
        config: the run.
        mesh: the grid of ranks.
        device: where this rank computes.
        data: from ``open_data``.
        directory: the run's, prepared.
        stop: whether this rank was asked to stop.
        tell: prints a sentence on rank 0's terminal, nothing elsewhere.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        device: torch.device,
        data: Data,
        directory: RunDirectory,
        stop: StopRequest,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._mesh, self._device = config, mesh, device
        self._data, self._directory, self._stop, self._tell = data, directory, stop, tell
        self._data_rank = mesh.coordinates(devices.rank())[1]
        self._engine = _build_engine(config, mesh, device)
        self._step = self._position = 0

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it was trained on other data.
            TitansError: it cannot be read.
        """
        state = load(path, self._engine.shards())
        devices.together(lambda: self._check_data(state["fingerprint"]))
        self._step, self._position = state["step"], state["position"]
        self._engine.restore(self._step)
        _set_random_state(state["rng"])

    def run(self) -> None:
        """Train to the last step; metrics, validations and checkpoints on the way.

        Raises:
            StoppedEarly: a signal asked for it; the state is saved.
            TitansError: a number is not finite, or a checkpoint could not be written.
        """
        train, every = self._config.train, self._config.checkpoint.every
        records = Records(self._config, self._directory, self._step, self._tell)
        while self._step < train.steps:
            row, stop = self._train_step()
            records.step(row)
            last = self._step == train.steps
            if last or (not stop and _due(self._step, train.validation_every)):
                loss, stop = self._validate(stoppable=not last)
                records.validation(self._step, loss)
            if last or stop or _due(self._step, every):
                records.sync()
                path = self._save()
            if stop and not last:
                records.close()
                devices.gather_objects(None)  # a rank that left first would have the others killed
                raise StoppedEarly(
                    f"stopped by a signal after step {self._step} of {train.steps}",
                    where=str(path),
                    fix="continue with --resume",
                )
        records.close()

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step; its row, and whether a rank was asked to stop."""
        started, train, step = time.perf_counter(), self._config.train, self._step
        batch = self._data.loader.batch(
            step=step,
            position=self._position,
            sequences=train.global_batch_size,
            rank=self._data_rank,
            ranks=self._mesh.data,
        )
        valid = self._count_valid(batch)
        own = torch.zeros((), dtype=torch.float64, device=self._device)
        for tokens, mask in self._micro_batches(batch):
            summed = self._summed_loss(tokens, mask)
            self._engine.backward(rank_loss(summed, valid, self._mesh.data))
            own += summed.detach()
        total = devices.all_sum(own.cpu().clone()).item()
        place = guard.Place(step + 1, self._position)
        guard.check_loss(total, own.item(), place)
        rate = schedule.learning_rate(step, train)
        norm = self._engine.step(rate)
        guard.check_gradient(norm, place)
        tokens_per_step = train.global_batch_size * self._config.data.sequence_length
        self._step, self._position = step + 1, self._position + tokens_per_step
        seconds = time.perf_counter() - started
        row = {
            "step": self._step,
            "loss": total / valid,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": self._position,
            "tokens_per_second": tokens_per_step / seconds,
            "seconds": seconds,
        }
        return row, self._stop_agreed()

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks."""
        asked = torch.tensor(float(self._stop.name is not None))
        return devices.all_sum(asked).item() > 0

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The rows of one forward pass after another, on the device; equally many tokens each."""
        length = batch.tokens.shape[1] - 1
        rows = self._config.train.micro_batch_size * self._config.data.sequence_length // length
        for first in range(0, len(batch.tokens), rows):
            part = slice(first, first + rows)
            mask = None if batch.target_mask is None else batch.target_mask[part].to(self._device)
            yield batch.tokens[part].to(self._device), mask

    def _summed_loss(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return token_loss_sum(self._engine.forward(tokens[:, :-1]), tokens[:, 1:], mask)

    def _count_valid(self, batch: Batch) -> int:
        """Targets that count, over all ranks."""
        if batch.target_mask is None:
            return batch.tokens[:, 1:].numel() * self._mesh.data
        valid = int(devices.all_sum(batch.target_mask.sum()))
        if not valid:
            raise UserError(
                f"no target of step {self._step + 1} counts: all are masked",
                where=f"data position {self._position}",
                fix="use a larger train.global_batch_size, or mask fewer targets",
            )
        return valid

    def _check_data(self, fingerprint: str) -> None:
        if fingerprint != self._data.shards.fingerprint:
            raise UserError(
                f"the data has fingerprint {self._data.shards.fingerprint}, the run began with "
                f"{fingerprint}",
                where=f"data.manifest: {self._config.data.manifest}",
                fix="give the manifest that the run began with, or begin another run",
            )

    @torch.no_grad()
    def _validate(self, *, stoppable: bool) -> tuple[float | None, bool]:
        """Mean loss of the held-out targets, None where there is none; and whether to stop.

        Where it is ``stoppable`` it gives up between batches for a signal: the time that is left
        is for the checkpoint.
        """
        train, sums = self._config.train, torch.zeros(2, dtype=torch.float64)
        if not self._config.data.validation_fraction:
            return None, False
        self._engine.train(False)
        for batch in self._data.loader.validation_batches(
            sequences=train.micro_batch_size * self._mesh.data,
            limit=train.validation_sequences,
            rank=self._data_rank,
            ranks=self._mesh.data,
        ):
            if stoppable and self._stop_agreed():
                self._engine.train()
                return None, True
            for tokens, mask in self._micro_batches(batch):
                count = tokens[:, 1:].numel() if mask is None else int(mask.sum())
                loss = self._summed_loss(tokens, mask).item()
                sums += torch.tensor([loss, count], dtype=torch.float64)
        self._engine.train()
        own = sums[0].item()
        total, valid = devices.all_sum(sums).tolist()
        place = guard.Place(self._step, self._position)
        guard.check_loss(total, own, place, "validation loss")
        return total / valid if valid else None, False

    def _save(self) -> Path:
        return save(
            self._directory.checkpoints,
            self._step,
            self._engine.shards(),
            state={
                "step": self._step,
                "position": self._position,
                "fingerprint": self._data.shards.fingerprint,
                "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
                "rng": _random_state(),
            },
            files={
                "config.yaml": run_config.dump(self._config).encode(),
                "tokenizer.model": self._data.shards.tokenizer.read_bytes(),
            },
            keep=self._config.checkpoint.keep,
        )


class Records:
    """Rows to all listeners, on rank 0 only."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, step: int, tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._active = devices.rank() == 0
        if self._active:
            self._metrics = MetricsLog(directory.metrics, step=step)
            self._wandb = WandbLog(config, directory.path, tell)
            self._progress = Progress(config.train.steps, tell)

    def step(self, row: dict[str, Any]) -> None:
        """A training step's row."""
        if self._active:
            self._metrics.write(row)
            self._wandb.write(row)
            self._progress.show(row)

    def validation(self, step: int, loss: float | None) -> None:
        """A validation's result; None is none."""
        if self._active and loss is not None:
            row = {"step": step, "validation_loss": loss}
            self._metrics.write(row)
            self._wandb.write(row)
            self._tell(f"step {step}  validation loss {loss:.4f}")

    def sync(self) -> None:
        """Before a checkpoint: what was told so far survives a power cut."""
        if self._active:
            self._metrics.sync()

    def close(self) -> None:
        """Nothing comes any more."""
        if self._active:
            self._wandb.close()


def _build_engine(config: RunConfig, mesh: Mesh, device: torch.device) -> ZeroEngine:
    """The model with the seed's initial weights, whatever the number of ranks, in an engine."""
    from titans_pretrain.model.configuration_titans import TitansConfig
    from titans_pretrain.model.modeling_titans import TitansForCausalLM

    torch.manual_seed(config.train.seed)
    model = TitansForCausalLM(TitansConfig(**config.model)).float()
    adam = optimizer.build(model, config.train)
    engine = ZeroEngine(model, adam, config.train, mesh, device)
    engine.train()
    return engine


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _random_state() -> str:
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def _set_random_state(text: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))
