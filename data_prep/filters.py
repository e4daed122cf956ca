"""Which documents are kept, and which of them are held out."""

import hashlib

from data_prep.rows import Row
from data_prep.settings import Settings

VERDICTS = ("kept", "empty", "score", "language", "short", "long", "bad")


def verdict(row: Row, settings: Settings) -> str:
    """``kept``, or the first reason that drops the document.

    ``bad``: it cannot be read; ``empty``: only white space; ``score``: below ``min_score`` or
    none; ``language``: another one; ``short`` and ``long``: fewer or more characters of text than
    ``min_characters`` and ``max_characters``.
    """
    text = row.text
    if row.problem:
        return row.problem
    if not text or text.isspace():
        return "empty"
    if settings.min_score is not None and not _at_least(row.score, settings.min_score):
        return "score"
    if settings.language is not None and row.language != settings.language:
        return "language"
    if settings.min_characters is not None and len(text) < settings.min_characters:
        return "short"
    if settings.max_characters is not None and len(text) > settings.max_characters:
        return "long"
    return "kept"


def is_held_out(text: str, share: float, prompt: str = "") -> bool:
    """Whether a document belongs to the held-out split: a function of its prompt and text alone.

    Equal documents fall on the same side in every preparation, and a larger share holds out what
    a smaller one does.

    Args:
        text: the document's.
        share: of all documents, 0 to 1.
        prompt: the document's, empty where it has none.
    """
    if not share:
        return False
    return int.from_bytes(digest(text, prompt, b"held-out", 8), "big") < share * 2**64


def digest(text: str, prompt: str, use: bytes, size: int) -> bytes:
    """The blake2b of a document's text, or of prompt and text where there is a prompt.

    Args:
        text: the document's.
        prompt: the document's, empty where it has none.
        use: up to 9 bytes that give each use its own hashes.
        size: of the digest, bytes.
    """
    if not prompt:
        return hashlib.blake2b(text.encode(), digest_size=size, person=use).digest()
    before = prompt.encode()
    content = len(before).to_bytes(8, "little") + before + text.encode()
    return hashlib.blake2b(content, digest_size=size, person=use + b" prompt").digest()


def _at_least(score: float | None, bound: float) -> bool:
    return score is not None and score >= bound  # NaN is not
