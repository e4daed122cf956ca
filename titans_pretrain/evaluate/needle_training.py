"""Needle samples to train on: documents of an exact number of tokens. No torch here."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titans_pretrain import files
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import needle_text
from titans_pretrain.evaluate.needle_text import Haystack, Needle, largest
from titans_pretrain.evaluate.progress import Progress

if TYPE_CHECKING:
    from data_prep.tokenizer import Tokenizer

Count = Callable[[str, str], int]


@dataclass(frozen=True)
class Documents:
    """What is written.

    Attributes:
        length: tokens of a document, the EOS (and the BOS) included.
        samples: how many.
        bos: whether a BOS begins each, as ``titans data prepare --bos`` has it.
        seed: of keys, values and places.
    """

    length: int
    samples: int
    bos: bool = False
    seed: int = 0


def write(
    output: Path,
    tokenizer: "Tokenizer",
    haystack: Haystack,
    wanted: Documents,
    tell: Callable[[str], None],
) -> None:
    """Write samples as JSON lines of ``id``, ``prompt`` and ``answer``, one document each.

    ``titans data prepare --prompt-column prompt --text-column answer`` makes exactly ``length``
    tokens of each, of which the answer's and the EOS are targets.

    Args:
        output: file to write, whole or not at all.
        tokenizer: that will encode them.
        haystack: what hides the needles.
        wanted: which and how many.
        tell: takes lines about the progress.

    Raises:
        UserError: the length holds no haystack, or cannot be met exactly.
    """

    def count(prompt: str, answer: str) -> int:
        return len(tokenizer.encode_after(prompt, answer)[0]) + 1 + wanted.bos

    name = _name(haystack, str(wanted.length), wanted.seed)
    _save(output, _exact(haystack, count, wanted), name, wanted.samples, tell)


def write_sized(
    output: Path, haystack: Haystack, size: int, wanted: Documents, tell: Callable[[str], None]
) -> None:
    """Write samples with ``size`` lines or words of haystack each, whatever their tokens are."""
    sized = f"sized-{size}"
    drawn = (_draw(haystack, sized, wanted.seed, index) for index in range(wanted.samples))
    made = ((needle_text.prompt(haystack, size, needle), f" {needle.value}") for needle in drawn)
    _save(output, made, _name(haystack, sized, wanted.seed), wanted.samples, tell)


def _save(
    output: Path,
    made: Iterable[tuple[str, str]],
    name: str,
    samples: int,
    tell: Callable[[str], None],
) -> None:
    progress = Progress("documents", samples, tell)
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(output, "w") as lines:
        for number, (prompt, answer) in enumerate(made):
            row = {"id": f"needle-{name}-{number}", "prompt": prompt, "answer": answer}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.show(number + 1)


def _name(haystack: Haystack, size: str, seed: int) -> str:
    """Tells samples of a kind, a size and a seed from all others."""
    bare = "bare-" * (haystack.template == needle_text.BARE)
    return f"{bare}{haystack.kind.haystack}-{haystack.kind.values}-{size}-{seed}"


def _draw(haystack: Haystack, size: str, seed: int, index: int) -> Needle:
    dice = random.Random(f"training {_name(haystack, size, seed)} {index}")
    return needle_text.draw(dice, haystack.kind, "training")


def _exact(haystack: Haystack, count: Count, wanted: Documents) -> Iterator[tuple[str, str]]:
    """Prompts and answers of documents of exactly so many tokens."""
    length, size, words = wanted.length, 1, 1  # a document's sizes are near those of the last
    for index in range(wanted.samples):
        document = _Document(haystack, _draw(haystack, str(length), wanted.seed, index), count)
        size = largest(lambda size: document.tokens(size) <= length, max(1, size))  # noqa: B023
        if not size:
            raise UserError(
                f"{length} tokens hold no haystack",
                where="--length",
                fix=f"use about {document.tokens(1)} or more: needles differ in their tokens",
            )
        words = document.words_that_fit(size, length, words)
        ends = document.ends_that_fill(size, length, words)
        yield document.prompt(size, words, ends), document.answer


class _Document:
    """A sample that can be given any length: whole lines, then words of one, then line ends."""

    def __init__(self, haystack: Haystack, needle: Needle, count: Count) -> None:
        self.answer = f" {needle.value}"
        self._haystack, self._needle, self._count = haystack, needle, count
        self._line = needle_text.NOISE.split() if haystack.in_lines else []

    def prompt(self, size: int, words: int = 0, ends: int = 0) -> str:
        more = "\n" * bool(words) + " ".join(self._line[:words]) + "\n" * ends
        return needle_text.prompt(self._haystack, size, self._needle, more)

    def tokens(self, size: int, words: int = 0, ends: int = 0) -> int:
        return self._count(self.prompt(size, words, ends), self.answer)

    def words_that_fit(self, size: int, length: int, guess: int) -> int:
        def fits(words: int) -> bool:
            return words <= len(self._line) and self.tokens(size, words) <= length

        return largest(fits, max(1, guess))

    def ends_that_fill(self, size: int, length: int, words: int) -> int:
        missing = length - self.tokens(size, words)
        if missing and self.tokens(size, words, missing) != length:
            raise UserError(
                f"no document of exactly {length} tokens: the tokenizer joins line ends",
                where="--tokenizer",
                fix="use one of titans data tokenizer, in which each is a token",
            )
        return missing
