"""The paper's figures that ours stand beside: Tables 1 and 2 and Figure 6. No torch here."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

SIZES: Mapping[str, float] = {"340M": 340e6, "400M": 400e6, "760M": 760e6}
NEEDLES: Mapping[str, str] = {
    "niah_pk": "S-NIAH-PK",
    "niah_number": "S-NIAH-N",
    "niah_uuid": "S-NIAH-W",
}
_SHARE = 100.0  # ours are shares, the paper's are in percent
_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "wikitext": ("wikitext", "word_perplexity", 1.0),
    "lambada_openai perplexity": ("lambada_openai", "perplexity", 1.0),
    "lambada_openai": ("lambada_openai", "acc", _SHARE),
    "piqa": ("piqa", "acc", _SHARE),
    "hellaswag": ("hellaswag", "acc_norm", _SHARE),
    "winogrande": ("winogrande", "acc", _SHARE),
    "arc_easy": ("arc_easy", "acc", _SHARE),
    "arc_challenge": ("arc_challenge", "acc_norm", _SHARE),
    "social_iqa": ("social_iqa", "acc", _SHARE),
    "boolq": ("boolq", "acc", _SHARE),
}
ACCURACIES = tuple(_COLUMNS)[2:]


@functools.cache
def figures() -> dict[str, Any]:
    """``table_1``, ``table_2``, ``figure_6a`` and ``figure_6b``, each with its source."""
    found: dict[str, Any] = json.loads(
        Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
    )
    return found


def check_size(size: str | None) -> None:
    """Refuse a size of which the paper has no models.

    Raises:
        UserError: it is none of ``SIZES``, nor None.
    """
    if size is not None and size not in SIZES:
        raise UserError(
            f"the paper has no models of {size}",
            where="--paper-size",
            fix=f"use {', '.join(SIZES)}",
        )


def nearest_size(parameters: int) -> str:
    """The size of the paper's models that is nearest in ratio."""
    return min(SIZES, key=lambda size: abs(math.log(SIZES[size] / max(parameters, 1))))


def table_1(size: str) -> list[dict[str, Any]]:
    """The rows of a size: ``model``, ``tokens`` and ``values`` in the order of ``columns``."""
    return [row for row in figures()["table_1"]["rows"] if row["size"] == size]


def columns() -> list[str]:
    """The columns of Table 1."""
    found: list[str] = figures()["table_1"]["columns"]
    return found


def row_of(results: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """Our row of Table 1: None where a task is missing, and for the average of fewer than all.

    Args:
        results: task -> its metrics.
    """
    row: dict[str, float | None] = {}
    for column, (task, metric, factor) in _COLUMNS.items():
        value = results.get(task, {}).get(metric)
        row[column] = None if value is None else value * factor
    accuracies = [value for name in ACCURACIES if (value := row[name]) is not None]
    row["average"] = _mean(accuracies) if len(accuracies) == len(ACCURACIES) else None
    return [row[column] for column in columns()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
