"""A run's evaluations, one by one as they come, each once over all its starts. No torch here."""

import contextlib
import hashlib
import json
from collections import deque
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import evaluations
from titans_pretrain.files import read_json, write_json

FED = "fed.json"
PREFIX = "evaluation"
STEP = f"{PREFIX}/step"
_DIGEST_CHARACTERS = 16


class EvaluationFeed:
    """What evaluations found and nobody was given yet.

    A start that is killed right after one was given and before that was put down gives it again.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, run / evaluations.DIRECTORY / FED
        self._fed: dict[str, Any] = read_json(self._path) or {}
        self._waiting: deque[evaluations.Evaluation] = deque()

    def look(self) -> None:
        """Find those that have come."""
        self._waiting = deque(
            one
            for one in evaluations.read(self._run)
            if one.metrics and self._fed.get(str(one.step)) != _mark(one)
        )

    def next(self) -> dict[str, Any]:
        """The values of one, with the step of its checkpoint; empty if none waits."""
        if not self._waiting:
            return {}
        one = self._waiting.popleft()
        self._fed[str(one.step)] = _mark(one)
        with contextlib.suppress(OSError):
            write_json(self._path, self._fed)
        values = {f"{PREFIX}/{name}": value for name, value in one.metrics.items()}
        return {STEP: one.step, **values}


def _mark(one: evaluations.Evaluation) -> str:
    """Tells what was given: of a failure, the finished parts; the whole comes after it.

    Another evaluation of the same checkpoint, of other settings or metrics, comes, too.
    """
    found = json.dumps([dict(one.settings), dict(one.metrics)], sort_keys=True)
    digest = hashlib.sha256(found.encode()).hexdigest()
    return f"{one.checkpoint}{' in part' if one.failure else ''} {digest[:_DIGEST_CHARACTERS]}"
