"""Batches of packed sequences whose place in the data is one integer.

A span is ``sequence_length`` tokens (and the next one, as the last target) of one shard's stream.
Position p of epoch e is span ``permute(p)`` of the training spans. Ranks, micro-batch and global
batch may change at any step: every span still comes exactly once an epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from titans_pretrain.data.order import permute
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import UserError


class Stage(Protocol):
    """From ``from_step`` on, sequences have ``length`` tokens."""

    @property
    def from_step(self) -> int:
        """First optimizer step, from 0."""

    @property
    def length(self) -> int:
        """Tokens a sequence."""


@dataclass(frozen=True)
class Batch:
    """Sequences and which targets count.

    Attributes:
        tokens: int64 (sequences, length + 1); inputs are ``[:, :-1]``, targets ``[:, 1:]``.
        target_mask: bool (sequences, length), False where there is no loss; None means all count.
    """

    tokens: torch.Tensor
    target_mask: torch.Tensor | None


class SequenceLoader:
    """Cuts shards into training and held-out spans and hands out batches of them.

    Args:
        shards: the data.
        sequence_length: tokens of a span.
        seed: of the order of training spans.
        validation_fraction: share of the tokens, the last of the stream, that is never trained on.
        length_schedule: stages of shorter sequences; each length divides ``sequence_length``.

    Attributes:
        tokens_per_epoch: tokens in training spans.

    Raises:
        UserError: sequences longer than any shard allows, or a validation share without one.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        seed: int,
        validation_fraction: float,
        length_schedule: Sequence[Stage] = (),
    ) -> None:
        self._shards, self._length, self._seed = shards, sequence_length, seed
        self._schedule = sorted(length_schedule, key=lambda stage: stage.from_step)
        self._training, self._validation = self._split(validation_fraction)
        self._check(validation_fraction)
        self.tokens_per_epoch = self._training.count * sequence_length

    def length_at(self, step: int) -> int:
        """Tokens a sequence at an optimizer step, from 0."""
        length = self._length
        for stage in self._schedule:
            if step >= stage.from_step:
                length = stage.length
        return length

    def batch(self, *, step: int, position: int, sequences: int, rank: int, ranks: int) -> Batch:
        """One data rank's rows of a step.

        With length l each span is cut into sequence_length / l consecutive rows, so a step holds
        ``sequences * sequence_length`` tokens whatever the schedule says.

        Args:
            step: optimizer step, from 0; picks the length.
            position: tokens consumed before the step, over all epochs.
            sequences: global batch, in full-length sequences.
            rank: this data rank.
            ranks: number of data ranks.

        Raises:
            UserError: ``sequences`` is no multiple of ``ranks`` or more than the data holds, or
                ``position`` belongs to another sequence length.
        """
        first, misfit = divmod(position, self._length)
        if misfit:
            raise UserError(
                f"position {position} is no multiple of the sequence length {self._length}",
                where="data.sequence_length",
                fix="resume with the sequence length that the run began with",
            )
        self.check_step(sequences)
        own = _share(sequences, rank, ranks)
        return self._rows(self._training, self._order(first + own), self.length_at(step))

    def check_step(self, sequences: int) -> None:
        """Refuse a step of more sequences than an epoch holds.

        Raises:
            UserError: with the most that a step can take.
        """
        if sequences > self._training.count:
            raise UserError(
                f"a step takes {sequences} sequences, the data holds {self._training.count} of "
                f"{self._length} tokens",
                where="train.global_batch_size",
                fix=f"use at most {self._training.count}, shorter sequences, or more data",
            )

    def validation_batches(
        self, *, sequences: int, limit: int, rank: int, ranks: int
    ) -> Iterator[Batch]:
        """One data rank's rows of the held-out sequences, in fixed order, each once over all ranks.

        Every rank gets equally many batches of equal size; rows beyond the last sequence repeat
        it with a ``target_mask`` that is all False.

        Args:
            sequences: of one batch over all ranks.
            limit: sequences taken; 0 takes all.
            rank: this data rank.
            ranks: number of data ranks.
        """
        total = min(limit or self._validation.count, self._validation.count)
        for first in range(0, total, sequences):
            index = first + _share(sequences, rank, ranks)
            real = index < total
            batch = self._rows(self._validation, np.minimum(index, total - 1), self._length)
            if not real.all():
                mask = torch.ones(len(index), self._length, dtype=torch.bool)
                mask = mask if batch.target_mask is None else batch.target_mask
                batch = Batch(batch.tokens, mask & torch.from_numpy(real)[:, None])
            yield batch

    def _split(self, validation_fraction: float) -> "tuple[_Spans, _Spans]":
        """Training and held-out spans."""
        lengths = np.array(self._shards.lengths, np.int64)
        boundary = self._shards.tokens - self._held_out(validation_fraction)
        cuts = np.clip(boundary - (np.cumsum(lengths) - lengths), 0, lengths)
        training = _Spans(np.zeros_like(cuts), cuts, self._length)
        return training, _Spans(cuts, lengths, self._length)

    def _held_out(self, validation_fraction: float) -> int:
        return round(self._shards.tokens * validation_fraction)

    def _order(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training spans at places of the endless order, epoch after epoch."""
        count = self._training.count
        epochs = index // count
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            there = epochs == epoch
            out[there] = permute(index[there] % count, count, seed=self._seed, epoch=int(epoch))
        return out

    def _rows(self, spans: "_Spans", index: NDArray[np.int64], length: int) -> Batch:
        places = [spans.place(int(span)) for span in index]
        tokens = self._cut(
            [self._shards.read(*place, self._length + 1) for place in places], length
        )
        if not self._shards.masks:
            return Batch(tokens, None)
        masks = [self._shards.read_mask(*place, self._length + 1) for place in places]
        return Batch(tokens, self._cut(masks, length)[:, 1:])

    def _cut(self, spans: Sequence[NDArray[np.generic]], length: int) -> torch.Tensor:
        """Spans (n, sequence_length + 1) as rows (n * pieces, length + 1) that share borders."""
        return (
            torch.from_numpy(np.stack(spans)).unfold(1, length + 1, length).reshape(-1, length + 1)
        )

    def _check(self, validation_fraction: float) -> None:
        held_out = self._held_out(validation_fraction)
        if not self._training.count:
            raise UserError(
                f"no shard holds a sequence of {self._length} tokens; the longest has "
                f"{max(self._shards.lengths)}"
                + (f", and {held_out} tokens are held out" if held_out else ""),
                where="data.sequence_length",
                fix="use shorter sequences, "
                + ("hold out less, " if held_out else "")
                + "or prepare the data with larger --shard-bytes",
            )
        if validation_fraction > 0 and not self._validation.count:
            raise UserError(
                f"a validation_fraction of {validation_fraction} holds out {held_out} tokens, no "
                f"sequence of {self._length}",
                where="data.validation_fraction",
                fix=self._other_fraction(),
            )

    def _other_fraction(self) -> str:
        """The smallest fraction that holds out a sequence and leaves one, in few digits."""
        tokens = self._length + 1
        for length in reversed(self._shards.lengths):
            if length > self._length:
                break
            tokens += length
        for digits in range(4, 16):
            fraction = math.ceil(tokens / self._shards.tokens * 10**digits) / 10**digits
            if all(spans.count for spans in self._split(fraction)):
                return f"use {fraction:.{digits}f}, or 0"
        return "use 0, shorter sequences, or more data"


class _Spans:
    """Consecutive spans in a part of each shard's stream.

    Args:
        starts: (shards,), where the part begins.
        ends: (shards,), where it ends.
        length: tokens of a span, its last target not counted.
    """

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> None:
        self._starts, self._length = starts, length
        self._until = np.cumsum(np.maximum(ends - starts - 1, 0) // length)
        self.count = int(self._until[-1])

    def place(self, span: int) -> tuple[int, int]:
        """The shard and the position in its stream where a span begins."""
        shard = int(np.searchsorted(self._until, span, side="right"))
        before = int(self._until[shard - 1]) if shard else 0
        return shard, int(self._starts[shard]) + (span - before) * self._length


def _share(sequences: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """The places within a global batch that a rank takes, (sequences / ranks,)."""
    if sequences % ranks:
        raise UserError(
            f"{sequences} sequences do not divide over {ranks} data ranks",
            where="train.global_batch_size",
            fix=f"use a multiple of {ranks}",
        )
    each = sequences // ranks
    return np.arange(rank * each, (rank + 1) * each, dtype=np.int64)
