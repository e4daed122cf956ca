"""A text read once into a model's memory, to be asked about many times."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.inference import generate, memory_file
from titans_pretrain.inference.memory_file import Memory, Owner, Reading
from titans_pretrain.inference.prefill import PIECE, check_memory, new_cache, prefill
from titans_pretrain.inference.prompts import check_ids
from titans_pretrain.inference.text_file import Decoder
from titans_pretrain.inference.token_stream import TokenStream
from titans_pretrain.train.metrics import duration

SAVE_SECONDS = 300.0
PROGRESS_SECONDS = 1.0
BLOCK_BYTES = 2**14
UNFINISHED = ".unfinished"


def memorize(
    directory: Path,
    file: Path,
    out: Path,
    *,
    earlier: Path | None = None,
    piece: int = PIECE,
    device: str = "auto",
) -> Memory:
    """Read a text into a memory and write it.

    Neither the text nor anything that grows with it is held at once. Every five minutes the memory
    so far is saved beside ``out``; the same call goes on from there. Where ``out`` is ``earlier``
    and ``file`` is the text it has read last, nothing is read again.

    Args:
        directory: what ``titans export`` wrote, of a variant with memory.
        file: the text, UTF-8.
        out: the memory's file. It may be ``earlier``, otherwise there must be none.
        earlier: a memory that the text is to follow, without anything in between.
        piece: tokens that go through the model at once.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.

    Returns:
        What was written.

    Raises:
        UserError: text, model, memory and paths do not fit, or the text is empty or not UTF-8.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    unfinished = out.with_name(out.name + UNFINISHED)
    _check_paths(file, out, earlier, unfinished)
    disable_progress_bar()
    set_verbosity_error()
    place = generate.choose_device(device)
    check_memory(generate.settings(directory), str(directory))
    model, tokenizer = generate.load(directory, device=place)
    model.to(place)
    owner = Owner.of(directory, model)
    before = _earlier(model, owner, earlier)
    if earlier is not None and _same(earlier, out) and _has_read(before, file):
        print(f"{out} has already read {file}, at its end", file=sys.stderr)
        _drop(unfinished, model, owner, before)
        return before
    with torch.inference_mode():
        begun = _begin(model, owner, file, before, unfinished)
        reader = _Reader(model, tokenizer, file, piece, *begun)
        saved = time.monotonic()
        for _ in reader.read():
            if time.monotonic() - saved >= SAVE_SECONDS:
                memory_file.save(unfinished, reader.so_far(), owner)
                saved = time.monotonic()
        memory = reader.finish()
    memory_file.save(out, memory, owner)
    unfinished.unlink(missing_ok=True)
    return memory


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _check_paths(file: Path, out: Path, earlier: Path | None, unfinished: Path) -> None:
    """Refuse what would fail only after the text has been read."""
    if not file.is_file():
        raise UserError(f"{file} is no file", where=str(file), fix="give a text file")
    if file.stat().st_size == 0:
        raise UserError("the text is empty", where=str(file), fix="give a file with text")
    for name, path in (("the text", file), ("the earlier memory", earlier)):
        if path is not None and _same(path, unfinished):
            raise UserError(
                f"{name} has the name under which reading is saved",
                where=str(path),
                fix="rename it, or give another OUT",
            )
    if unfinished.exists():
        _check_unfinished(unfinished)
    replaced = earlier is not None and _same(out, earlier)
    if out.exists() and not replaced:
        raise UserError(
            f"{out} is there already", where=str(out), fix="give another path, or move it away"
        )
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise UserError(
            f"nothing can be written into {out.parent}",
            where=str(out),
            fix="make the directory, or change its permissions",
        )


def _check_unfinished(path: Path) -> None:
    """Refuse to write over a file that is no memory."""
    try:
        memory_file.owner_of(path)
    except UserError as error:
        raise UserError(
            f"where reading is saved is another file: {error.what}",
            where=str(path),
            fix="move it away, or give another OUT",
        ) from None


def _earlier(model: Any, owner: Owner, path: Path | None) -> Memory:
    """The memory that the text follows."""
    if path is None:
        return Memory(new_cache(model))
    memory = memory_file.load(path, model, owner)
    if memory.reading is not None:
        raise UserError(
            "the memory's text has not been read to its end",
            where=str(path),
            fix="run the command that began it again",
        )
    return memory


def _has_read(memory: Memory, file: Path) -> bool:
    """Whether a file is the text that a memory has read last."""
    last = memory.last
    if last is None or last.bytes != file.stat().st_size:
        return False
    return _sha256(file, last.bytes) == last.sha256


def _drop(unfinished: Path, model: Any, owner: Owner, memory: Memory) -> None:
    """Delete what is left of the reading that has come to its end in ``memory``."""
    if unfinished.exists() and memory_file.owner_of(unfinished).fingerprint == owner.fingerprint:
        saved = memory_file.load(unfinished, model, owner).reading
        if saved and memory.last and saved.earlier == memory.last.earlier:
            unfinished.unlink()


