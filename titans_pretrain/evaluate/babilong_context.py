"""Facts between the sentences of other text, by the rules of BABILong. No torch here."""

import codecs
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate.text_tokens import TextTokens

SENTENCE_TOKENS = 10
READ_BYTES = 10  # for each token wanted
_LEAST_BYTES = 4096
_BLOCK_BYTES = 2**20
_AT_ONCE = 64  # sentences tokenized together
_VAIN_READS = 1000
_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+")


@dataclass(frozen=True)
class Hidden:
    """Facts in their background.

    Attributes:
        context: the text.
        tokens: of all facts and sentences.
        positions: for each fact, the sentence it stands before; the number of sentences for one
            after the last.
        background: the sentences.
    """

    context: str
    tokens: int
    positions: tuple[int, ...]
    background: tuple[str, ...]


class Background:
    """Sentences of text files, from random places.

    Args:
        paths: UTF-8 text files of any size.

    Attributes:
        hashes: the sha256 of each file.

    Raises:
        UserError: none, or one that cannot be read, is empty or is not UTF-8.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise Misfit("no background text", where="--background", fix="name text files")
        self._paths = paths
        self.hashes = [_check(path) for path in paths]
        self._sizes = [path.stat().st_size for path in paths]

    def sentences(self, size: int, tokens: TextTokens, dice: random.Random) -> list[str]:
        """Sentences of ``size`` tokens together; the last one is cut.

        From a random place of a random file on, whole sentences of at least 10 tokens are taken in
        order, then from another place.

        Raises:
            UserError: the files hold no sentence of 10 tokens.
        """
        taken: list[str] = []
        left, vain = size, 0
        while left > 0:
            before = left
            for text, ids in _tokenized(self._read(left, dice), tokens):
                if len(ids) < SENTENCE_TOKENS:
                    continue
                taken.append(text if len(ids) <= left else tokens.text(ids[:left]))
                left -= len(ids)
                if left <= 0:
                    break
            vain = vain + 1 if left == before else 0
            if vain == _VAIN_READS:
                raise UserError(
                    f"{vain} places of the background hold no sentence of {SENTENCE_TOKENS} tokens",
                    where=f"--background {self._paths[0]}",
                    fix="give prose: sentences that end with . ! or ?",
                )
        return taken

    def _read(self, size: int, dice: random.Random) -> Iterator[str]:
        """The whole sentences of a piece of a file that holds about twice ``size`` tokens."""
        number = dice.randrange(len(self._paths))
        place = dice.randrange(self._sizes[number])
        size = max(READ_BYTES * size, _LEAST_BYTES)
        return _inner_sentences(_text(self._paths[number], place, size))


def hide(
    facts: Sequence[str], size: int, background: Background, tokens: TextTokens, dice: random.Random
) -> Hidden:
    """Put facts, in their order, at random places between sentences.

    Args:
        facts: sentences.
        size: tokens of facts and background together; facts that are longer stand alone.
        background: what is between them.
        tokens: counts them.
        dice: its state decides.
    """
    own = sum(map(len, tokens.ids(facts)))
    sentences = background.sentences(size - own, tokens, dice)
    places = range(len(sentences) + 1)
    positions = tuple(sorted(dice.choice(places) for _ in facts))
    return Hidden(
        context=" ".join(woven(facts, positions, sentences)),
        tokens=max(own, size),
        positions=positions,
        background=tuple(sentences),
    )


def woven(facts: Sequence[str], positions: Sequence[int], sentences: Sequence[str]) -> list[str]:
    """Facts and sentences in the order of the text."""
    parts, told = [], 0
    for place in range(len(sentences) + 1):
        while told < len(facts) and positions[told] == place:
            parts.append(facts[told])
            told += 1
        parts += sentences[place : place + 1]
    return parts


def _inner_sentences(blocks: Iterator[str]) -> Iterator[str]:
    """The sentences of a text but the first and the last, of which only parts may be there.

    One ends with . ! or ? and the quotes or brackets that close after it, before white space.
    """
    text, begun = "", False
    for block in blocks:
        text, start = text + block, 0
        for match in _END.finditer(text):
            end = match.end()
            if end == len(text):  # the next block may go on with white space
                break
            if begun:
                yield text[start:end].rstrip()
            start, begun = end, True
        text = text[start:]


def _text(path: Path, place: int, size: int) -> Iterator[str]:
    """The bytes of a file from a place on as text, without what is cut at the ends."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    with open(path, "rb") as handle:
        handle.seek(place)
        while size and (block := handle.read(min(size, _BLOCK_BYTES))):
            size -= len(block)
            yield decoder.decode(block)


def _tokenized(sentences: Iterator[str], tokens: TextTokens) -> Iterator[tuple[str, list[int]]]:
    group: list[str] = []
    for sentence in sentences:
        group.append(sentence)
        if len(group) == _AT_ONCE:
            yield from zip(group, tokens.ids(group), strict=True)
            group = []
    yield from zip(group, tokens.ids(group), strict=True)


def _check(path: Path) -> str:
    """The sha256 of a file of UTF-8 text."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    empty = True
    try:
        with open(path, "rb") as handle:
            while block := handle.read(_BLOCK_BYTES):
                digest.update(block)
                empty = empty and not decoder.decode(block).strip()
            decoder.decode(b"", final=True)
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _unusable(path, "it is not UTF-8 text") from None
    if empty:
        raise _unusable(path, "it is empty")
    return digest.hexdigest()


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(reason, where=f"--background {path}", fix="give text files, such as books")
