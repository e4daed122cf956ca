"""A checkpoint as a Hugging Face directory that needs torch and transformers, nothing of ours."""

import errno
import hashlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from titans_pretrain import config as run_config
from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import (
    model_card,
    reference,
    reload,
    tokenizer,
    verification,
    weights,
)
from titans_pretrain.files import atomic_directory, sha256_file

FORMAT = "titans-export/1"
CONFIGURATION = "config.yaml"
TOKENIZER = "tokenizer.model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclass(frozen=True)
class Exported:
    """What a call of ``export`` came to.

    Attributes:
        checkpoint: that was exported.
        is_new: whether this call made and proved it; else it was there, every byte as it was made.
    """

    checkpoint: Path
    is_new: bool


def export(
    checkpoint: Path, out: Path, *, dtype: str = "float32", max_shard_size: str = "5GB"
) -> Exported:
    """Write ``out``, whole or not at all, and prove it in a clean process before it gets its name.

    Where the same export is there already, its bytes are compared with its manifest and it stays
    as it is: a job may be done twice.

    Args:
        checkpoint: a ``step-N`` directory, or a run's directory for its newest good one.
        out: the directory to make; must not exist, or be what this call would make.
        dtype: ``float32`` or ``bfloat16``, of the written weights.
        max_shard_size: bytes of tensors in a weights file, such as ``5GB``.

    Raises:
        UserError: ``out`` is another directory, no checkpoint, or a bad argument.
        TitansError: the checkpoint is damaged, or the exported model is not the trained one.
    """
    if dtype not in DTYPES:
        raise UserError(f"{dtype!r} is unknown", where="--dtype", fix="use float32 or bfloat16")
    limit = weights.shard_bytes(max_shard_size)
    if out.exists() and not (out / manifest.NAME).is_file():
        raise _taken(out, "it is no export")
    source = layout.resolve(checkpoint)
    run = run_config.load(_file(source, CONFIGURATION))
    _check_runs_on_cpu(run)
    try:
        made = _made(source, run, dtype, limit)
        if out.exists():
            _check_there(out, made)
            return Exported(source, is_new=False)
        pieces = _file(source, TOKENIZER).read_bytes()
        _export(source, out.absolute(), run, pieces, DTYPES[dtype], limit, made)
    except OSError as error:
        raise _failed(source, out, error) from None
    return Exported(source, is_new=True)


def _check_runs_on_cpu(run: RunConfig) -> None:
    name = run.model.get(foreign.KEY)
    if name is not None and foreign.package(str(name)) in foreign.NEEDS_GPU:
        raise UserError(
            f"an export is proven on the CPU, where the layers of {name} do not run",
            where="model.hf",
            fix="export a model that runs anywhere, such as llama or mamba2",
        )


def _made(source: Path, run: RunConfig, dtype: str, limit: int) -> dict[str, Any]:
    """What tells one export from another."""
    return {
        "checkpoint": sha256_file(_file(source, manifest.NAME)),
        "dtype": dtype,
        "shard_bytes": limit,
        "version": version("titans-pretrain"),
        "code": _code(_model_class(run)),
    }


def _code(model_class: Any) -> str | None:
    """The sha256 of the files that are copied with a model of ours; None of another library's."""
    from transformers.dynamic_module_utils import get_relative_import_files

    if not _is_ours(model_class):
        return None
    entrance = inspect.getfile(model_class)
    digest = hashlib.sha256()
    for path in sorted({Path(name) for name in (entrance, *get_relative_import_files(entrance))}):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _is_ours(model_class: Any) -> bool:
    return bool(model_class.__module__.startswith(f"{__package__.partition('.')[0]}."))


def _check_there(out: Path, made: dict[str, Any]) -> None:
    """Refuse a directory that is not that export.

    Raises:
        UserError: it is another one.
        TitansError: it cannot be read, or is damaged.
    """
    found = manifest.read(out).get("made") or {}
    for name, value in made.items():
        if found.get(name) != value:
            raise _taken(out, f"its {name} is {found.get(name)}, not {value}")
    if problems := manifest.problems(out):
        raise TitansError(
            f"the export that is there is damaged: {problems[0]}",
            where=str(out),
            fix="remove it and export again",
        )


def _taken(out: Path, why: str) -> UserError:
    return UserError(
        f"{out} exists, and is not this export: {why}",
        where=str(out),
        fix="give a directory that does not exist, or remove this one",
    )


