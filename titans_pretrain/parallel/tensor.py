"""Tensor parallelism: every layer of a Titans model shared out over ranks with the same tokens.

Each rank holds some heads of attention and memory (with their states), some channels of the
feed-forward and some of the vocabulary. Hidden states between blocks are whole on every rank. A
block communicates where partial outputs are summed (forward: output and down projection; backward:
the mixer's and the feed-forward's input), and where heads are gathered for a layer that follows on
them inside the mixer (MAC, MAL).

Parameters are cut in place: names stay, tied ones stay one object, and megatron's attributes
``tensor_model_parallel`` and ``partition_dim`` tell which part of which axis a rank holds. Those
that are not cut get the same gradient on every rank, bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from titans_pretrain.errors import TitansError
from titans_pretrain.model.layers import (
    PersistentTokens,
    RMSNorm,
    ShortConvolution,
)
from titans_pretrain.model.neural_memory import Gate, InitialWeights
from titans_pretrain.parallel import tensor_comm
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.replay import Replay


def split(unit: nn.Module, name: str, groups: Groups, replay: Replay) -> None:
    """Keep this rank's part of every layer of ``unit``; nothing changes on one tensor rank.

    Args:
        unit: a whole model or a part of it (embedding, block, norm, head), with its weights.
        name: its full name in the model, ``""`` for the model itself.
        groups: the rank's groups.
        replay: gives a recomputed block what it received before.

    Raises:
        TitansError: a layer is not known here, or does not divide into equal parts.
    """
    if groups.mesh.tensor == 1:
        return
    for place, module in list(unit.named_modules(prefix=name)):
        kind, role = _role(place)
        if role is not None and isinstance(module, kind):
            role(module, _Site(place, groups, replay))
        elif next(module.parameters(recurse=False), None) is not None:
            raise TitansError(
                f"{place} ({type(module).__name__}) is not known to tensor parallelism",
                where="titans_pretrain/parallel/tensor.py",
                fix="say there how it is split, or train with mesh.tensor=1",
            )


class Window(NamedTuple):
    """A rank's part of a parameter.

    Attributes:
        shape: of the whole parameter.
        offsets, sizes: of the part, along every axis.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def logical(parameter: nn.Parameter, groups: Groups) -> Window:
    """Where this rank's part of a parameter lies in the whole, sharded by ZeRO or not."""
    sizes = tuple(getattr(parameter, "ds_shape", parameter.shape))
    shape, offsets = list(sizes), [0] * len(sizes)
    if getattr(parameter, "tensor_model_parallel", False):
        axis: int = getattr(parameter, "partition_dim")  # noqa: B009 - megatron's attribute
        shape[axis] *= groups.mesh.tensor
        offsets[axis] = groups.tensor_rank * sizes[axis]
    return Window(tuple(shape), tuple(offsets), sizes)


class _Site(NamedTuple):
    """A layer's place: its full name, and whom it shares its work with."""

    name: str
    groups: Groups
    replay: Replay

    def exchange(self) -> tensor_comm.Exchange:
        return tensor_comm.Exchange(self.groups.tensor, self.name, self.replay)


def _vocabulary(embedding: nn.Embedding, site: _Site) -> None:
    from titans_pretrain.parallel.tensor_layers import Embedding

    _cut(embedding, 0, site)
    _become(embedding, Embedding(embedding, site.groups.tensor))


def _outputs(linear: nn.Linear, site: _Site) -> None:
    """Some outputs of a layer whose input entered before, or was gathered."""
    from titans_pretrain.parallel.tensor_layers import Column

    _cut(linear, 0, site)
    _become(linear, Column(linear, site.groups.tensor))


def _head(linear: nn.Linear, site: _Site) -> None:
    from titans_pretrain.parallel.tensor_layers import Head

    if linear.bias is not None:
        raise TitansError(f"{site.name} has a bias, which losses would leave out")
    _cut(linear, 0, site)
    _become(linear, Head(linear, site.groups.tensor))


def _gate(gate: Gate, site: _Site) -> None:
    initial_bias = gate.initial_bias
    _outputs(gate, site)
    gate.initial_bias = initial_bias


def _inputs(linear: nn.Linear, site: _Site) -> None:
    """Some inputs, with the partial outputs summed."""
    from titans_pretrain.parallel.tensor_layers import Row

    if linear.bias is not None:
        raise TitansError(f"{site.name} has a bias, which every tensor rank would add")
    _cut(linear, 1, site)
    _become(linear, Row(linear, site.exchange()))


