"""``titans data verify``: is a prepared directory whole, and what has to be done again if not."""

import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep import manifest, merge
from data_prep.forecast import duration, size
from data_prep.tar import BlockSums, TarStream
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

LIVE_SECONDS, LINE_SECONDS = 0.5, 10.0


class Problem(NamedTuple):
    """What is wrong, and the command or the deed that mends it."""

    what: str
    fix: str


def verify(directory: Path, *, workers: int | None = None) -> dict[str, Any]:
    """Check every file of a prepared directory against what its tasks recorded.

    Checksums, sizes, member, token and block counts, block checksums, ids below the vocabulary's
    size, EOS (and BOS) of every document, masks of 0 and 1, provenance, counts, and no tar that
    the manifest lacks. Each problem is printed on stdout, then the commands that mend them.
    Before the merge the tasks finished so far are checked.

    Args:
        directory: the prepared directory.
        workers: shards read at once; None: one a core.

    Returns:
        The manifest's content; before the merge a part of it, with ``finished``: those tasks.

    Raises:
        UserError: anything is wrong; the fix is the command that redoes it.
    """
    content, problems = _content(directory)
    problems += _tokenizer_problems(directory, content)
    shards = [*content["shards"], *content["held_out"]]
    problems += _all_shards(directory, content, shards, workers or len(os.sched_getaffinity(0)))
    for problem in problems:
        print(problem.what)
    fixes = list(dict.fromkeys(problem.fix for problem in problems))
    if fixes:
        print("\nto mend it:")
        for fix in fixes:
            print(f"  {fix}")
        more = f", and {len(fixes) - 1} more (printed on stdout)" if len(fixes) > 1 else ""
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(
            f"{count}, first: {problems[0].what}", where=str(directory), fix=fixes[0] + more
        )
    return content


