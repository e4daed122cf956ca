"""Loss against position: whether a model still gains from what it read long before."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from titans_pretrain.errors import Misfit, TitansError
from titans_pretrain.evaluate.babilong import length as token_count
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.position_text import HeldOut, Source, TextFiles
from titans_pretrain.evaluate.progress import Progress
from titans_pretrain.evaluate.tasks import Options
from titans_pretrain.inference.prefill import PIECE
from titans_pretrain.inference.prompts import check_positions

NAME = "position"
DEFINITION = 1  # of what the numbers mean; another one makes earlier results others
LENGTHS = ("131072",)
SAMPLES = 10
_LARGEST_EXPONENT = 700.0  # of which a float holds the power


class PositionTask:
    """Loss at every position of long documents, in buckets that double.

    Args:
        source: of the documents.
        options: ``lengths`` (131072 tokens) and ``samples`` (10).

    Raises:
        UserError: an unknown length.
    """

    name = NAME

    def __init__(self, source: Source, options: Options) -> None:
        self._source = source
        self._samples = SAMPLES if options.samples is None else options.samples
        self._lengths = {text: token_count(text) for text in options.lengths or LENGTHS}
        if 0 in self._lengths.values():
            raise Misfit("a length of no tokens", where="--lengths", fix="use 1 or more")

    def identity(self) -> dict[str, Any]:
        """Everything but model and length that decides the result."""
        return {**self._source.identity(), "samples": self._samples, "definition": DEFINITION}

    def cells(self) -> list[str]:
        """The lengths, as written."""
        return list(self._lengths)

    def check(self, longest: int | None) -> None:
        """Refuse lengths that a model of so many positions does not hold."""
        for length in self._lengths.values():
            check_positions("--lengths", length, longest)

    def run(self, model: Loaded, cell: str, tell: Callable[[str], None]) -> dict[str, Any]:
        """Losses at a length, nats per token.

        Returns:
            ``loss``, ``perplexity``, ``tokens``, ``samples``, ``length``, ``joined`` (samples that
            are several documents, one after the other), and ``curve``: for the targets from
            position ``from`` to before ``to`` the mean ``loss`` over documents, its standard error
            ``stderr`` (None of one document), ``perplexity`` and ``documents``.

        Raises:
            UserError: longer than the model's positions allow, or no document of that length.
            TitansError: a loss that is not finite.
        """
        length = self._lengths[cell]
        check_positions("--lengths", length, model.longest)
        progress = Progress("tokens", self._samples * length, tell)
        curve, joined, done = _Curve(length), 0, 0
        for document in self._source.documents(model, length, self._samples):
            curve.begin()
            joined += document.joined
            for first, losses in token_losses(model.network, document.tokens, PIECE):
                last = first + len(losses)
                counts = None if document.counts is None else document.counts[first:last]
                curve.add(first, losses, counts)
                progress.show(done + last)
            done += length
        if done < self._samples * length:
            tell(f"{NAME} {cell}: {done // length} documents, not {self._samples}")
        return {**curve.result(), "samples": done // length, "length": length, "joined": joined}


def open_tasks(names: Sequence[str], options: Options) -> list[PositionTask]:
    """The task, its data at hand.

    Args:
        names: ``position``.
        options: ``text`` or ``data``.

    Raises:
        UserError: neither or both, or data that cannot be read.
    """
    if options.text and options.data is not None:
        raise Misfit(
            "the documents are given twice, as text and as prepared data",
            where="--data",
            fix="leave out one of --text and --data",
        )
    if options.text:
        return [PositionTask(TextFiles(options.text), options) for _ in names]
    if options.data is None:
        raise Misfit(
            "no long documents",
            where="--tasks position",
            fix="name text files with --text, or prepared data with --data",
        )
    return [PositionTask(HeldOut(options.data), options) for _ in names]


def buckets(length: int) -> list[int]:
    """Borders of the buckets of positions: 0, 1, 2, 4, 8, … and the length."""
    borders = [0, 1]
    while borders[-1] < length:
        borders.append(min(2 * borders[-1], length))
    return borders


def token_losses(network: Any, tokens: Any, piece: int) -> Iterator[tuple[int, Any]]:
    """Cross-entropy of every next token, in nats, a piece of the text at a time.

    What was read before a piece is in the network's cache, so the memory use of a Titans model or a
    baseline of ours does not depend on the length. A network that keeps no cache to go on from
    reads all at once.

    Args:
        network: a causal language model, evaluating.
        tokens: (T + 1,) int64; each but the last is read, each but the first a target.
        piece: tokens read at once.

    Yields:
        The position of the first target, and losses (piece,), float32 on the host.
    """
    import torch
    from torch.nn import functional

    from titans_pretrain.model.layers import full_precision

    inputs, targets = tokens[None, :-1], tokens[1:]
    cache, first = None, 0
    while first < len(targets):
        part = slice(first, first + piece)
        with torch.inference_mode():
            known: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            out = network(inputs[:, part].to(network.device), use_cache=True, **known)
            cache = getattr(out, "past_key_values", None)
            if cache is None and first + piece < len(targets):
                piece = len(targets)
                continue
            aims = targets[part].to(network.device)
            losses = functional.cross_entropy(full_precision(out.logits[0]), aims, reduction="none")
        yield first, losses.float().cpu()
        first += piece


class _Curve:
    """Sums of losses by bucket, one row a document."""

    def __init__(self, length: int) -> None:
        self._borders = buckets(length)
        self._sums: list[Any] = []
        self._counts: list[Any] = []

    def begin(self) -> None:
        """A document begins."""
        import torch

        self._sums.append(torch.zeros(len(self._borders) - 1, dtype=torch.float64))
        self._counts.append(torch.zeros(len(self._borders) - 1, dtype=torch.int64))

    def add(self, first: int, losses: Any, counts: Any) -> None:
        """Losses of the targets from a position on; ``counts`` tells which count, None all."""
        import torch

        if not torch.isfinite(losses).all():
            raise TitansError(
                f"a loss between positions {first} and {first + len(losses)} is not finite",
                where="the model's logits",
                fix="export another checkpoint; in bfloat16, try float32",
            )
        places = torch.arange(first, first + len(losses))
        bucket = torch.bucketize(places, torch.tensor(self._borders[1:]), right=True)
        counted = torch.ones_like(places) if counts is None else counts.long()
        self._sums[-1].index_add_(0, bucket, losses.double() * counted)
        self._counts[-1].index_add_(0, bucket, counted)

    def result(self) -> dict[str, Any]:
        """``loss``, ``perplexity``, ``tokens`` and ``curve``."""
        import torch

        sums, counts = torch.stack(self._sums), torch.stack(self._counts)
        rows = []
        for bucket, (low, high) in enumerate(zip(self._borders, self._borders[1:], strict=False)):
            there = counts[:, bucket] > 0
            if not there.any():
                continue
            means = sums[there, bucket] / counts[there, bucket]
            documents = len(means)
            loss = means.mean().item()
            error = means.std().item() / math.sqrt(documents) if documents > 1 else None
            rows.append(
                {
                    "from": low,
                    "to": high,
                    "loss": loss,
                    "stderr": error,
                    "perplexity": _perplexity(loss),
                    "documents": documents,
                }
            )
        if not rows:
            raise Misfit("no target counts: all are masked", where="--data", fix="give other data")
        loss = sums.sum().item() / int(counts.sum())
        whole = {"loss": loss, "perplexity": _perplexity(loss), "tokens": int(counts.sum())}
        return {**whole, "curve": rows}


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < _LARGEST_EXPONENT else None
