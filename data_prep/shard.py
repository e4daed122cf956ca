"""``titans data prepare``: units of text in, token shards out.

A task takes every T-th unit of a seeded permutation, fills a window of about one shard, shuffles
its documents and writes them once: memory does not depend on the input, and every byte is a
function of inputs, tokenizer, settings and number of tasks.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.inputs import Input
from data_prep.manifest import Plan, Settings
from data_prep.output import told, write_json, writing
from data_prep.schema import FORMAT
from data_prep.sources import Layout, Reader, Row, layout, shuffled
from data_prep.tar import MASK_SUFFIX, TarWriter
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.files import TEMPORARY_SUFFIX, sha256_file

UNITS, DOCUMENTS = 0, 1  # streams of the seed
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Document:
    """An encoded document, EOS included: ids (tokens,), mask (tokens,) or None; no text."""

    ids: NDArray[Any]
    mask: NDArray[np.uint8] | None
    row: Row


def prepare(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    output: Path,
    settings: Settings,
    *,
    task: int = 0,
    tasks: int = 1,
    command: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Do one task; the last one to finish merges.

    Args:
        inputs: files to read (``inputs.find`` or ``find_dataset``).
        tokenizer: encodes; its model is copied to ``output``.
        output: directory of plan, shards and manifests.
        settings: filters, columns, seed, sizes.
        task: which task, from 0.
        tasks: of how many.
        command: the options that repeat this, for messages.

    Returns:
        The merged manifest, or None while other tasks are missing.

    Raises:
        UserError: bad input, or an output that was begun with something else.
        TitansError: a file cannot be written.
    """
    if not 0 <= task < tasks:
        raise UserError(
            f"task {task} of {tasks}", where="--task", fix=f"use 0 to {tasks - 1}, or more --tasks"
        )
    with told(output):
        output.mkdir(parents=True, exist_ok=True)
    plan = freeze(inputs, tokenizer, output, settings, tasks, command)
    _copy_tokenizer(tokenizer, output)
    if finished(output, plan, task):
        say(f"task {task} of {tasks} is finished and intact: skipped")
    else:
        _remove_leftovers(output, task)
        _Task(plan, tokenizer, output, settings, task).run()
    if all(manifest.read_task(output, other) for other in range(tasks)):
        return manifest.merge(output)
    return None


def freeze(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    output: Path,
    settings: Settings,
    tasks: int,
    command: Sequence[str],
) -> Plan:
    """Write ``plan.json``, or check that it describes the same work.

    Raises:
        UserError: the output was begun with another plan; names the difference.
    """
    path = output / manifest.PLAN
    ordered = tuple(sorted(inputs, key=lambda item: item.name))
    begun = path.exists()
    layouts = {item.name: Layout(0) if begun else layout(item) for item in ordered}
    new = manifest.describe(ordered, layouts, tokenizer, settings, tasks, command)
    if not begun:
        write_json(path, new)
    old = manifest.read_plan(output)
    if difference := manifest.difference(old, new):
        raise UserError(
            f"the output was begun with another plan: {difference}",
            where=str(path),
            fix="repeat the first command's options, or choose another --output",
        )
    return Plan(old, ordered)


def finished(output: Path, plan: Plan, task: int) -> bool:
    """Whether the task's manifest is there and every file it names has the recorded checksum."""
    entry = manifest.read_task(output, task)
    if entry is None:
        return False
    files = [*entry["shards"], *(shard["provenance"] for shard in entry["shards"])]
    return entry["plan"] == plan.digest and all(
        (output / file["name"]).exists() and sha256_file(output / file["name"]) == file["sha256"]
        for file in [*files, entry["unigrams"]]
    )


