"""Initial weights out of a directory that ``titans export`` wrote, for any mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import manifest
from titans_pretrain.checkpoint.tensor_file import read_part
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import tokenizer
from titans_pretrain.export.reload import WeightFiles
from titans_pretrain.files import sha256_file
from titans_pretrain.parallel.construct import skeleton
from titans_pretrain.parallel.shards import FlatShard
from titans_pretrain.train import initial_fields
from titans_pretrain.train.initial_fields import refusal

PREFIX = "parameters/"
READABLE = ("F64", "F32", "F16", "BF16")
_SHOWN = 3
_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError)
_Read = TypeVar("_Read")


def check(config: RunConfig, tokenizer_model: bytes) -> dict[str, Any]:
    """Whether a run may begin with the weights of ``train.init_from``; reads every byte of them.

    Args:
        config: the run.
        tokenizer_model: contents of its data's sentencepiece model.

    Returns:
        What to remember of them: ``name`` of the directory, and where it has a manifest
        ``manifest_sha256``, ``step`` and ``checkpoint`` (sha256 of the checkpoint's manifest).

    Raises:
        UserError: there are none; they are damaged, of another model or another tokenizer.
    """
    directory = Path(config.train.init_from)
    found = initial_fields.check(config)
    _check_files(directory)
    _check_weights(directory, config)
    _check_tokenizer(directory, tokenizer_model, found)
    told: dict[str, Any] = {"name": directory.name}
    if (directory / manifest.NAME).is_file():
        facts = manifest.read(directory)
        told |= {"manifest_sha256": sha256_file(directory / manifest.NAME)}
        told |= {"step": facts.get("step")}
        told |= {"checkpoint": facts.get("made", {}).get("checkpoint")}
    return told


@torch.no_grad()
def fill(directory: Path, shards: Sequence[FlatShard]) -> None:
    """Read the parameters among a rank's shards out of the files; no more than its own parts.

    Args:
        directory: what ``check`` allowed.
        shards: the rank's parts, written in place; those of moments stay.

    Raises:
        UserError: a file cannot be read.
    """
    files = _read(directory, lambda: WeightFiles(directory))
    for shard in shards:
        if shard.name.startswith(PREFIX):
            _read(directory, functools.partial(_fill, files, shard))


def _fill(files: WeightFiles, shard: FlatShard) -> None:
    name = shard.name.removeprefix(PREFIX)
    with safe_open(files.place(name), framework="pt") as handle:
        for box in shard.boxes():
            part = read_part(handle, name, box.offsets, box.sizes)
            target = shard.tensor[box.start - shard.start : box.stop - shard.start]
            target.copy_(part.reshape(-1))


def _check_files(directory: Path) -> None:
    """Refuse what differs from the manifest; one that transformers saved has none."""
    if not (directory / manifest.NAME).exists():
        return
    if problems := manifest.problems(directory):
        fix = f"export it again, or delete {manifest.NAME} if the change is yours"
        raise refusal(directory, f"the model is damaged: {'; '.join(problems[:_SHOWN])}", fix)


def _skeleton(config: RunConfig) -> Any:
    """The run's model without weights."""
    build = foreign.skeleton if foreign.is_foreign(config.model) else skeleton
    return build(config.model)


def _check_weights(directory: Path, config: RunConfig) -> None:
    """Refuse weights whose names, shapes or types are not those of the model."""
    files = _read(directory, lambda: WeightFiles(directory))
    differences = files.differences(_skeleton(config))
    complaints = [
        f"{problem}: {', '.join(names[:_SHOWN])}" for problem, names in differences.items() if names
    ]
    complaints += [f"of type {code}" for code in files.dtypes if code not in READABLE]
    if complaints:
        what = f"the weights are not those of config.json: {'; '.join(complaints)}"
        raise refusal(directory, what, "export it again")


def _check_tokenizer(directory: Path, model: bytes, found: Mapping[str, Any]) -> None:
    """Refuse weights that were trained on other token ids than the data's."""
    from transformers import PreTrainedTokenizerFast

    fix = "prepare the data with the tokenizer that the weights were trained with"
    end = tokenizer.special_ids(model)["eos_token_id"]
    if found.get("eos_token_id") != end:
        what = f"documents end with id {end} in the data, with {found.get('eos_token_id')} there"
        raise refusal(directory, what, fix)
    theirs = _read(directory, lambda: PreTrainedTokenizerFast.from_pretrained(directory))
    try:
        tokenizer.check_identity(model, lambda text: theirs(text)["input_ids"])
    except UserError:
        raise
    except TitansError as error:
        what = error.what.replace("the exported tokenizer", "another tokenizer than the data's")
        raise refusal(directory, what, fix) from None


def _read(directory: Path, action: Callable[[], _Read]) -> _Read:
    try:
        return action()
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise refusal(directory, f"the model cannot be read: {reason}", "export it again") from None
