"""Batches of packed sequences whose place in the data is one integer.

The training shards, end to end, are one stream; a span is ``sequence_length`` tokens of it and the
next one, as the last target. Position p of epoch e is span ``permute(p)``. Ranks, threads,
micro-batch and global batch may change at any step: every span still comes exactly once an epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from titans_pretrain.config import DataSection
from titans_pretrain.data import documents
from titans_pretrain.data.mixture import Corpus, Slots
from titans_pretrain.data.order import permute
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.data.stream import Spans
from titans_pretrain.errors import UserError

VALIDATION_FRACTION = 0.01

ORDER_BLOCK = 4096


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
        target_mask: bool (sequences, length), False where there is no loss; None, on all data
            ranks alike, means that all count.
        document_starts: int64 (sequences, length), the first column of each input's document in
            this row, 0 where that began before the row; None unless asked for.
    """

    tokens: torch.Tensor
    target_mask: torch.Tensor | None
    document_starts: torch.Tensor | None = None


class Place(NamedTuple):
    """Where a sequence comes from: a span of a source, the how-manieth time that is read."""

    source: int
    epoch: int
    span: int


class SequenceLoader:
    """Cuts a corpus into training and held-out spans and hands out batches of them.

    Args:
        corpus: the data.
        sequence_length: tokens of a span.
        seed: of the order of training spans.
        validation_fraction: share of the tokens, the last of each source's stream, that is never
            trained on; None takes 0.01, or 0 of a source that was prepared with held-out documents.
        length_schedule: stages of shorter sequences; each length divides ``sequence_length``.
        document_starts: whether batches tell them.

    Attributes:
        corpus: the data.
        validation_sequences: held-out spans.

    Raises:
        UserError: too few tokens for a sequence, or a validation share without one.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        seed: int,
        validation_fraction: float | None,
        length_schedule: Sequence[Stage] = (),
        document_starts: bool = False,
    ) -> None:
        self.corpus, self._length, self._seed = corpus, sequence_length, seed
        self._schedule = sorted(length_schedule, key=lambda stage: stage.from_step)
        self._tell_starts = document_starts
        self._slots = Slots(corpus.counts, seed=seed)
        # A block at a time: a batch's few places would cost as much as thousands.
        self._order_block = lru_cache(maxsize=8)(self._make_order)
        parts = [self._split(source, validation_fraction) for source in corpus.sources]
        self._training = [training for training, _ in parts]
        self._validation = [validation for _, validation in parts]
        self._masks = any(spans.stream.masks for spans in self._training + self._validation)
        self.validation_sequences = sum(spans.count for spans in self._validation)

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
            UserError: ``sequences`` is no multiple of ``ranks`` or more than the data holds,
                ``position`` belongs to another sequence length, or a damaged shard.
        """
        self.check_step(sequences)
        own = _share(sequences, rank, ranks)
        sources, _, spans = self._order(self._first(position), sequences)
        return self._rows(self._training, sources, spans, own, self.length_at(step))

    def places(self, *, position: int, sequences: int) -> list[tuple[Place, Spans]]:
        """Where the sequences of a global batch come from, and what they are spans of.

        Args:
            position: tokens consumed before the step.
            sequences: global batch.
        """
        picked = self._order(self._first(position), sequences)
        places = [Place(*row) for row in np.stack(picked, axis=1).tolist()]
        return [(place, self._training[place.source]) for place in places]

    def repeats(self, sequences: int) -> list[float]:
        """How often each source is read in a run.

        Args:
            sequences: that the whole run takes.
        """
        return [
            float(sequences * self._slots.share(source) / spans.count)
            for source, spans in enumerate(self._training)
        ]

    def repetitions(self, sequences: int) -> str:
        """A sentence about the sources that a run of so many sequences reads more than once.

        Empty if there are none.
        """
        times = zip(self.corpus.sources, self.repeats(sequences), strict=True)
        told = [f"{source.manifest} {count:.2f} times" for source, count in times if count > 1]
        return f"the run reads its data more than once: {', '.join(told)}" if told else ""

    def check_step(self, sequences: int) -> None:
        """Refuse a step of more sequences than an epoch holds.

        Raises:
            UserError: with the most that a step can take.
        """
        most = min(
            math.floor(spans.count / self._slots.share(source))
            for source, spans in enumerate(self._training)
        )
        if sequences > most:
            raise UserError(
                f"a step takes {sequences} sequences, the data holds {most} of "
                f"{self._length} tokens" + " at these weights" * (len(self._training) > 1),
                where="train.global_batch_size",
                fix=f"use at most {most}, shorter sequences, or more data",
            )

    def validation_batches(
        self, *, sequences: int, limit: int, rank: int, ranks: int
    ) -> Iterator[Batch]:
        """One data rank's rows of the held-out sequences, in fixed order, each once over all ranks.

        Sources take turns by their number of held-out sequences, so the first ones are a fair
        sample. Every rank gets equally many batches of equal size; rows beyond the last sequence
        repeat it with a ``target_mask`` that is all False.

        Args:
            sequences: of one batch over all ranks.
            limit: sequences taken; 0 takes all.
            rank: this data rank.
            ranks: number of data ranks.
        """
        total = min(limit or self.validation_sequences, self.validation_sequences)
        sources, spans = self._validation_order()
        own = _share(sequences, rank, ranks)
        for first in range(0, total, sequences):
            index = first + np.arange(sequences)
            real = torch.from_numpy(index[own] < total)
            repeats = first + sequences > total
            index = np.minimum(index, total - 1)
            batch = self._rows(self._validation, sources[index], spans[index], own, self._length)
            if repeats:
                mask = torch.ones(len(real), self._length, dtype=torch.bool)
                mask = mask if batch.target_mask is None else batch.target_mask
                batch = Batch(batch.tokens, mask & real[:, None], batch.document_starts)
            yield batch

    def _first(self, position: int) -> int:
        """The place in the endless order at which a position lies."""
        first, misfit = divmod(position, self._length)
        if misfit:
            raise UserError(
                f"position {position} is no multiple of the sequence length {self._length}",
                where="data.sequence_length",
                fix="resume with the sequence length that the run began with",
            )
        return first

    def _order(
        self, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Source, epoch and span at places of the endless order, three arrays (count,)."""
        blocks = range(first // ORDER_BLOCK, (first + count - 1) // ORDER_BLOCK + 1)
        found = np.concatenate([self._order_block(block) for block in blocks], axis=1)
        start = first - blocks[0] * ORDER_BLOCK
        sources, epochs, spans = found[:, start : start + count]
        return sources, epochs, spans

    def _make_order(self, block: int) -> NDArray[np.int64]:
        """Source, epoch and span at the places of a block, (3, ORDER_BLOCK)."""
        first = block * ORDER_BLOCK
        sources, positions = self._slots.deal(np.arange(first, first + ORDER_BLOCK))
        counts = np.array([spans.count for spans in self._training])[sources]
        epochs, inside = np.divmod(positions, counts)
        spans = np.empty_like(inside)
        for source in np.unique(sources).tolist():
            there, count = sources == source, self._training[source].count
            spans[there] = permute(inside[there], count, seed=self._seed, epoch=epochs[there])
        return np.stack([sources, epochs, spans])

    def _validation_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and span of every held-out sequence, two arrays (validation_sequences,)."""
        counts = [spans.count for spans in self._validation]
        sources = np.repeat(np.arange(len(counts)), counts)
        spans = np.concatenate([np.arange(count) for count in counts])
        turn = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        order = np.argsort(turn, kind="stable")
        return sources[order], spans[order]

    def _rows(
        self,
        parts: Sequence[Spans],
        sources: NDArray[np.int64],
        spans: NDArray[np.int64],
        own: slice,
        length: int,
    ) -> Batch:
        """A rank's rows of a global batch.

        Args:
            parts: the spans of each source.
            sources: (sequences,), of the whole batch, because all ranks must agree about masks.
            spans: (sequences,).
            own: the rank's.
            length: of a row.
        """
        last = np.array([part.count - 1 if part.padding else -1 for part in parts])
        masked = self._masks or bool((spans == last[sources]).any())
        sources, spans = sources[own], spans[own]
        shape = (len(spans), self._length + 1)
        tokens, real = np.empty(shape, np.int64), np.empty(len(spans), np.int64)
        mask = np.ones(shape, np.bool_) if masked else None
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source).tolist()
            masks = None if mask is None else [mask[row] for row in rows]
            real[rows] = parts[source].read([tokens[row] for row in rows], masks, spans[rows])
        starts = None
        if self._tell_starts:
            whole = documents.document_starts(tokens, real, self.corpus.eos_id)
            starts = torch.from_numpy(documents.cut(whole, length))
        target_mask = None if mask is None else _cut(mask, length)[:, 1:]
        return Batch(_cut(tokens, length), target_mask, starts)

    def _split(self, source: TokenShards, fraction: float | None) -> tuple[Spans, Spans]:
        """The training and the held-out spans of a source."""
        if source.held_out.tokens or source.held_out_share:
            if fraction:
                raise UserError(
                    f"{fraction} would hold out training documents of data that was prepared with "
                    f"held-out ones",
                    where=f"data.validation_fraction: {source.place}",
                    fix="take it out, or set it to 0",
                )
            training, held_out = source.training, source.held_out
            parts = (training, 0, training.tokens), (held_out, 0, held_out.tokens)
        else:
            stream = source.training
            fraction = VALIDATION_FRACTION if fraction is None else fraction
            kept = stream.tokens - round(stream.tokens * fraction)
            parts = (stream, 0, kept), (stream, kept, stream.tokens)
            self._check_held_out(source, fraction)
        made = [Spans(*part, self._length, source.eos_id) for part in parts]
        self._check_training(source, made[0])
        return made[0], made[1]

    def _check_training(self, source: TokenShards, spans: Spans) -> None:
        held_out = spans.stream.tokens - spans.stop
        if spans.stop <= self._length:
            raise UserError(
                f"the data holds no sequence of {self._length} tokens: it has "
                f"{spans.stream.tokens} to train on"
                + f", of which {held_out} are held out"
                * bool(held_out),
                where=f"data.sequence_length; {source.place}",
                fix="use shorter sequences, "
                + "hold out less, " * bool(held_out)
                + "or prepare more data",
            )

    def _check_held_out(self, source: TokenShards, fraction: float) -> None:
        tokens = source.training.tokens
        held_out = round(tokens * fraction)
        if fraction and held_out <= self._length:
            raise UserError(
                f"a validation_fraction of {fraction} holds out {held_out} tokens, no "
                f"sequence of {self._length}",
                where=f"data.validation_fraction; {source.place}",
                fix=self._other_fraction(tokens),
            )

    def _other_fraction(self, tokens: int) -> str:
        """The smallest fraction that holds out a sequence and leaves one, in few digits."""
        least = Fraction(self._length + 1, tokens)
        for digits in range(4, 16):
            fraction = math.ceil(least * 10**digits) / 10**digits
            if self._length < round(tokens * fraction) < tokens - self._length:
                return f"use {fraction:.{digits}f}, or 0"
        return "use 0, shorter sequences, or more data"


