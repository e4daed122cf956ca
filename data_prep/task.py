"""``titans data prepare``: one task of a frozen plan, units of text in, token shards out.

A task reads its units in the plan's order, fills a window of about one shard, shuffles its
documents and writes them once: memory does not depend on the input, and every byte is a function
of inputs, tokenizer, settings and number of tasks. A journal names the finished windows, from which
a killed task goes on.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest, merge, plan, progress, spool
from data_prep.batch import COUNTS, Encoding, Span, Work
from data_prep.output import write_json, writing
from data_prep.plan import Plan
from data_prep.progress import Progress
from data_prep.schema import FORMAT
from data_prep.tar import TarStream
from data_prep.tokenizer import Tokenizer
from data_prep.window import Window, WindowWriter, npy
from data_prep.workers import Workers, default_workers
from titans_pretrain.errors import UserError
from titans_pretrain.files import remove_abandoned, sha256_file


def prepare(
    output: Path,
    task: int,
    *,
    encoder: str = "sentencepiece",
    workers: int | None = None,
    say: Callable[[str], None] = progress.say,
) -> dict[str, Any] | None:
    """Do one task of the plan frozen in a directory; the last one to finish merges.

    Finished windows whose files are whole are kept, damaged ones made again.

    Args:
        output: directory of plan, shards and manifests.
        task: which task, from 0.
        encoder: ``sentencepiece`` or ``fast``; the ids are the same.
        workers: processes that read and encode; 0: this one; None: one a core, where that pays.
        say: takes lines for the person who watches.

    Returns:
        The merged manifest, or None while other tasks are missing.

    Raises:
        UserError: no such task, bad input, or an input that is not as it was.
        TitansError: a file cannot be written, or a worker died.
    """
    frozen, tokenizer = plan.load(output, task=task)
    if not 0 <= task < frozen.tasks:
        raise UserError(
            f"task {task} of {frozen.tasks}", where="--task", fix=f"use 0 to {frozen.tasks - 1}"
        )
    merge.forget_other(output, frozen.content, task)
    _Task(output, frozen, tokenizer, task, encoder, workers, say).complete()
    return merge.complete(output)


class _Task:
    """One task's work."""

    def __init__(
        self,
        output: Path,
        frozen: Plan,
        tokenizer: Tokenizer,
        task: int,
        encoder: str,
        workers: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.output, self.plan, self.task, self.say = output, frozen, task, say
        self.vocab_size = tokenizer.vocab_size
        self.settings = frozen.settings()
        found = frozen.content["duplicates"]
        duplicates = output / found["name"] if found else None
        units = frozen.task_units(task)
        self.work = Work(units, self.settings, tokenizer.path, encoder, duplicates)
        most = default_workers(self.work) if workers is None else workers
        self.workers = min(most, len(units))
        self.writer = WindowWriter(output, task, self.settings, tokenizer.vocab_size)
        self.windows: list[dict[str, Any]] = []
        self.unigrams = np.zeros(tokenizer.vocab_size, np.int64)

    def complete(self) -> None:
        """Keep what is whole, mend what is damaged, do what is missing."""
        for folder in (self.output, self.output / progress.PROGRESS):
            remove_abandoned(folder, "*")
        finished = self._recorded(manifest.read_task)
        entry = finished or self._recorded(manifest.read_partial)
        self.windows = list(entry["windows"]) if entry else []
        damaged = self._damaged()
        if finished and not damaged and _is_whole(self.output, finished["unigrams"]):
            self.say(f"task {self.task} of {self.plan.tasks} is finished and intact: skipped")
            self._clear()
            return
        self.progress = Progress(
            self.output,
            self.task,
            self.plan.tasks,
            len(self.work.units),
            done=self._next()[0],
            tokens=sum(shard["tokens"] for shard in self._shards()),
        )
        try:
            with self.progress:
                done = self._do(damaged, finished)
        except BaseException as error:
            self.progress.fail(error)
            raise
        if not done:
            self.complete()
            return
        self.progress.end()
        self._clear()

    def _do(self, damaged: Sequence[int], finished: Mapping[str, Any] | None) -> bool:
        """Finish the task; False where another process has finished it meanwhile."""
        with self._encoding() as encoding:
            for index in damaged:
                self._mend(encoding, index)
            self.unigrams = self._counted()
            tail = finished["tail"] if finished else self._go_on(encoding)
        if tail is None:
            return False
        path = self.output / f"task-{self.task:05d}.unigrams.npy"
        content = npy(self.unigrams)
        with writing(path) as handle:
            handle.write(content)
        counts = {"name": path.name, "bytes": len(content), "sha256": sha256_file(path)}
        documents = self._totals()
        documents.update(tail["documents"])
        entry = self._journal(documents) | {"tail": tail, "unigrams": counts}
        write_json(manifest.task_file(self.output, self.task), entry)
        return True

    @contextlib.contextmanager
    def _encoding(self) -> Iterator["Encoding | Workers"]:
        with contextlib.ExitStack() as stack:
            work = self.work
            if any(spool.is_packed(item) for _, item, _, _ in work.units):
                kept = spool.KEPT_IN_TURN if self.plan.deals_files else spool.KEPT
                work = replace(work, spool=stack.enter_context(spool.shared(kept)))
            if self.workers:
                yield stack.enter_context(Workers(work, self.workers))
            else:
                yield stack.enter_context(Encoding(work))

    def _recorded(
        self, read: Callable[[Path, int], dict[str, Any] | None]
    ) -> dict[str, Any] | None:
        """What an earlier run under this plan recorded, if it is without gaps."""
        entry = read(self.output, self.task)
        if entry is None or entry["plan"] != self.plan.digest:
            return None
        return None if any(merge.record_problems(self.plan.content, entry)) else entry

    def _shards(self) -> list[dict[str, Any]]:
        return manifest.shards_of([{"windows": self.windows}])

    def _damaged(self) -> list[int]:
        """The recorded windows that lack a file or have one with another checksum."""

        def damaged(window: Mapping[str, Any]) -> bool:
            shards = manifest.shards_of([{"windows": [window]}])
            return not all(
                _is_whole(self.output, entry) for shard in shards for entry in manifest.files(shard)
            )

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(damaged, self.windows)
            return [index for index, bad in enumerate(found) if bad]

    def _mend(self, encoding: "Encoding | Workers", index: int) -> None:
        """Make a recorded window's shards again."""
        recorded = self.windows[index]
        (unit, start), (last, stop) = recorded["first"], recorded["last"]
        self.say(f"task {self.task}: window {index} is damaged or incomplete: made again")
        spans = [Span(place) for place in range(unit, last + 1)]
        spans[-1] = spans[-1]._replace(stop=stop)
        spans[0] = spans[0]._replace(start=start)
        window = Window([unit, start])
        for span, batch_index, batch in encoding.batches(spans):
            window.add(span.unit, batch_index, batch)
        self.windows[index] = self.writer.write(index, window, recorded).entry

    def _counted(self) -> NDArray[np.int64]:
        """How often each id is in the training shards on disk, (vocabulary,)."""
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in manifest.shards_of([{"windows": self.windows}], ["shard"]):
            stream = TarStream.open(
                self.output / shard["name"],
                dtype=manifest.token_type(self.vocab_size),
                member_tokens=self.settings.member_tokens,
            )
            for _, ids, _ in stream.chunks():
                counts += np.bincount(ids, minlength=len(counts))
        return counts

    def _next(self) -> tuple[int, int]:
        """Where the recorded windows end: the unit, and the batch within it."""
        unit, batch = self.windows[-1]["last"] if self.windows else (0, 0)
        return unit, batch

    def _go_on(self, encoding: "Encoding | Workers") -> dict[str, Any] | None:
        """Do all units after the last recorded window.

        Returns:
            What follows the last window: bounds and counts of rows that are all dropped; None if
            another process finished the task meanwhile.
        """
        unit, start = self._next()
        spans = [Span(place) for place in range(unit, len(self.work.units))]
        if spans:
            spans[0] = spans[0]._replace(start=start)
        window = Window([unit, start])
        tokens = sum(shard["tokens"] for shard in self._shards())
        documents = sum(shard["documents"] for shard in self._shards())
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] = pool.submit(lambda: None)
            for span, index, batch in encoding.batches(spans):
                window.add(span.unit, index, batch)
                tokens, documents = tokens + len(batch.ids), documents + len(batch.lengths)
                self.progress.update(span.unit, tokens, documents)
                if window.bytes >= self.settings.shard_bytes:
                    writing.result()
                    if self._recorded(manifest.read_task):
                        return None
                    writing = pool.submit(self._write, window)
                    window = Window(window.last)
            writing.result()
            if window.batches:
                self._write(window)
                window = Window(window.last)
        end = [len(self.work.units), 0]
        return {"first": window.first, "last": end, "documents": dict(window.counts)}

    def _write(self, window: Window) -> None:
        """Write the next window, then the journal that names it; runs beside the encoding."""
        written = self.writer.write(len(self.windows), window)
        self.unigrams += written.unigrams
        self.windows.append(written.entry)
        write_json(manifest.partial_file(self.output, self.task), self._journal(self._totals()))

    def _totals(self) -> Counter[str]:
        """Counts of the documents of the recorded windows."""
        total: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        for window in self.windows:
            total.update(window["documents"])
        return total

    def _journal(self, documents: Mapping[str, int]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": self.task,
            "plan": self.plan.digest,
            "documents": dict(documents),
            "windows": self.windows,
        }

    def _clear(self) -> None:
        """Remove what only an unfinished task has."""
        manifest.partial_file(self.output, self.task).unlink(missing_ok=True)
        progress.forget(progress.progress_file(self.output, self.task))


def _is_whole(output: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there, and can be read, with its size and checksum."""
    path = output / entry["name"]
    if manifest.size_problem(path, entry["bytes"]):
        return False
    try:
        return sha256_file(path) == entry["sha256"]
    except OSError:
        return False
