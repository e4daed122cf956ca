"""One needle in a haystack, by the rules of RULER's ``niah_single`` sets. No torch here.

A prompt tells that something is hidden in the text that follows, holds the haystack with one
needle in it, asks for the needle's value by its key, and begins the answer.
"""

import hashlib
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate import needle_words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {values} for {key} is: {value}."
BEGINNING = " The special magic {value} for {key} mentioned in the provided text is"
TEMPLATE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n{context}\n"
    "What is the special magic {value} for {key} mentioned in the provided text?" + BEGINNING
)
BARE = "{context}\n" + BEGINNING
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+")

Side = Literal["evaluation", "training"]


@dataclass(frozen=True)
class Kind:
    """A set of samples.

    Attributes:
        haystack: ``noise``, one line again and again, or ``essay``, a text of the user's.
        values: ``numbers``, ``uuids`` or ``words``.
        ruler: RULER's name of the set, "" where it has none.
    """

    haystack: Literal["noise", "essay"]
    values: Literal["numbers", "uuids", "words"]
    ruler: str


KINDS = {
    "niah_pk": Kind("noise", "numbers", "niah_single_1"),
    "niah_number": Kind("essay", "numbers", "niah_single_2"),
    "niah_uuid": Kind("essay", "uuids", "niah_single_3"),
    "niah_words": Kind("essay", "words", ""),
}


@dataclass(frozen=True)
class Needle:
    """What is hidden, and where.

    Attributes:
        key, value: of the needle.
        place: fraction of the haystack that comes before it.
    """

    key: str
    value: str
    place: float


class Haystack:
    """Text to hide a needle in, of any size.

    Args:
        kind: of the samples.
        essay: words of the essays, empty for noise.
        template: what a prompt says around the haystack.
    """

    def __init__(self, kind: Kind, essay: Sequence[str] = (), template: str = TEMPLATE) -> None:
        self.kind = kind
        self.template = template
        self.in_lines = kind.haystack == "noise" and template == TEMPLATE
        self._essay = essay
        self._size, self._parts = -1, [""]

    def parts(self, size: int) -> list[str]:
        """``size`` lines of noise (words of it if bare), or sentences of so many words of essay."""
        if self.in_lines:
            return [NOISE] * size
        if self.kind.haystack == "noise":
            words = NOISE.split()
            return (words * -(-size // len(words)))[:size]
        if size != self._size:
            words = list(self._essay) * -(-size // len(self._essay))
            self._size, self._parts = size, SENTENCE_END.split(" ".join(words[:size]).strip())
        return self._parts

    def around(self, size: int, needle: Needle, more: str = "") -> str:
        """The haystack of this size with the needle in it, and ``more`` after it."""
        parts = self.parts(size)
        sentence = NEEDLE.format(values=self.kind.values, key=needle.key, value=needle.value)
        at = int(len(parts) * needle.place)
        separator = "\n" if self.in_lines else " "
        return separator.join([*parts[:at], sentence, *parts[at:]]) + more


def draw(rng: random.Random, kind: Kind, side: Side) -> Needle:
    """Choose a key, a value and a place.

    Args:
        rng: its state decides.
        kind: of the sample.
        side: keys and values of ``training`` never occur in ``evaluation``.
    """
    key = _on_side(rng, side, "words")
    value = _on_side(rng, side, kind.values)
    place = rng.choice(DEPTHS) / 100 if kind.haystack == "essay" else rng.random()
    return Needle(key, value, place)


def prompt(haystack: Haystack, size: int, needle: Needle, more: str = "") -> str:
    """The text up to where the answer begins, which is `` `` and the value."""
    return haystack.template.format(
        value=haystack.kind.values.removesuffix("s"),
        key=needle.key,
        context=haystack.around(size, needle, more),
    )


def haystack(kind: str, essays: Sequence[Path], template: str = TEMPLATE) -> Haystack:
    """The haystack of a kind.

    Args:
        kind: one of ``KINDS``.
        essays: UTF-8 text files, read in this order; only for kinds that hide needles in essays.
        template: ``TEMPLATE``, which is RULER's, or ``BARE``.

    Raises:
        Misfit: essays are missing, not wanted, or hold no words.
        UserError: one cannot be read.
    """
    chosen = KINDS[kind]
    if chosen.haystack == "noise":
        if essays:
            raise Misfit(f"{kind} reads no essays", where="--essays", fix="leave it out")
        return Haystack(chosen, template=template)
    if not essays:
        raise Misfit(f"{kind} hides needles in essays", where="--essays", fix="name text files")
    words = [word for path in essays for word in _read(path).split()]
    if not words:
        raise Misfit("no words", where=f"--essays {essays[0]}", fix="give files with text")
    return Haystack(chosen, words, template)


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest size that fits, 0 for none, looked for near ``start``.

    Args:
        fits: whether a size from 1 on fits; none does above one that does not.
        start: at least 1.
    """
    low, high, step = 0, start, 1
    while fits(high):
        low, high, step = high, high + step, 2 * step
    if not low:
        low, step = high - 1, 1
        while low > 0 and not fits(low):
            low, high, step = max(0, low - step), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the essay: {error}", where=f"--essays {path}", fix="give a UTF-8 text"
        ) from None


def side(text: str) -> Side:
    """Which side a key or a value belongs to: a function of its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"needle side").digest()
    return "training" if digest[0] % 2 else "evaluation"


def _on_side(rng: random.Random, wanted: Side, values: str) -> str:
    while True:
        text = _value(rng, values)
        if side(text) == wanted:
            return text


def _value(rng: random.Random, values: str) -> str:
    if values == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if values == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(needle_words.PAIRS)
