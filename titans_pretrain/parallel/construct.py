"""A model made part by part, so that no host ever holds more of it than its shards and one part.

Every module's weights come from a seed of their own, made of the run's seed and the module's name:
a run begins with the same weights on any mesh. A model of another library is made whole, as only
its own class knows how its weights begin.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from titans_pretrain.baselines import foreign

if TYPE_CHECKING:
    from titans_pretrain.model.modeling_titans import TitansForCausalLM
    from titans_pretrain.parallel.parallelize import Parallel


def skeleton(fields: Mapping[str, Any]) -> "TitansForCausalLM":
    """The whole model on meta: names, shapes and layers, no weights."""
    from titans_pretrain.model.configuration_titans import TitansConfig
    from titans_pretrain.model.modeling_titans import TitansForCausalLM

    with torch.device("meta"):
        return TitansForCausalLM(TitansConfig(**fields)).float()


def construct(
    fields: Mapping[str, Any],
    seed: int,
    parallel: "Parallel | None" = None,
    partition: Callable[[nn.Module], None] | None = None,
) -> Any:
    """The model with the seed's initial weights.

    Embedding, blocks, final norm and head are made on the host in float32 one after another; each
    is given to the mesh and sharded before the next. Weights are equal on any mesh.

    Args:
        fields: of TitansConfig, or the keys of another library's model.
        seed: of the initial weights.
        parallel: the mesh to apply; None leaves the parts as they are.
        partition: shards a part over the data ranks; None leaves it whole.
    """
    if foreign.is_foreign(fields):
        return _whole(fields, seed, parallel, partition)
    model = skeleton(fields)
    for name in _units(model):
        unit = model.get_submodule(name)
        if name == "lm_head" and model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        else:
            _materialise(model, unit, name, seed)
        if parallel is not None:
            parallel.apply(unit, name)
        if partition is not None:
            partition(unit)
    return model


def _whole(
    fields: Mapping[str, Any],
    seed: int,
    parallel: "Parallel | None",
    partition: Callable[[nn.Module], None] | None,
) -> nn.Module:
    """Another library's model; its buffers, such as rotary frequencies, keep their precision."""
    model = foreign.build(fields, seed)
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    if parallel is not None:
        parallel.apply(model, "")
    if partition is not None:
        partition(model)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    return model


def _units(model: "TitansForCausalLM") -> Iterator[str]:
    """Names of the parts that together are the model."""
    yield "model.embed_tokens"
    for index in range(len(model.model.layers)):
        yield f"model.layers.{index}"
    yield "model.norm"
    yield "lm_head"


def _materialise(model: "TitansForCausalLM", unit: nn.Module, name: str, seed: int) -> None:
    """Give a part its initial weights, on the host; the random state, a GPU's too, stays."""
    if next(unit.buffers(), None) is not None:
        raise ValueError(f"{name} has buffers, which would not be initialised")
    unit.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        for inner, module in unit.named_modules():
            place = ".".join(part for part in (name, inner) if part)
            torch.default_generator.manual_seed(_seed(seed, place))  # no GPU's
            model._init_weights(module)


def _seed(seed: int, name: str) -> int:
    """63 bits that differ between modules and between runs' seeds."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
