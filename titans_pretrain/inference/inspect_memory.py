"""What a model's memory does along a text: surprise, gates, writes and states, layer by layer."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError
from titans_pretrain.files import atomic_file, write_json
from titans_pretrain.inference import generate
from titans_pretrain.inference.memory_picture import draw
from titans_pretrain.inference.memory_trace import Inspection, trace
from titans_pretrain.inference.prefill import check_memory
from titans_pretrain.inference.prompts import check_ids
from titans_pretrain.inference.text_file import Decoder
from titans_pretrain.inference.token_stream import TokenStream

FORMAT = "titans-memory-trace/1"
MARKED = 12
_BLOCK = 4096  # bytes
_DIGITS = 6
_ASCII = re.compile("^<0x([0-7][0-9A-F])>$")


def inspect_memory(
    directory: Path,
    file: Path,
    picture: Path,
    *,
    tokens: int = 1024,
    layers: Sequence[int] | None = None,
    device: str = "auto",
) -> Inspection:
    """Draw a text's trace in the memory, and write its numbers beside it as JSON.

    Args:
        directory: what ``titans export`` wrote, of a variant with memory.
        file: the text, UTF-8.
        picture: the PNG; ``numbers_path`` tells where the numbers go.
        tokens: of the text, the first; fewer where it is shorter.
        layers: numbers of the layers, from 0; None for all.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.

    Returns:
        What was drawn.

    Raises:
        UserError: the model has no memory or no such layer, the text is empty or not UTF-8, or
            a file is in the way.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    _check_paths(file, picture)
    disable_progress_bar()
    set_verbosity_error()
    place = generate.choose_device(device)
    check_memory(generate.settings(directory), str(directory))
    model, tokenizer = generate.load(directory, device=place)
    ids = _read(file, tokenizer, tokens)
    check_ids(ids, model)
    chosen = _layers(layers, model.config.num_hidden_layers)
    model.to(place)
    traces = trace(model, ids, chosen)
    written = zip(*(one.written for one in traces.values()), strict=True)
    moved = [sum(column) / len(chosen) for column in written]
    most = sorted(range(len(ids)), key=lambda position: -moved[position])[:MARKED]
    found = Inspection(_spelt(tokenizer, ids), traces, most, moved)
    with atomic_file(picture) as handle:
        draw(found, handle, title=f"{directory.name}, {file.name}")
    write_json(numbers_path(picture), _facts(found, directory, file, model))
    return found


def numbers_path(picture: Path) -> Path:
    """The file of a picture's numbers: ``look.memory.json`` for ``look.png``."""
    return picture.with_name(picture.stem.removesuffix(".memory") + ".memory.json")


def _check_paths(file: Path, picture: Path) -> None:
    """Refuse what would fail only after the work, or write over something else."""
    if picture.suffix != ".png":
        raise UserError(
            f"{picture.name} is no name of a PNG", where="--output", fix="let it end with .png"
        )
    if not file.is_file():
        raise UserError(f"{file} is no file", where=str(file), fix="give a text file")
    if not (picture.parent.is_dir() and os.access(picture.parent, os.W_OK)):
        raise UserError(
            f"nothing can be written into {picture.parent}",
            where="--output",
            fix="make the directory, or change its permissions",
        )
    numbers = numbers_path(picture)
    if file.resolve() in (picture.resolve(), numbers.resolve()):
        raise UserError(f"{file} would be written over", where="--output", fix="give another name")
    if numbers.exists() and not _is_ours(numbers):
        raise UserError(
            f"{numbers} is there and is no memory's numbers",
            where="--output",
            fix="give another name, or move it away",
        )


def _is_ours(numbers: Path) -> bool:
    try:
        told = json.loads(numbers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("format") == FORMAT


def table(found: Inspection) -> str:
    """The layers' means, and the tokens that moved the memory most, as text."""
    lines = ["layer  surprise  forget  momentum    step  kept by clip  moved  change of weights"]
    for number, one in found.layers.items():
        means = [_mean(v) for v in (one.surprise, one.forget, one.momentum, one.step)]
        means += [_mean(one.clip), _mean(one.written)]
        change = one.change[-1] / one.start
        lines.append(
            "{:5d}  {:8.3g}  {:6.3f}  {:8.3f}  {:6.3f}  {:11.0%}  {:5.3g}  {:16.1%}".format(
                number, *means, change
            )
        )
    words = ", ".join(f"{found.tokens[at]!r} ({at})" for at in found.most)
    return "\n".join([*lines, f"moved the memory most: {words}", ""])


def _read(file: Path, tokenizer: Any, count: int) -> list[int]:
    """The text's first tokens."""
    stream, decoder = TokenStream(tokenizer), Decoder(str(file))
    ids: list[int] = []
    with open(file, "rb") as handle:
        while len(ids) < count and (block := handle.read(_BLOCK)):
            ids += stream.feed(decoder.text(block))
            stream.check_waiting(str(file), decoder.read - len(decoder.waiting))
    if len(ids) < count:
        ids += stream.finish(decoder.text(b"", final=True))
    if not ids:
        raise UserError("the text is empty", where=str(file), fix="give a file with text")
    return ids[:count]


def _layers(asked: Sequence[int] | None, count: int) -> list[int]:
    chosen = sorted(set(range(count) if asked is None else asked))
    if chosen[-1] >= count:
        raise UserError(
            f"there is no layer {chosen[-1]}", where="--layer", fix=f"use 0 to {count - 1}"
        )
    return chosen


def _spelt(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Every token's text; a byte that is no character alone by its number."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [_ASCII.sub(lambda m: chr(int(m[1], 16)), piece).replace("▁", " ") for piece in pieces]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _facts(found: Inspection, directory: Path, file: Path, model: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": str(directory),
        "file": str(file),
        "variant": model.config.variant,
        "chunk_size": model.config.chunk_size,
        "tokens": found.tokens,
        "moved": _short(found.moved),
        "most": found.most,
        "layers": {
            str(number): {name: _short(values) for name, values in vars(one).items()}
            for number, one in found.layers.items()
        },
    }


def _short(values: Any) -> Any:
    if isinstance(values, float):
        return float(f"{values:.{_DIGITS}g}")
    return [_short(value) for value in values] if isinstance(values, list) else values
