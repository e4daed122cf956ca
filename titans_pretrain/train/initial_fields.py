"""Whether exported weights are of the run's model, as their config.json tells. No torch here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import UserError
from titans_pretrain.files import read_json
from titans_pretrain.model import fields

# What begins weights, and what tells documents apart: a run may go on with others.
FREE = (
    "initializer_range",
    "forget_bias",
    "attend_across_documents",
    "remember_across_documents",
)
# Of other libraries' models, what decides nothing that is computed on ids of one document.
_FREE_OF_OTHERS = (
    "initializer_range",
    *foreign.OF_THE_TOKENIZER,
    "sep_token_id",
    "decoder_start_token_id",
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
    "transformers_version",
    "auto_map",
    "_name_or_path",
)


def check(config: RunConfig) -> dict[str, Any]:
    """Whether ``train.init_from`` is an exported model that computes what the run's model does.

    Args:
        config: the run.

    Returns:
        Its ``config.json``.

    Raises:
        UserError: there is none, or it is of another model.
    """
    directory = Path(config.train.init_from)
    found = _settings(directory)
    _check_fields(directory, config, found)
    return found


def refusal(directory: Path, what: str, fix: str) -> UserError:
    """The error about initial weights."""
    return UserError(what, where=f"train.init_from: {directory}", fix=fix)


def _settings(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of an exported model."""
    fix = "give what titans export wrote"
    if (directory / "checkpoints").is_dir() or (directory / "tensors.json").is_file():
        fix = f"export it first: titans export {directory} MODEL_DIR"
    if not directory.is_dir():
        raise refusal(directory, "no such directory", fix)
    found = read_json(directory / "config.json")
    if found is None:
        raise refusal(directory, "no exported model: it holds no readable config.json", fix)
    return found


def _check_fields(directory: Path, config: RunConfig, found: Mapping[str, Any]) -> None:
    """Refuse a model that computes something else."""
    from titans_pretrain.model.configuration_titans import TitansConfig

    other = foreign.is_foreign(config.model)
    kind = foreign.classes(config.model[foreign.KEY])[1].model_type if other else "titans"
    if found.get("model_type") != kind:
        what = f"the model is of type {found.get('model_type')!r}, not {kind!r}"
        raise refusal(directory, what, "give an exported model of the run's kind")
    ours = foreign.configuration(config.model) if other else TitansConfig(**config.model)
    try:
        theirs = type(ours).from_dict(type(ours).get_config_dict(directory)[0])
    except Exception as error:  # whatever the class thinks of what the file holds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"the model cannot be read: {reason}"
        raise refusal(directory, what, "export it again") from None
    own_values, their_values = (_deciding(one, config) for one in (ours, theirs))
    for name in dict.fromkeys((*own_values, *their_values)):
        own, told = own_values.get(name), their_values.get(name)
        if own != told:
            what = f"model.{name}: {own!r} is not the {told!r} of the initial weights"
            fix = f"use model.{name}={json.dumps(told)}, or other weights"
            raise refusal(directory, what, fix)


def _deciding(settings: Any, config: RunConfig) -> dict[str, Any]:
    """What decides what a model computes on one document; of another library's, all but a list."""
    if not foreign.is_foreign(config.model):
        variant = config.model["variant"]
        used = [field.name for field in fields.FIELDS if variant in field.variants]
        return {name: getattr(settings, name) for name in used if name not in FREE}
    told: dict[str, Any] = json.loads(json.dumps(settings.to_dict(), default=str))
    return {name: value for name, value in told.items() if name not in _FREE_OF_OTHERS}
