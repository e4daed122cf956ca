"""A needle in a haystack: is a value that was told once, somewhere in a long text, recalled?

Prompts, sizes and scoring are those of RULER's ``niah_single`` sets (arXiv 2404.06654); keys and
values are never those of the training samples that ``titans data needle`` makes.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

from titans_pretrain.errors import Misfit
from titans_pretrain.evaluate import needle_text, needle_words
from titans_pretrain.evaluate.answering import greedy
from titans_pretrain.evaluate.babilong import length
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.needle_text import KINDS, largest
from titans_pretrain.evaluate.progress import Progress
from titans_pretrain.evaluate.tasks import Options
from titans_pretrain.evaluate.text_tokens import whole_ids
from titans_pretrain.files import sha256_file
from titans_pretrain.inference.prompts import check_positions

LENGTHS = ("2048", "4096", "8192", "16384")
SAMPLES = 500
NEW_TOKENS = 128
DEFINITION = 1  # of prompts, places and scoring; another one makes earlier results others


class NeedleTask:
    """One kind of haystack and value at several lengths.

    Args:
        name: one of ``needle_text.KINDS``.
        options: ``essays`` are needed by all kinds but ``niah_pk``.

    Raises:
        UserError: essays that are missing or cannot be read, or an unknown length.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self._options, self._kind = options, KINDS[name]
        self._lengths = {text: length(text) for text in options.lengths or LENGTHS}
        self._essays = options.essays if self._kind.haystack == "essay" else ()
        self._haystack = needle_text.haystack(name, self._essays)

    def identity(self) -> dict[str, Any]:
        """Everything but model and length that decides the result."""
        return {
            "haystack": self._kind.haystack,
            "values": self._kind.values,
            "key_words": needle_words.fingerprint(),
            "essays": self._essay_hashes,
            "samples": self._samples,
            "seed": self._options.seed,
            "max_new_tokens": NEW_TOKENS,
            "definition": DEFINITION,
        }

    def cells(self) -> list[str]:
        """The lengths, as written."""
        return list(self._lengths)

    def check(self, longest: int | None) -> None:
        """Refuse lengths, which include the answer's, beyond the model's positions."""
        for tokens in self._lengths.values():
            check_positions("--lengths", tokens, longest)

    def fit(self, model: Loaded, cell: str) -> None:
        """Refuse a length that holds no haystack."""
        next(self._prompts(cell, lambda text: len(whole_ids(model.tokenizer, text))))

    def run(self, model: Loaded, cell: str, tell: Callable[[str], None]) -> dict[str, Any]:
        """Share of answers that hold the value, in any case of letters, at a length.

        Returns:
            ``accuracy``, its standard error, ``samples``, and the mean ``context_tokens``.
        """
        progress = Progress("needles", self._samples, tell)
        prompts = self._prompts(cell, lambda text: len(whole_ids(model.tokenizer, text)))
        found, read, batch = 0, 0, self._options.batch
        for first in range(0, self._samples, batch):
            some = list(islice(prompts, batch))
            texts = [one.text for one in some]
            outputs = greedy(model, texts, max_new_tokens=NEW_TOKENS, batch=batch)
            for one, output in zip(some, outputs, strict=True):
                found += one.value.lower() in output.lower()
                read += one.tokens
            progress.show(first + len(some))
        accuracy = found / self._samples
        return {
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / self._samples),
            "samples": self._samples,
            "context_tokens": round(read / self._samples),
        }

    @property
    def _samples(self) -> int:
        return self._options.samples or SAMPLES

    @cached_property
    def _essay_hashes(self) -> list[str]:
        return [sha256_file(path) for path in self._essays]

    def _prompts(self, cell: str, count: Callable[[str], int]) -> Iterator["_Prompt"]:
        """Prompts that, with room for the answer, fill the length."""
        room = self._lengths[cell] - NEW_TOKENS
        size = 0
        for index in range(self._samples):
            rng = random.Random(f"{self._options.seed} {self.name} {cell} {index}")
            needle = needle_text.draw(rng, self._kind, "evaluation")
            make = partial(needle_text.prompt, self._haystack, needle=needle)
            if not index:
                size = largest(lambda size: count(make(size)) <= room, 1)  # noqa: B023
            while size and count(make(size)) > room:
                size -= 1
            if not size:
                raise Misfit(
                    f"{cell} tokens, of which {NEW_TOKENS} are for the answer, hold no haystack",
                    where="--lengths",
                    fix=f"use at least {count(make(1)) + NEW_TOKENS}",
                )
            text = make(size)
            yield _Prompt(text, needle.value, count(text))


@dataclass(frozen=True)
class _Prompt:
    """What a model reads, what its answer must hold, and the prompt's tokens."""

    text: str
    value: str
    tokens: int


def open_tasks(names: Sequence[str], options: Options) -> list[NeedleTask]:
    """The tasks of names such as ``niah_pk``, their data at hand.

    Raises:
        UserError: essays that are missing, cannot be read or are not wanted, or an unknown length.
    """
    if options.essays and all(KINDS[name].haystack == "noise" for name in names):
        raise Misfit(f"{', '.join(names)} reads no essays", where="--essays", fix="leave it out")
    return [NeedleTask(name, options) for name in names]
