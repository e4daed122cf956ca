"""Targets of ``titans bench memory``, as ``--check`` takes them. No torch here.

``KIND=BOUND`` is judged at every length measured, ``KIND@LENGTH=BOUND`` at one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titans_pretrain.bench import figures
from titans_pretrain.bench.figures import Verdict
from titans_pretrain.errors import UserError

OURS, ATTENTION, THEIRS = "titans", "attention", "titans-pytorch"
KINDS = {
    "speed": f"tokens/s of {THEIRS}'s at least",
    "attention": f"tokens/s of {ATTENTION}'s at least",
    "memory": f"extra peak memory of {THEIRS}'s at most",
    "growth": "time a token of the first length's at most",
    "products": "the scan's share of the measured products at least",
}
AT_MOST = ("memory", "growth")
PEERS = {"speed": THEIRS, "memory": THEIRS, "attention": ATTENTION}


@dataclass(frozen=True)
class Target:
    """What must be shown: a kind out of ``KINDS``, at which length, and its bound."""

    kind: str
    length: int
    bound: float

    @property
    def needs_theirs(self) -> bool:
        """Whether titans-pytorch must be there."""
        return PEERS.get(self.kind) == THEIRS


def parse(
    given: Sequence[str], lengths: Sequence[int], peer_limit: int, peers: Sequence[str]
) -> list[Target]:
    """Targets as typed.

    Args:
        given: the texts.
        lengths: that are measured.
        peer_limit: longest that peers are measured at.
        peers: that are measured.

    Raises:
        UserError: no such kind, length or bound, or nothing that it could be judged by.
    """
    targets = []
    for text in given:
        kind, place, bound = figures.bound(text, KINDS)
        if place and place not in map(str, lengths):
            known = ", ".join(map(str, lengths))
            raise _error(f"{text!r}: {place!r} is not measured", f"give one of {known}")
        chosen = [length for length in lengths if place in ("", str(length))]
        if (peer := PEERS.get(kind)) and peer not in peers:
            raise _error(f"{text!r}: {peer} is not measured", f"add it to --peers: {peer}")
        if peer:
            chosen = [length for length in chosen if length <= peer_limit]
            if not chosen:
                raise _error(
                    f"{text!r}: no peer is measured beyond {peer_limit} tokens",
                    "raise --peer-limit, or measure shorter sequences",
                )
        if kind == "growth":
            chosen = [length for length in chosen if length != lengths[0]]
            if not chosen:
                raise _error(f"{text!r}: growth needs a second length", "give several --lengths")
        targets += [Target(kind, length, bound) for length in chosen]
    return targets


def judge(targets: Sequence[Target], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """What was found beside each target; a figure that is missing is a miss.

    Args:
        targets: of ``parse``.
        rows: of the table.
    """
    verdicts = []
    for target in targets:
        at = {row["layer"]: row for row in rows if row["tokens"] == target.length}
        found = _found(target.kind, at)
        met = found <= target.bound if target.kind in AT_MOST else found >= target.bound
        told = f"{target.length:,} tokens: {KINDS[target.kind]}"
        verdicts.append(Verdict(told, target.bound, None if math.isnan(found) else found, met))
    return verdicts


def _found(kind: str, at: Mapping[str, Mapping[str, Any]]) -> float:
    """The figure of a target; NaN, which meets none, where it is missing."""
    ours = at[OURS]
    if kind in ("speed", "attention"):
        spread = ours["ratios"].get(PEERS[kind])
        return math.nan if spread is None else float(spread.median)
    if kind == "memory":
        theirs = at.get(THEIRS, {}).get("peak_bytes")
        return math.nan if not theirs else ours["peak_bytes"] / theirs
    return float(ours[kind].median)


def _error(what: str, fix: str) -> UserError:
    return UserError(what, where="--check", fix=fix)
