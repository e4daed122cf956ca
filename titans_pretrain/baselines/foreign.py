"""Causal language models of other libraries, found and built by their Hugging Face classes.

``model.hf`` names one: a ``model_type`` of transformers, one of this package's own (``OWN``), or
``module:Class`` of an installed package. The other keys of ``model`` are those of its
configuration.
"""

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from titans_pretrain.baselines import gpu_packages
from titans_pretrain.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

KEY = "hf"
OWN = {"titans_baseline": "titans_pretrain.model.modeling_baseline:BaselineForCausalLM"}
_OURS = __name__.partition(".")[0]
NEEDS_GPU = ("fla",)  # packages whose layers are GPU kernels
MAMBA = ("mamba", "mamba2")
MAMBA_EMBEDDING = 0.02  # standard deviation of mamba-ssm's
LOOKS_BACK = "is_decoder"  # the key, in classes that have it, without which they look ahead
NO_DROPOUT = ("classifier_dropout", "summary_first_dropout")  # of other heads
BROKEN = {  # by model_type
    "rwkv": "divides its own weights when it is evaluated, and reads otherwise with its cache",
    "recurrent_gemma": "reads otherwise with its cache than without, and with pads on the left",
}
EXTRA = "pip install 'titans-pretrain[gpu]'"
OF_THE_TOKENIZER = ("pad_token_id", "bos_token_id", "eos_token_id")
_SET_HERE = ("model_type", "use_cache", "dtype", "torch_dtype", *OF_THE_TOKENIZER)
_ROTARY = ("rope_parameters", "rope_scaling")


def is_foreign(model: Mapping[str, Any]) -> bool:
    """Whether a model is another library's, not one of the Titans family."""
    return KEY in model


def resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys of a model and fill in ``vocab_size``.

    The defaults of this package's own classes are filled in too. Those of a library stay its own,
    as of the version that is installed.

    Raises:
        UserError: no such class or package, an unknown key, or a value that is not taken; ``where``
            is the key, such as ``model.hidden_size``.
    """
    config = configuration(given)
    filled = {KEY: given[KEY], "vocab_size": config.vocab_size}
    if given[KEY] in OWN:
        usual = _usual(type(config))
        filled |= {name: getattr(config, name) for name in usual if name not in _SET_HERE}
    return filled | dict(given)


def complete(model: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a model's configuration, those of the installed library's defaults too.

    Raises:
        UserError: see ``resolve``.
    """
    whole: dict[str, Any] = configuration(model).to_dict()
    return {**whole, KEY: model[KEY]}


def classes(name: Any) -> tuple[Any, Any]:
    """The model's and the configuration's class of a value of ``model.hf``.

    Without a GPU its layers are bound to plain torch.

    Raises:
        UserError: there is none, or its package is not installed.
    """
    if not isinstance(name, str) or not name:
        raise _error(KEY, f"{name!r} is no name", "give a model_type, or module:Class")
    module, colon, _ = name.partition(":")
    if colon and module.partition(".")[0] == _OURS:
        what = f"{name!r} is this package's own class, under another name"
        raise _error(KEY, what, f"use hf: {', '.join(OWN)}, or model.variant for Titans")
    with gpu_packages.for_device(keep=package(name)):
        return _installed(OWN.get(name, name)) if ":" in name or name in OWN else _known(name)


def _known(name: str) -> tuple[Any, Any]:
    """The classes of a ``model_type`` of transformers."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _error(
            KEY,
            f"transformers knows no causal language model {name!r}",
            _like(name, [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OWN]),
        )
    config_class = CONFIG_MAPPING[name]
    return AutoModelForCausalLM._model_mapping[config_class], config_class


def configuration(model: Mapping[str, Any], **ids: int) -> Any:
    """The configuration of a model, every key of it known to its class and taken as given.

    Args:
        model: ``hf`` and the keys.
        ids: token ids of the tokenizer; those not given are None.

    Raises:
        UserError: see ``resolve``.
    """
    model_class, config_class = classes(model[KEY])
    keys = {name: value for name, value in model.items() if name != KEY}
    usual = _usual(config_class)
    for name, value in keys.items():
        _check_key(name, value, usual, config_class.__name__)
    wanted = {
        name: float(value) if type(usual[name]) is float and type(value) is int else value
        for name, value in keys.items()
    }
    try:
        config = config_class(**wanted, **(dict.fromkeys(OF_THE_TOKENIZER) | ids))
    except Exception as error:
        raise _refused(config_class.__name__, error) from None
    for name, value in wanted.items():
        if (taken := getattr(config, name, None)) != value and not _holds(taken, value):
            raise _error(
                name, f"{value!r} was given, {config_class.__name__} made it {taken!r}", "change it"
            )
    _check_kind(config, model_class)
    return config


def build(model: Mapping[str, Any], seed: int) -> "nn.Module":
    """The whole model in float32 on the host, with its class's own initial weights of that seed.

    Those of Mamba and Mamba2 are mamba-ssm's, with ``initializer_range`` for the embeddings.
    Every process that asks gets the same weights; the random state stays as it is.

    Raises:
        UserError: the class refuses its configuration, or cannot be trained here.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _build(model)
        if network.config.model_type in MAMBA:
            _begin_as_mamba_ssm(network, model.get("initializer_range", MAMBA_EMBEDDING))
    check_state(network, type(network).__name__)
    return network