class _Task:
    """One task's work."""

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, output: Path, settings: Settings, task: int
    ) -> None:
        self.plan, self.tokenizer, self.output = plan, tokenizer, output
        self.settings, self.task = settings, task
        self.dtype = np.dtype(manifest.token_type(tokenizer.vocab_size))
        self.documents = Counter(dict.fromkeys(("read", "kept", "empty", "score", "language"), 0))
        self.unigrams = np.zeros(tokenizer.vocab_size, np.int64)
        self.shards: list[dict[str, Any]] = []
        self.members = 0

    def run(self) -> None:
        """Write the shards, then the unigram counts, then the manifest."""
        for window in self._windows():
            self._write_shard(window)
            window.clear()
        path = self.output / f"task-{self.task:05d}.unigrams.npy"
        with writing(path) as handle:
            np.lib.format.write_array(handle, self.unigrams, version=(1, 0), allow_pickle=False)
        content = {
            "format": FORMAT,
            "task": self.task,
            "plan": self.plan.digest,
            "documents": dict(self.documents),
            "shards": self.shards,
            "unigrams": {"name": path.name, "sha256": sha256_file(path)},
        }
        write_json(manifest.task_file(self.output, self.task), content)

    def _windows(self) -> Iterator[list[Document]]:
        """Documents of whole batches of rows, about one shard of them at a time."""
        units = self.plan.units()
        order = shuffled(len(units), self.settings.seed, UNITS)
        mine = [units[index] for index in order[self.task :: self.plan.tasks]]
        progress = _Progress(self.task, self.plan.tasks, len(mine))
        window: list[Document] = []
        size = tokens = 0
        with Reader(self.settings.columns()) as reader:
            for done, (item, shape, unit) in enumerate(mine):
                for rows in reader.rows(item, shape, unit):
                    batch = self._encode(rows)
                    window += batch
                    count = sum(len(document.ids) for document in batch)
                    size, tokens = size + count * self.dtype.itemsize, tokens + count
                    if size >= self.settings.shard_bytes:
                        yield window
                        window, size = [], 0
                    progress.show(done, tokens)
        if window:
            yield window
        progress.end(tokens)

    def _encode(self, rows: list[Row]) -> list[Document]:
        kept = [row for row in rows if self._keep(row)]
        if self.settings.prompt_column:
            pairs = [self.tokenizer.encode_after(row.prompt, row.text) for row in kept]
            masks = [np.append(mask, np.uint8(1)) for _, mask in pairs]
            encoded = [ids for ids, _ in pairs]
        else:
            encoded, masks = self.tokenizer.encode([row.text for row in kept]), None
        return [
            Document(
                np.array([*ids, self.tokenizer.eos_id], self.dtype),
                masks[index] if masks else None,
                dataclasses.replace(row, text="", prompt=""),
            )
            for index, (ids, row) in enumerate(zip(encoded, kept, strict=True))
        ]

    def _keep(self, row: Row) -> bool:
        """Apply the filters; a document is counted under the first reason that drops it."""
        settings, reason = self.settings, "kept"
        if not row.text.strip():
            reason = "empty"
        elif settings.min_score is not None and not _at_least(row.score, settings.min_score):
            reason = "score"
        elif settings.language is not None and row.language != settings.language:
            reason = "language"
        self.documents["read"] += 1
        self.documents[reason] += 1
        return reason == "kept"

    def _write_shard(self, window: list[Document]) -> None:
        index = len(self.shards)
        order = shuffled(len(window), self.settings.seed, DOCUMENTS, self.task, index)
        documents = [window[position] for position in order]
        stem = f"{self.task:05d}-{index:05d}"
        tar, origin = self.output / f"{stem}.tar", self.output / f"{stem}.documents.parquet"
        stream = np.concatenate([document.ids for document in documents])
        masks = [document.mask for document in documents if document.mask is not None]
        mask = np.concatenate(masks) if masks else None
        with writing(tar) as handle, contextlib.closing(TarWriter(handle)) as writer:
            for start in range(0, len(stream), self.settings.member_tokens):
                span = slice(start, start + self.settings.member_tokens)
                key = f"{self.task:05d}-{self.members:09d}"
                writer.write(f"{key}.npy", stream[span])
                if mask is not None:
                    writer.write(f"{key}{MASK_SUFFIX}", mask[span])
                self.members += 1
        with writing(origin) as handle:
            pq.write_table(_provenance(documents), handle, compression="zstd")
        self.unigrams += np.bincount(stream, minlength=len(self.unigrams))
        self.shards.append(
            {
                "task": self.task,
                "tokens": len(stream),
                "documents": len(documents),
                **_file(tar),
                "provenance": _file(origin),
            }
        )


def _at_least(score: float | None, bound: float) -> bool:
    return score is not None and score >= bound  # NaN is not


def _file(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _provenance(documents: list[Document]) -> pa.Table:
    """Which document lies where in the shard's stream; ``tokens`` counts the EOS."""
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    origin = {
        name: pa.array([getattr(document.row, name) for document in documents], pa.string())
        for name in ("id", "url", "dump")
    }
    return pa.table({**origin, "offset": np.cumsum(lengths) - lengths, "tokens": lengths})


def _copy_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    path = output / manifest.TOKENIZER
    if not path.exists() or sha256_file(path) != tokenizer.sha256:
        with writing(path) as handle:
            handle.write(tokenizer.content)


def _remove_leftovers(output: Path, task: int) -> None:
    """Temporary files of an earlier, killed run of this task."""
    for name in (f".{task:05d}-*", f".task-{task:05d}.*"):
        for path in output.glob(name + TEMPORARY_SUFFIX):
            path.unlink(missing_ok=True)


def say(line: str) -> None:
    """A line for the person who watches."""
    print(line, file=sys.stderr, flush=True)


class _Progress:
    """Units done, rate and time left: rewritten on a terminal, else now and then a line."""

    def __init__(self, task: int, tasks: int, units: int) -> None:
        self._name, self._units = f"task {task} of {tasks}", units
        self._start = self._shown = time.monotonic()
        self._live = sys.stderr.isatty()

    def show(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.5 if self._live else PROGRESS_SECONDS):
            return
        self._shown = now
        left = (now - self._start) / max(done, 1) * (self._units - done)
        eta = time.strftime("%H:%M:%S", time.gmtime(left)) if done else "?"
        line = f"{self._name}: {done}/{self._units} units, {self._rate(tokens)}, ETA {eta}"
        print(f"\r{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr)

    def end(self, tokens: int) -> None:
        say(f"{os.linesep if self._live else ''}{self._name}: done, {self._rate(tokens)}")

    def _rate(self, tokens: int) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{tokens / 1e6:,.2f} M tokens, {tokens / seconds / 1e6:,.2f} M tokens/s"
