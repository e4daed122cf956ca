"""How sentencepiece's BPE joins characters into pieces, as rules that other code can follow.

sentencepiece keeps no rules: it joins the two neighbours whose joined piece scores highest, the
leftmost of equals. Nothing outside a piece's characters bears on how they join before the piece
stands, so a piece is always joined from the same two parts: those of its own text alone. Rules of
one pair a piece, by falling score, therefore lead any BPE that takes the best rule, leftmost
first, through the very same steps. That holds for models that ``departure`` finds plain; for runs
of spaces of equal score it is tried, not proven, so encoders test themselves when they are made.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as schema

SPACE = "\u2581"
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
BPE = 2
Rule = tuple[str, str]


def parse(model: bytes) -> Any:
    """The ``ModelProto`` of a ``.model`` file's content."""
    return schema.ModelProto.FromString(model)


def scores(proto: Any) -> dict[str, float]:
    """The normal pieces and their scores."""
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}


def departure(proto: Any) -> str:
    """How a model differs from plain Llama-2 style BPE, an empty string if nowhere.

    In a plain model no piece reaches from a word over the space after it, so text may be cut
    before a space, and the rules above decide every merge. Runs of spaces may be of equal score,
    which then is that of all of them: the rule of the longer first part tells them apart.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    normal = scores(proto)
    spaces = [score for piece, score in normal.items() if piece != SPACE and not piece.strip(SPACE)]
    runs = set(spaces)
    words = [
        score
        for piece, score in normal.items()
        if piece.strip(SPACE) or (piece == SPACE and score not in runs)
    ]
    plain = {
        "it is no BPE": trainer.model_type == BPE,
        "it normalizes text": not normalizer.precompiled_charsmap,
        "it puts no space in front": normalizer.add_dummy_prefix,
        "it drops spaces": not normalizer.remove_extra_whitespaces,
        "it does not mark spaces": normalizer.escape_whitespaces,
        "it marks spaces after words": not trainer.treat_whitespace_as_suffix,
        "it lacks byte fallback": trainer.byte_fallback,
        "it has user-defined pieces": USER_DEFINED not in kinds,
        "it has unused pieces": UNUSED not in kinds,
        "a piece holds a space after a word": not any(
            SPACE in piece.lstrip(SPACE) for piece in normal
        ),
        "a piece holds a character that is no piece": set("".join(normal)) <= normal.keys(),
        "pieces of equal score are no runs of spaces": (
            len(set(words)) == len(words) and runs.isdisjoint(words)
        ),
        "only some runs of spaces are of equal score": len(runs) < 2 or len(runs) == len(spaces),
    }
    return next((what for what, holds in plain.items() if not holds), "")


def rules(normal: Mapping[str, float]) -> list[Rule]:
    """The two parts of every piece that BPE can reach, best first.

    Args:
        normal: the normal pieces and their scores.
    """
    found = [
        (score, parts)
        for piece, score in normal.items()
        if len(piece) > 1 and (parts := _parts(piece, normal))
    ]
    # Of equal scores the longer first part: a run of spaces grows before another one starts.
    found.sort(key=lambda rule: (-rule[0], -len(rule[1][0]), -len(rule[1][1])))
    return [parts for _, parts in found]


def _parts(piece: str, normal: Mapping[str, float]) -> Rule | None:
    """What BPE joins into the piece at last, or None if it never gets there."""
    splits = [i for i in range(1, len(piece)) if piece[:i] in normal and piece[i:] in normal]
    if len(splits) == 1:
        return piece[: splits[0]], piece[splits[0] :]
    return _join(piece, normal) if splits else None


def _join(piece: str, normal: Mapping[str, float]) -> Rule | None:
    """BPE on the piece's own text, up to its last step."""
    never = float("-inf")
    symbols = list(piece)
    joints = [normal.get(left + right, never) for left, right in pairwise(symbols)]
    while len(symbols) > 2:
        best = max(joints)
        if best == never:
            return None
        at = joints.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        del joints[at]
        for left in range(max(at - 1, 0), min(at + 1, len(joints))):
            joints[left] = normal.get(symbols[left] + symbols[left + 1], never)
    return symbols[0], symbols[1]