def _begin_as_mamba_ssm(network: Any, embedding: float) -> None:
    """Change what mamba-ssm begins otherwise; the embeddings have that standard deviation."""
    from torch import nn

    from titans_pretrain.model.baseline_layers import begin_as_mamba_ssm

    for layer in network.backbone.layers:
        begin_as_mamba_ssm(layer.mixer, len(network.backbone.layers))
    nn.init.normal_(network.backbone.embeddings.weight, std=embedding)
    if not network.config.tie_word_embeddings:
        network.lm_head.reset_parameters()


def skeleton(model: Mapping[str, Any]) -> "nn.Module":
    """The model on meta: names and shapes, no weights."""
    import torch

    with torch.device("meta"):
        return _build(model)


def check_state(network: "nn.Module", name: str) -> None:
    """Refuse a model that changes in training besides by its gradients, or not by them.

    Raises:
        UserError: it has persistent buffers, which checkpoints do not hold, or frozen parameters.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    kept = [key for key in network.state_dict() if key not in parameters]
    frozen = [key for key, value in parameters.items() if not value.requires_grad]
    for names, what in ((kept, "keeps state that is no parameter"), (frozen, "freezes parameters")):
        if names:
            raise UserError(
                f"{name} {what}: {', '.join(names[:3])}",
                where="model.hf",
                fix="use a class all of whose state is trained",
            )


def check_device(model: Mapping[str, Any], device: str) -> None:
    """Refuse to compute on the CPU with layers that are GPU kernels.

    Args:
        model: resolved keys.
        device: kind of the device, such as ``cpu``.

    Raises:
        UserError: the model's package needs a GPU.
    """
    if device == "cpu" and package(str(model[KEY])) in NEEDS_GPU:
        raise UserError(
            f"the layers of {model[KEY]} are GPU kernels, and there is no GPU here",
            where="model.hf",
            fix="train it on a GPU, or take a baseline that runs anywhere, such as llama or mamba2",
        )


def package(name: str) -> str | None:
    """The package that a value of ``model.hf`` needs besides transformers and this one, if any."""
    module, colon, _ = name.partition(":")
    root = module.partition(".")[0]
    return root if colon and root not in ("transformers", _OURS) else None


def can_recompute(model: Mapping[str, Any]) -> bool:
    """Whether the class supports activation checkpointing."""
    return bool(getattr(classes(model[KEY])[0], "supports_gradient_checkpointing", False))


def longest(model: Mapping[str, Any]) -> int | None:
    """Positions that the model has; None where it needs none."""
    found = getattr(configuration(model), "max_position_embeddings", None)
    return int(found) if found else None


def name_of(model: Mapping[str, Any]) -> str:
    """What the model is called in reports."""
    name = str(model[KEY])
    if name in OWN:
        memory = ["memory embeddings"] if model.get("memory_embeddings") else []
        return " + ".join([*configuration(model).mixers, *memory])
    return name if ":" not in name else name.split(":")[1].removesuffix("ForCausalLM")


def _build(model: Mapping[str, Any]) -> "PreTrainedModel":
    config = configuration(model)
    model_class, _ = classes(model[KEY])
    try:
        network: PreTrainedModel = model_class(config).float()
    except Exception as error:
        raise _refused(model_class.__name__, error) from error
    return network


def _installed(name: str) -> tuple[Any, Any]:
    """The classes of ``module:Class``."""
    from transformers import GenerationMixin, PreTrainedModel

    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if gpu_packages.is_hidden(missing):
            what = f"the layers of {name!r} are GPU kernels, which no CPU runs"
            raise _error(KEY, what, "use --device cuda, on a machine with a GPU") from None
        fix = EXTRA if missing in (*NEEDS_GPU, "triton") else f"install {missing}, or correct it"
        raise _error(KEY, f"{name!r} needs the package {missing!r}", fix) from None
    except Exception as error:
        raise _error(KEY, f"{module} cannot be imported: {_line(error)}", EXTRA) from None
    causal = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not (causal and issubclass(found, GenerationMixin) and found.config_class):
        known = [key for key in vars(importlib.import_module(module)) if key.endswith("CausalLM")]
        fix = nearest(attribute, known) if known else "name a class that ends in ForCausalLM"
        raise _error(KEY, f"{name!r} is no causal language model of Hugging Face's kind", fix)
    return found, found.config_class


def _usual(config_class: Any) -> dict[str, Any]:
    """The keys of a configuration that are its own, with their usual values."""
    from transformers import PretrainedConfig

    usual = config_class()
    values = usual.to_dict()
    base = {*PretrainedConfig().to_dict()} - {"tie_word_embeddings"}
    values |= {name: getattr(usual, name, None) for name in config_class.attribute_map}
    return {name: value for name, value in values.items() if name not in base}


def _check_key(name: str, value: Any, usual: Mapping[str, Any], of: str) -> None:
    if name in _SET_HERE:
        why = "the tokenizer decides it" if name in OF_THE_TOKENIZER else "it is set here"
        raise _error(name, f"not to be given: {why}", "take it out")
    if name == "rescale_prenorm_residual" and value:
        what = "transformers would divide the weights again each time the model is loaded"
        raise _error(name, what, "take it out: initial weights are rescaled without it")
    if name not in usual:
        known = [key for key in usual if key not in _SET_HERE]
        raise _error(name, f"{of} has no such key", nearest(str(name), known))
    wanted = type(usual[name])
    if wanted in (bool, int, float, str, list) and not _has_type(value, wanted):
        raise _error(name, f"{value!r} is no {wanted.__name__}", f"give a {wanted.__name__}")
    if _drops(name, value):
        raise _error(name, f"{value} would not repeat when a run is resumed", "use 0")
    if name in _ROTARY and isinstance(value, dict):
        rotary = _rotary_keys()
        for key in value:
            if rotary and key not in rotary:
                raise _error(f"{name}.{key}", "no such key", nearest(str(key), rotary))


def _like(name: str, known: list[str]) -> str:
    """The nearest of a list that is too long to be shown."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else "give a model_type, or module:Class"


