"""Several prepared data sets read as one, each at its weight."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import digest
from titans_pretrain.data.order import permute
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import UserError

SLOTS = 1000


class Slots:
    """Deals the places of an endless order to sources.

    The order consists of periods of at most 1000 slots, of which every source has its share,
    scattered anew in every period.

    Args:
        counts: slots of each source in a period.
        seed: of the order.
    """

    def __init__(self, counts: Sequence[int], *, seed: int) -> None:
        self._counts, self._seed = np.array(counts, np.int64), seed
        self._period = sum(counts)
        self._until = np.cumsum(self._counts)

    def share(self, source: int) -> Fraction:
        """The part of all places that a source has."""
        return Fraction(int(self._counts[source]), self._period)

    def deal(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place, and its position in that source's own endless order.

        Every position of every source belongs to exactly one place.

        Args:
            places: (n,).

        Returns:
            Two arrays (n,).
        """
        if len(self._counts) == 1:
            return np.zeros_like(places), places
        period, slot = np.divmod(places, self._period)
        dealt = permute(slot, self._period, seed=self._seed, epoch=period)
        source = np.searchsorted(self._until, dealt, side="right")
        counts = self._counts[source]
        return source, period * counts + dealt - (self._until[source] - counts)


def slot_counts(weights: Sequence[float]) -> list[int]:
    """Slots of each source in the shortest exact period, or in one of 1000.

    Args:
        weights: above 0, shares up to a factor.

    Raises:
        UserError: a source too light for a single slot.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    exact_period = math.lcm(*(share.denominator for share in shares))
    period = min(exact_period, SLOTS)
    counts = [int(share * period) for share in shares]
    rests = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i] * period, i))
    for source in rests[: period - sum(counts)]:
        counts[source] += 1
    for source, count in enumerate(counts):
        if not count:
            raise UserError(
                f"weight {weights[source]} is {float(shares[source]):.2g} of all: less than one "
                f"sequence in {SLOTS}",
                where=f"data.mixture.{source}.weight",
                fix="give it more weight, or leave it out",
            )
    return counts


class Corpus:
    """What a run reads: one prepared data set, or several with weights.

    Args:
        sources: the data sets.
        weights: their shares of the sequences, up to a factor; exact where multiples of 1/1000.

    Attributes:
        sources: the data sets.
        counts: of ``Slots``.
        fingerprint: names the content; of several, of the parts and their weights.
        vocab_size: ids are below it.
        eos_id: ends every document.
        tokenizer: the model's path.

    Raises:
        UserError: sources that were prepared with different tokenizers, BOS or held-out shares, one
            given twice, or one too light.
    """

    def __init__(self, sources: Sequence[TokenShards], weights: Sequence[float] = (1.0,)) -> None:
        self.sources, first = sources, sources[0]
        self._check_alike()
        self.counts = slot_counts(weights)
        self.vocab_size, self.eos_id = first.vocab_size, first.eos_id
        self.tokenizer = first.tokenizer
        parts = [[s.fingerprint, n] for s, n in zip(sources, self.counts, strict=True)]
        self.fingerprint = first.fingerprint if len(parts) == 1 else digest(parts)

    @classmethod
    def open(
        cls,
        parts: Sequence[tuple[str, float]],
        *,
        check: bool = True,
        sizes: bool = True,
        cache: str | None = None,
        cache_bytes: int = 2**36,
    ) -> Self:
        """Open the manifests of (manifest, weight) pairs; see ``TokenShards.open``."""
        opened = [
            TokenShards.open(path, check=check, sizes=sizes, cache=cache, cache_bytes=cache_bytes)
            for path, _ in parts
        ]
        return cls(opened, [weight for _, weight in parts])

    def _check_alike(self) -> None:
        first = self.sources[0]
        seen: dict[str, int] = {}
        for number, source in enumerate(self.sources):
            where = f"data.mixture.{number}.manifest: {source.place}"
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"its tokenizer has sha256 {source.tokenizer_sha256[:12]}…, that of "
                    f"{first.place} {first.tokenizer_sha256[:12]}…",
                    where=where,
                    fix="prepare all data of a mixture with one tokenizer",
                )
            if source.bos != first.bos:
                raise UserError(
                    f"BOS begins {'every' if source.bos else 'no'} document of it, and "
                    f"{'every' if first.bos else 'none'} of {first.place}",
                    where=where,
                    fix="prepare all data of a mixture with --bos, or none",
                )
            if source.held_out_share != first.held_out_share:
                raise UserError(
                    f"a share of {source.held_out_share} of it is held out, of {first.place} "
                    f"{first.held_out_share}: what one holds out the other may train on",
                    where=where,
                    fix="prepare all data of a mixture with the same --held-out",
                )
            if source.fingerprint in seen:
                raise UserError(
                    f"the same data as data.mixture.{seen[source.fingerprint]}",
                    where=where,
                    fix="give it once, with the sum of the weights",
                )
            seen[source.fingerprint] = number