def _begin(
    model: Any, owner: Owner, file: Path, before: Memory, unfinished: Path
) -> tuple[Memory, Reading]:
    """The memory to go on from, and how much of the file is in it already."""
    whole = Reading(0, hashlib.sha256().hexdigest(), before.digest)
    if not unfinished.exists():
        return before, whole
    theirs = "another model"
    if memory_file.owner_of(unfinished).fingerprint == owner.fingerprint:
        saved = memory_file.load(unfinished, model, owner)
        done = saved.reading
        if done and done.earlier == before.digest and _sha256(file, done.bytes) == done.sha256:
            print(f"going on at byte {done.bytes:,}, where it was interrupted", file=sys.stderr)
            return saved, done
        theirs = "another text, or of another memory before it"
    print(f"{unfinished} is of {theirs}: reading begins anew", file=sys.stderr)
    return before, whole


def _sha256(file: Path, size: int) -> str:
    """Of a file's first bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        for block in _blocks(handle, size):
            digest.update(block)
    return digest.hexdigest()


def _blocks(handle: IO[bytes], size: int) -> Iterator[bytes]:
    while size and (block := handle.read(min(size, BLOCK_BYTES))):
        size -= len(block)
        yield block


class _Reader:
    """Feeds a file to a model, block by block."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        file: Path,
        piece: int,
        memory: Memory,
        reading: Reading,
    ) -> None:
        self._model, self._file, self._piece = model, file, piece
        self._cache, self._tokens = memory.cache, memory.tokens
        self._stream = TokenStream(tokenizer, memory.context, memory.pending)
        self._waiting: list[int] = []
        self._earlier = reading.earlier
        self._decoder = Decoder(str(file), reading.bytes)
        self._digest = hashlib.sha256()

    def read(self) -> Iterator[None]:
        """Read to the end; yields between blocks."""
        decoder = self._decoder
        progress = _Progress(self._file.stat().st_size, decoder.read)
        with open(self._file, "rb") as handle:
            for block in _blocks(handle, decoder.read):
                self._digest.update(block)
            while block := handle.read(BLOCK_BYTES):
                self._take(block)
                progress.show(decoder.read, self._tokens)
                yield
        self._take(b"", final=True)
        progress.show(decoder.read, self._tokens, last=True)

    def so_far(self) -> Memory:
        """The memory of all bytes that make whole characters."""
        self._write(self._waiting)
        self._waiting = []
        # the digest covers whole characters only: what waits in the decoder is read again
        size = self._decoder.read - len(self._decoder.waiting)
        reading = Reading(size, self._digest.hexdigest(), self._earlier)
        return Memory(
            self._cache, self._tokens, self._stream.context, self._stream.pending, reading
        )

    def finish(self) -> Memory:
        """The memory of the whole file."""
        memory = self.so_far()
        memory.reading, memory.last = None, memory.reading
        return memory

    def _take(self, block: bytes, *, final: bool = False) -> None:
        whole_block = self._decoder.waiting + block
        text = self._decoder.text(block, final=final)
        waiting = self._decoder.waiting
        self._digest.update(whole_block[: len(whole_block) - len(waiting)])
        self._waiting += self._stream.feed(text)
        self._stream.check_waiting(str(self._file), self._decoder.read - len(waiting))
        position = self._tokens % self._piece
        whole = (position + len(self._waiting)) // self._piece * self._piece - position
        if whole > 0:
            self._write(self._waiting[:whole])
            self._waiting = self._waiting[whole:]

    def _write(self, ids: list[int]) -> None:
        import torch

        if not ids:
            return
        check_ids(ids, self._model)
        row = torch.tensor([ids], device=self._model.device)
        prefill(self._model, row, self._cache, piece=self._piece)
        self._tokens += len(ids)
        self._check_finite()

    def _check_finite(self) -> None:
        for number, layer in enumerate(self._cache.layers):
            for name, tensor in layer.state.items():
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise TitansError(
                        f"layer {number}'s {name} is not finite after {self._tokens:,} tokens",
                        where="the model's memory",
                        fix="use another checkpoint; with bfloat16 weights, export float32 ones",
                    )


class _Progress:
    """A line about what has been read, at most one a second."""

    def __init__(self, size: int, done: int) -> None:
        self._size, self._first = size, done
        self._begun = self._shown = time.monotonic()
        self._tokens: int | None = None

    def show(self, done: int, tokens: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if self._tokens is None:
            self._tokens = tokens
        if now - self._shown < PROGRESS_SECONDS and not last:
            return
        self._shown = now
        seconds = max(now - self._begun, 1e-9)
        left = seconds / max(done - self._first, 1) * (self._size - done)
        print(
            f"bytes {done:,}/{self._size:,}  {tokens:,} tokens  "
            f"{(tokens - self._tokens) / seconds:,.0f} tokens/s  {duration(max(left, 0))} left",
            file=sys.stderr,
            flush=True,
        )