def open_loader(
    data: DataSection, *, document_starts: bool = False, sizes: bool = True
) -> SequenceLoader:
    """Open the data that a configuration names.

    Args:
        data: of the configuration.
        document_starts: whether batches tell them.
        sizes: see ``TokenShards.open``.

    Raises:
        UserError: see ``TokenShards.open``, ``Corpus`` and ``SequenceLoader``.
    """
    corpus = Corpus.open(
        data.parts,
        check=data.check,
        sizes=sizes,
        cache=data.cache,
        cache_bytes=data.cache_bytes,
    )
    return SequenceLoader(
        corpus,
        sequence_length=data.sequence_length,
        seed=data.seed,
        validation_fraction=data.validation_fraction,
        length_schedule=data.length_schedule,
        document_starts=document_starts,
    )


def _cut(spans: NDArray[np.generic], length: int) -> torch.Tensor:
    """Spans (n, sequence_length + 1) as rows (n * pieces, length + 1) that share borders."""
    return torch.from_numpy(spans).unfold(1, length + 1, length).reshape(-1, length + 1)


def _share(sequences: int, rank: int, ranks: int) -> slice:
    """The places within a global batch that a rank takes, sequences / ranks of them."""
    if sequences % ranks:
        raise UserError(
            f"{sequences} sequences do not divide over {ranks} data ranks",
            where="train.global_batch_size",
            fix=f"use a multiple of {ranks}",
        )
    each = sequences // ranks
    return slice(rank * each, (rank + 1) * each)
