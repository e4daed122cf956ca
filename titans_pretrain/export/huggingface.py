"""A checkpoint as a Hugging Face directory that needs torch and transformers, nothing of ours."""

from pathlib import Path
from typing import Any

import torch

from titans_pretrain import config as run_config
from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import model_card, reload, tokenizer, verification, weights
from titans_pretrain.files import atomic_directory, sha256_file

FORMAT = "titans-export/1"
CONFIGURATION = "config.yaml"
TOKENIZER = "tokenizer.model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: Path, out: Path, *, dtype: str = "float32", max_shard_size: str = "5GB"
) -> Path:
    """Write ``out``, whole or not at all, and prove it in a clean process before it gets its name.

    Where the same export is there already, it stays as it is: a job may be done twice.

    Args:
        checkpoint: a ``step-N`` directory, or a run's directory for its newest good one.
        out: the directory to make; must not exist, or be what this call would make.
        dtype: ``float32`` or ``bfloat16``, of the written weights.
        max_shard_size: bytes of tensors in a weights file, such as ``5GB``.

    Returns:
        The checkpoint that was exported.

    Raises:
        UserError: ``out`` is another directory, no checkpoint, or a bad argument.
        TitansError: the checkpoint is damaged, or the exported model is not the trained one.
    """
    if dtype not in DTYPES:
        raise UserError(f"{dtype!r} is unknown", where="--dtype", fix="use float32 or bfloat16")
    limit = weights.shard_bytes(max_shard_size)
    taken = UserError(f"{out} exists", where=str(out), fix="give a directory that does not")
    if out.exists() and not (out / manifest.NAME).is_file():
        raise taken
    source = layout.resolve(checkpoint)
    made = _made(source, dtype, limit)
    if out.exists():
        if _is_there(out, made):
            return source
        raise taken
    run = run_config.load(_file(source, CONFIGURATION))
    pieces = _file(source, TOKENIZER).read_bytes()
    try:
        _export(source, out.absolute(), run, pieces, DTYPES[dtype], limit, made)
    except OSError as error:
        raise TitansError(
            f"cannot write {error.filename or out}: {error.strerror or error}",
            where=str(out),
            fix="free space, or give another directory; nothing was left behind",
        ) from None
    return source


def _made(source: Path, dtype: str, limit: int) -> dict[str, Any]:
    """What tells one export from another."""
    checkpoint = sha256_file(_file(source, manifest.NAME))
    return {"checkpoint": checkpoint, "dtype": dtype, "shard_bytes": limit}


def _is_there(out: Path, made: dict[str, Any]) -> bool:
    """Whether a directory is that export, all its files of the right size.

    Raises:
        TitansError: it cannot be read, or is damaged.
    """
    same: bool = manifest.read(out).get("made") == made
    if same and (problems := manifest.problems(out, contents=False)):
        raise TitansError(
            f"the export that is there is damaged: {problems[0]}",
            where=str(out),
            fix="remove it and export again",
        )
    return same


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
        reference = _reference(source, _model_class(run), _configuration(run, pieces, dtype))
        files = weights.write(source, directory, dtype, limit)
        _write_model_files(reference, directory)
        tokenizer.write(pieces, directory)
        card = model_card.write(source, run, weights.shapes(source), _name(dtype))
        (directory / model_card.NAME).write_text(card, encoding="utf-8")
        verification.verify(
            directory, reference, lambda names: weights.read(source, names, dtype), dtype, pieces
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
            },
        }
        manifest.write(directory, files, facts)


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


def _reference(checkpoint: Path, model_class: Any, config: Any) -> Any:
    """The model of the installed code, without weights; the checkpoint has those it wants."""
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
    if type(model).__module__.startswith(f"{__package__.partition('.')[0]}."):
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
