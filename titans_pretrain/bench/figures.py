"""Medians, ratios, tables, targets and the JSON of a benchmark. No torch here."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_pretrain import files
from titans_pretrain.errors import UserError, nearest


@dataclass(frozen=True)
class Spread:
    """The median over rounds, the least and the most."""

    median: float
    least: float
    most: float

    def text(self, form: str = ".2f") -> str:
        """``median (least to most)``."""
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Of one figure a round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(upper: Sequence[float], lower: Sequence[float]) -> Spread:
    """Of the rounds' own ratios."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


@dataclass(frozen=True)
class Verdict:
    """A target and what was found.

    Attributes:
        told: what is compared.
        bound: the target.
        found: the figure; None where it is missing.
        passed: whether it is met.
    """

    told: str
    bound: float
    found: float | None
    passed: bool


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line a target."""
    return [
        f"{'PASS' if one.passed else 'FAIL'}  {one.told} {one.bound:g}: "
        + ("not measured" if one.found is None else f"{one.found:.3g}")
        for one in verdicts
    ]


def bound(text: str, kinds: Iterable[str]) -> tuple[str, str, float]:
    """The kind, the place and the bound of a target typed as ``KIND[@PLACE]=BOUND``.

    Raises:
        UserError: no such kind, or no bound above zero.
    """
    name, equals, told = text.partition("=")
    kind, at, place = name.partition("@")
    if not equals or kind not in kinds or (at and not place):
        fix = f"write KIND=BOUND; {nearest(kind, kinds)}"
        raise UserError(f"{text!r} is no target", where="--check", fix=fix)
    try:
        value = float(told)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        fix = f"write a number, such as {kind}=2.5"
        raise UserError(f"{told!r} is no bound above zero", where="--check", fix=fix)
    return kind, place, value


def check_json(path: Path | None) -> None:
    """Refuse, before hours of measuring, a file that could not be written.

    Raises:
        UserError: its directory is not there, or it is a directory.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory", where="--json", fix="give a file")
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"{path.parent} is no directory", where="--json", fix="make it, or give another file"
        )


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result, if it is wanted."""
    if path is not None:
        files.write_json(path, _plain(result))


def _plain(value: Any) -> Any:
    """Dataclasses as mappings."""
    if isinstance(value, Spread | Verdict):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
