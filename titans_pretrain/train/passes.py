"""The forward and backward passes of a step on one rank, in the order of the wavefront."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Batch
from titans_pretrain.model.fields import separates_documents
from titans_pretrain.parallel import wavefront
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.train.loss import rank_loss, token_loss_sum


class MicroBatch(NamedTuple):
    """What a rank takes through the model at once: its span of some rows.

    Attributes:
        tokens: (rows, span + 1) on the device.
        mask: (rows, span), True where a target counts; None counts all.
        document_starts: (rows, span) on the host, the column, of the whole row, at which each
            input's document begins; None where documents are not told apart.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    document_starts: torch.Tensor | None = None

    def valid(self) -> int:
        """Targets that count."""
        return self.tokens[:, 1:].numel() if self.mask is None else int(self.mask.sum())


class Passes:
    """Takes batches through an engine.

    Args:
        engine: the model.
        parallel: this rank's part in it.
        config: the run.
        device: where this rank computes.
    """

    def __init__(
        self, engine: ZeroEngine, parallel: Parallel, config: RunConfig, device: torch.device
    ) -> None:
        self._engine, self._parallel, self._device = engine, parallel, device
        self._data_ranks = parallel.mesh.data
        self._tokens = config.train.micro_batch_size * config.data.sequence_length
        self._evaluated = 0
        self._interleaved = wavefront.is_interleaved(config)
        self._separates = separates_documents(config.model)

    def train(self, batch: Batch, valid: int) -> list[float]:
        """Leave the gradients of a step in the engine.

        Args:
            batch: this data rank's rows.
            valid: targets that count in the global batch.

        Returns:
            The summed loss of this rank's span of each micro-batch.
        """
        parts = self._micro_batches(batch)
        waiting: dict[int, torch.Tensor] = {}
        summed: dict[int, torch.Tensor] = {}
        order = wavefront.order(
            self._parallel.groups.sequence_rank,
            self._parallel.mesh.sequence,
            len(parts),
            interleaved=self._interleaved,
        )
        for kind, number in order:
            if kind == "forward":
                loss = self._summed_loss(parts[number], number)
                summed[number] = loss.detach()
                waiting[number] = rank_loss(loss, valid, self._data_ranks)
            else:
                self._engine.backward(waiting.pop(number), number)
        self._parallel.whereabouts.enter("synchronizing")
        losses: list[float] = torch.stack([summed[n] for n in range(len(parts))]).tolist()
        return losses

    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Summed loss, on the device, and number of the targets that count in this rank's span."""
        parts = self._micro_batches(batch)
        losses = [self._summed_loss(part, number) for number, part in enumerate(parts)]
        self._evaluated += 1
        if self._evaluated % self._parallel.mesh.sequence == 0:
            self._parallel.links.drain()  # as far apart as sequence ranks get anyway
        self._parallel.whereabouts.enter("summing up")
        return torch.stack(losses).sum(), sum(part.valid() for part in parts)

    def _micro_batches(self, batch: Batch) -> Sequence[MicroBatch]:
        """This rank's span of one set of rows after another; equally many tokens each."""
        if self._separates and batch.document_starts is None:
            raise ValueError("the model separates documents, but the batch does not tell them")
        rows = self._tokens // (batch.tokens.shape[1] - 1)
        return [
            MicroBatch(
                self._own(batch.tokens[part]),
                None if batch.target_mask is None else self._own(batch.target_mask[part]),
                None
                if batch.document_starts is None
                else self._parallel.span(batch.document_starts[part]),
            )
            for part in (slice(first, first + rows) for first in range(0, len(batch.tokens), rows))
        ]

    def _own(self, columns: torch.Tensor) -> torch.Tensor:
        return self._parallel.span(columns).to(self._device)

    def _summed_loss(self, part: MicroBatch, number: int) -> torch.Tensor:
        ids = part.tokens[:, :-1].contiguous()
        targets = part.tokens[:, 1:].contiguous()
        losses = self._engine.losses(ids, targets, number, part.document_starts)
        return token_loss_sum(losses, part.mask)