def _content(directory: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The manifest, or as much of it as is finished; what is wrong besides the shards."""
    if not (directory / manifest.PLAN).exists():
        content = manifest.load(directory / manifest.MANIFEST)
        return content, list(_manifest_problems(directory, content, set()))
    plan = manifest.read_plan(directory)
    entries = merge.finished_tasks(directory, plan)
    merged = (directory / manifest.MANIFEST).exists()
    if not entries and not merged:
        fix = manifest.redo(directory, 0)
        raise UserError("no task is finished", where=str(directory), fix=fix)
    by_task = dict(_task_problems(directory, plan, entries, merged=merged))
    problems = [problem for found in by_task.values() for problem in found]
    if what := manifest.duplicates_problem(directory, plan):
        problems.append(Problem(what, manifest.restore_fix(directory)))
    told, whole = manifest.described(plan, list(entries.values())), len(entries) == plan["tasks"]
    if not merged:
        if whole:
            what = "all tasks are finished, but manifest.json is missing"
            problems.append(Problem(what, _merge(directory)))
        return told | {"finished": sorted(entries)}, problems
    content = manifest.load(directory / manifest.MANIFEST)
    if whole and not told.items() <= content.items():
        problems.append(Problem("manifest.json is not what the tasks wrote", _merge(directory)))
    redone = {task for task in by_task if task < plan["tasks"]}
    return content, problems + list(_manifest_problems(directory, content, redone))


def _task_problems(
    directory: Path,
    plan: Mapping[str, Any],
    entries: Mapping[int, Mapping[str, Any]],
    *,
    merged: bool,
) -> Iterator[tuple[int, list[Problem]]]:
    """Tasks whose record or counts are wrong, of another plan, or, after the merge, missing."""
    foreign = dict(merge.foreign_tasks(directory, plan))
    for task in sorted({*range(plan["tasks"]), *foreign}):
        found: list[str] = []
        if task in foreign:
            found = [foreign[task]]
        elif task in entries:
            found = [*merge.record_problems(plan, entries[task])]
            found += filter(None, [manifest.file_problem(directory, entries[task]["unigrams"])])
        elif merged:
            found = [f"{manifest.task_file(directory, task).name} is missing or damaged"]
        if found:
            fix = merge.foreign_fix(directory, plan, task)
            yield task, [Problem(what, fix) for what in found]


def _manifest_problems(
    directory: Path, content: Mapping[str, Any], redone: Container[int]
) -> Iterator[Problem]:
    """Tars that the manifest lacks, sums that do not add up.

    Args:
        directory: the prepared directory.
        content: the manifest.
        redone: tasks to be done again, which may need the tars that the manifest lacks.
    """
    shards = [*content["shards"], *content["held_out"]]
    known = {shard["name"] for shard in shards}
    for extra in sorted(path.name for path in directory.glob("*.tar")):
        if extra not in known:
            of = re.fullmatch(r"(?:held-out-)?(\d{5,})-\d{5,}\.tar", extra)
            remove = f"run `{shlex.join(['rm', str(directory / extra)])}`"
            fix = manifest.redo(directory, int(of[1])) if of and int(of[1]) in redone else remove
            yield Problem(f"{extra} is not in the manifest", fix)
    for kind, tokens in (("shards", "tokens"), ("held_out", "held_out_tokens")):
        if sum(shard["tokens"] for shard in content[kind]) != content[tokens]:
            what = f"the tokens of {kind} do not add up to the manifest's"
            yield Problem(what, _merge(directory))
    if sum(shard["documents"] for shard in shards) != content["documents"]["kept"]:
        yield Problem("the shards' documents do not add up to the manifest's", _merge(directory))


def _merge(directory: Path) -> str:
    return f"run `{shlex.join(['titans', 'data', 'merge', '--output', str(directory)])}`"


def _tokenizer_problems(directory: Path, content: Mapping[str, Any]) -> Iterator[Problem]:
    path = directory / manifest.TOKENIZER
    copy = f"copy back the model with sha256 {content['tokenizer_sha256']}"
    if not path.exists():
        yield Problem(f"{path.name} is missing", copy)
    elif sha256_file(path) != content["tokenizer_sha256"]:
        yield Problem(f"{path.name} is not the tokenizer that the data was prepared with", copy)


def _all_shards(
    directory: Path, content: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], workers: int
) -> list[Problem]:
    """The problems of all shards, in their order; several shards are read at once."""
    progress = _Progress(sum(shard["bytes"] for shard in shards))

    def check(shard: Mapping[str, Any]) -> list[Problem]:
        fix = manifest.redo(directory, shard["task"])
        found = [Problem(what, fix) for what in shard_problems(directory, content, shard)]
        progress.add(shard["bytes"])
        return found

    with ThreadPoolExecutor(workers) as pool:
        found = [problem for problems in pool.map(check, shards) for problem in problems]
    progress.end()
    return found


def shard_problems(
    directory: Path, content: Mapping[str, Any], shard: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with one shard, its provenance and its index."""
    damaged = list(
        filter(None, (manifest.file_problem(directory, e) for e in manifest.files(shard)))
    )
    yield from damaged
    if damaged:
        return
    try:
        stream = open_stream(directory, content, shard)
    except UserError as error:
        yield error.what
        return
    name = shard["name"]
    if stream.tokens != shard["tokens"]:
        yield f"{name} holds {stream.tokens} tokens instead of {shard['tokens']}"
    if stream.masks != content["masks"]:
        yield f"{name} has {'' if stream.masks else 'no '}masks, against the manifest"
    found = _Found(content)
    for member, tokens, mask in stream.chunks():
        yield from (f"{name}, {member}: {what}" for what in found.add(tokens, mask))
    yield from found.boundary_problems(directory, shard)
    yield from found.index_problems(directory, shard)


class _Found:
    """What a shard's stream holds, from its members one by one."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._tokens = 0
        self._ends: list[NDArray[np.int64]] = []
        self._begins: list[NDArray[np.int64]] = []
        self._sums, self._mask_sums = BlockSums(), BlockSums()

    def add(self, tokens: NDArray[Any], mask: NDArray[Any] | None) -> Iterator[str]:
        """Take a member; what is wrong with it."""
        size = self._content["vocab_size"]
        if tokens.max(initial=0) >= size:
            yield f"id {tokens.max()} in a vocabulary of {size}"
        self._ends.append(self._tokens + np.flatnonzero(tokens == self._content["eos_id"]))
        if self._content["bos"]:
            self._begins.append(self._tokens + np.flatnonzero(tokens == self._content["bos_id"]))
        self._sums.add(tokens)
        if mask is not None:
            if mask.max(initial=0) > 1:
                yield f"the mask holds {mask.max()}"
            self._mask_sums.add(mask)
        self._tokens += len(tokens)

    def boundary_problems(self, directory: Path, shard: Mapping[str, Any]) -> Iterator[str]:
        """Documents as EOS, BOS, the manifest and the provenance tell them."""
        name, ends = shard["name"], np.concatenate([*self._ends, np.zeros(0, np.int64)])
        if not len(ends) or ends[-1] != self._tokens - 1:
            yield f"{name} does not end with EOS"
        if len(ends) != shard["documents"]:
            yield f"{name} holds {len(ends)} documents instead of {shard['documents']}"
        if self._content["bos"]:
            begins = np.concatenate([*self._begins, np.zeros(0, np.int64)])
            if not np.array_equal(begins, np.append(0, ends[:-1] + 1)):
                yield f"{name} has documents that do not begin with BOS"
        table = pq.read_table(directory / shard["provenance"]["name"])
        told = table["offset"].to_numpy() + table["tokens"].to_numpy() - 1
        if not np.array_equal(told, ends):
            yield f"{shard['provenance']['name']} does not tell where the documents of {name} end"

    def index_problems(self, directory: Path, shard: Mapping[str, Any]) -> Iterator[str]:
        """Block sums that are not the stream's."""
        sums, masks = self._sums.finish(), self._mask_sums.finish()
        sums = np.stack([sums, masks]) if len(masks) else sums
        index = shard["index"]["name"]
        if not np.array_equal(np.load(directory / index, allow_pickle=False), sums):
            yield f"{index} does not have the checksums of the blocks of {shard['name']}"


def open_stream(directory: Path, content: Mapping[str, Any], shard: Mapping[str, Any]) -> TarStream:
    """A shard's tokens."""
    return TarStream.open(
        directory / shard["name"],
        dtype=content["dtype"],
        member_tokens=content["settings"]["member_tokens"],
    )


class _Progress:
    """Bytes checked, rate and time left: rewritten on a terminal, else now and then a line."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._begun = self._shown = time.monotonic()
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """More bytes are checked."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown < (LIVE_SECONDS if self._live else LINE_SECONDS):
                return
            self._shown = now
            rate = self._done / (now - self._begun)
            line = f"verified {size(self._done)} of {size(self._total)}, {size(rate)}/s, "
            line += f"ETA {duration((self._total - self._done) / rate / 3600)}"
            sys.stderr.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
            sys.stderr.flush()

    def end(self) -> None:
        """Leave the line of a terminal."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