def _last_inputs(linear: nn.Linear, site: _Site) -> None:
    """Like ``_inputs`` for a block's last layer: its recomputation ends before the sum."""
    _inputs(linear, site._replace(replay=Replay(enabled=False)))


def _parts(module: nn.Module, site: _Site) -> None:
    """Some channels or heads, along the first axis."""
    _cut(module, 0, site)


def _enters(module: nn.Module, site: _Site) -> None:
    """The same on every rank; the output goes into shared layers only."""
    group = site.groups.tensor
    module.register_forward_hook(lambda _module, _inputs, out: tensor_comm.enter(out, group))


def _own_heads(norm: RMSNorm, site: _Site) -> None:
    """The same weight on every rank, used on the rank's heads only: its gradient is a part."""
    group = site.groups.tensor
    norm.weight.register_hook(lambda gradient: tensor_comm.sum_gradient(gradient, group))


def _gathers(module: nn.Identity, site: _Site) -> None:
    _become(module, _Gather(site.exchange()))


def _same(module: nn.Module, site: _Site) -> None:
    """The same on every rank, from whole inputs to a whole output."""


_Role = Callable[..., None]
# by the last names of a layer's place
_ROLES: dict[str, tuple[type[nn.Module], _Role]] = {
    "embed_tokens": (nn.Embedding, _vocabulary),
    "mixer_norm": (RMSNorm, _enters),
    "feed_forward_norm": (RMSNorm, _enters),
    "persistent": (PersistentTokens, _enters),
    "q_proj": (nn.Linear, _outputs),
    "k_proj": (nn.Linear, _outputs),
    "v_proj": (nn.Linear, _outputs),
    "gate_proj": (nn.Linear, _outputs),
    "up_proj": (nn.Linear, _outputs),
    "forget_gate": (Gate, _gate),
    "momentum_gate": (Gate, _gate),
    "step_gate": (Gate, _gate),
    "q_conv": (ShortConvolution, _parts),
    "k_conv": (ShortConvolution, _parts),
    "v_conv": (ShortConvolution, _parts),
    "initial": (InitialWeights, _parts),
    "memory.norm": (RMSNorm, _own_heads),
    "attention_norm": (RMSNorm, _own_heads),
    "gather_heads": (nn.Identity, _gathers),
    "o_proj": (nn.Linear, _inputs),
    "down_proj": (nn.Linear, _last_inputs),
    "model.norm": (RMSNorm, _same),
    "lm_head": (nn.Linear, _head),
}


def _role(place: str) -> tuple[type[nn.Module], _Role | None]:
    """What is done with the layer of that full name, and the type it must have."""
    names = place.split(".")
    for suffix in (".".join(names[-2:]), names[-1]):
        if suffix in _ROLES:
            return _ROLES[suffix]
    return nn.Module, None


def _cut(module: nn.Module, axis: int, site: _Site) -> None:
    """Keep this rank's part of all parameters, those of one axis whole.

    A parameter that a tied layer has cut before stays.
    """
    from titans_pretrain.parallel.tensor_layers import mark

    ranks, rank = site.groups.mesh.tensor, site.groups.tensor_rank
    for name, parameter in module.named_parameters(recurse=False):
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        size, rest = divmod(parameter.shape[axis], ranks)
        if rest:
            raise TitansError(
                f"{site.name}.{name} {tuple(parameter.shape)} does not divide into "
                f"{ranks} equal parts along axis {axis}",
                where="mesh.tensor",
                fix=f"make {parameter.shape[axis]} a multiple of it",
            )
        parameter.data = parameter.data.narrow(axis, rank * size, size).clone()
        mark(parameter, True, axis, 1)


def _become(module: nn.Module, layer: nn.Module) -> None:
    """Turn ``module`` into ``layer`` with its own parameters; whoever holds it keeps it."""
    layer.train(module.training)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(layer, name, parameter)
    module.__class__ = layer.__class__
    vars(module).clear()
    vars(module).update(vars(layer))


class _Gather(nn.Module):
    """(B, T, D / R) of this rank's heads to (B, T, D) of all, for shared layers only."""

    def __init__(self, exchange: tensor_comm.Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        return self.exchange.gather(x)