def _rotary_keys() -> set[str]:
    try:
        from transformers.modeling_rope_utils import RopeParameters
    except ImportError:
        return set()
    return {*RopeParameters.__annotations__, "type"}


def _has_type(value: Any, wanted: type) -> bool:
    if wanted is float:
        finite = isinstance(value, int | float) and not isinstance(value, bool)
        return finite and math.isfinite(value)
    if wanted is int and isinstance(value, bool):
        return False
    return isinstance(value, wanted) or (wanted is not bool and value is None)


def _holds(taken: Any, value: Any) -> bool:
    """Whether a configuration took a list or mapping as given, and perhaps added to it."""
    if isinstance(value, dict) and isinstance(taken, dict):
        return all(taken.get(key) == inner for key, inner in value.items())
    if isinstance(value, list) and isinstance(taken, list | tuple):
        return list(taken) == value
    return value is None


def _check_kind(config: Any, model_class: Any) -> None:
    """Refuse what is no decoder of tokens, is broken, or draws random numbers in training."""
    if why := BROKEN.get(config.model_type):
        fix = "choose another, such as llama or mamba2"
        raise _error(KEY, f"transformers' {model_class.__name__} {why}", fix)
    if getattr(config, "is_encoder_decoder", False):
        raise _error(KEY, f"{model_class.__name__} is no decoder alone", "choose a decoder")
    if not getattr(config, LOOKS_BACK, True) and _reads(model_class, LOOKS_BACK):
        raise _error(
            LOOKS_BACK, f"{model_class.__name__} would look ahead", f"add {LOOKS_BACK}: true"
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise _error(KEY, f"{model_class.__name__} has no vocab_size of its own", "choose another")
    for name, value in config.to_dict().items():
        if _drops(name, value):
            raise _error(
                name, f"{value} by default would not repeat when a run is resumed", f"add {name}: 0"
            )


def _drops(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and value > 0
    return number and "drop" in name and name not in NO_DROPOUT


def _reads(model_class: Any, key: str) -> bool:
    """Whether a model's code reads a key of its configuration; examples in docstrings do not."""
    from transformers import PreTrainedModel

    own = [c for c in model_class.__mro__ if issubclass(c, PreTrainedModel)]
    for module in {c.__module__ for c in own if c is not PreTrainedModel}:
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, KeyError):
            return True  # it may
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(">>>")]
        if any(f".{key}" in line or f'"{key}"' in line for line in lines):
            return True
    return False


def _refused(who: str, error: Exception) -> UserError:
    return _error(KEY, f"{who} refuses the model's keys: {_line(error)}", "change them")


def _line(error: Exception) -> str:
    """The last telling line of a message, which is where libraries put the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _error(key: str, what: str, fix: str) -> UserError:
    return UserError(f"model.{key}: {what}", where=f"model.{key}", fix=fix)