def _failed(source: Path, out: Path, error: OSError) -> TitansError:
    """What the system refused: a file to read, space to write, or something else."""
    reason, name = error.strerror or str(error), error.filename
    place = Path(str(name)).absolute() if name is not None else None
    if place is not None and place.is_relative_to(source.absolute()):
        what, fix = f"cannot read {place}: {reason}", "mend that (permissions, file system)"
    elif error.errno in _FULL or (place and place.is_relative_to(out.absolute().parent)):
        what, fix = f"cannot write {name or out}: {reason}", "free space, or give another directory"
    else:
        what, fix = f"cannot export: {f'{name}: ' if name else ''}{reason}", "mend that"
    return TitansError(what, where=str(out), fix=f"{fix}; nothing was left behind")


def _export(
    source: Path,
    out: Path,
    run: RunConfig,
    pieces: bytes,
    dtype: torch.dtype,
    limit: int,
    made: dict[str, Any],
) -> None:
    with atomic_directory(out) as directory:
        model = _weightless(source, run, pieces, dtype)
        files = weights.write(source, directory, dtype, limit)
        _write_model_files(model, directory)
        tokenizer.write(pieces, directory)
        card = model_card.write(source, run, weights.shapes(source), _name(dtype))
        (directory / model_card.NAME).write_text(card, encoding="utf-8")
        verification.verify(
            directory,
            model,
            lambda ids: reference.logits(source, model, dtype, ids),
            dtype,
            pieces,
            _named(run),
        )
        known = {record.name for record in files}
        others = [path.name for path in directory.iterdir() if path.name not in known]
        files += [manifest.record_file(directory, name) for name in others]
        state = layout.read_state(source)
        facts = {
            "format": FORMAT,
            "made": made,
            "step": state.get("step"),
            "dtype": _name(dtype),
            "training": {
                "fingerprint": state.get("fingerprint"),
                "sequence_length": run.data.sequence_length,
                "validation_fraction": run.data.validation_fraction,
                foreign.KEY: run.model.get(foreign.KEY),
            },
        }
        manifest.write(directory, files, facts)


def _named(run: RunConfig) -> str | None:
    """``module:Class`` of a package that must be imported for the model, if any."""
    name = str(run.model.get(foreign.KEY))
    return name if foreign.package(name) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file(checkpoint: Path, name: str) -> Path:
    path = checkpoint / name
    if not path.is_file():
        raise TitansError(
            f"the checkpoint holds no {name}", where=str(checkpoint), fix="export one of a run"
        )
    return path


def _configuration(run: RunConfig, pieces: bytes, dtype: torch.dtype) -> Any:
    """The configuration of the run's model, with the tokenizer's special ids."""
    from titans_pretrain.model.configuration_titans import TitansConfig

    if (count := tokenizer.size(pieces)) > run.model["vocab_size"]:
        raise TitansError(
            f"the tokenizer has {count} pieces, the model {run.model['vocab_size']}",
            where=TOKENIZER,
            fix="export a checkpoint whose tokenizer.model is that of its data",
        )
    ids = tokenizer.special_ids(pieces)
    if foreign.is_foreign(run.model):
        config = foreign.configuration(run.model, **ids)
    else:
        config = TitansConfig(**(run.model | ids))
    config.architectures = [_model_class(run).__name__]
    config.dtype = _name(dtype)
    return config


def _model_class(run: RunConfig) -> Any:
    from titans_pretrain.model.modeling_titans import TitansForCausalLM

    if foreign.is_foreign(run.model):
        return foreign.classes(run.model[foreign.KEY])[0]
    return TitansForCausalLM


def reference_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """A checkpoint's model of the installed code, without weights."""
    run = run_config.load(_file(checkpoint, CONFIGURATION))
    return _weightless(checkpoint, run, _file(checkpoint, TOKENIZER).read_bytes(), dtype)


def _weightless(checkpoint: Path, run: RunConfig, pieces: bytes, dtype: torch.dtype) -> Any:
    """The model of the installed code; the checkpoint has the weights it wants."""
    model_class, config = _model_class(run), _configuration(run, pieces, dtype)
    with reload.weightless():
        model = model_class(config)
    weights.check_names(
        weights.shapes(checkpoint), {name: tuple(p.shape) for name, p in model.named_parameters()}
    )
    return model


def _write_model_files(model: Any, directory: Path) -> None:
    """config.json, generation_config.json and, by Hugging Face's own mechanism, code of ours."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config
    if _is_ours(type(model)):
        type(config).register_for_auto_class()
        for name, part in (("AutoModel", model.base_model), ("AutoModelForCausalLM", model)):
            type(part).register_for_auto_class(name)
            custom_object_save(part, directory, config=config)
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(directory)
