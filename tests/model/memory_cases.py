"""Random inputs of the memory, and how two results are compared."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.model.memory import MemoryState

Scan = Callable[..., tuple[Tensor, MemoryState]]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one call of ``memory_scan`` takes: q, k, v (B, H, T, D), gates (B, H, T), a state."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    forget: Tensor
    momentum: Tensor
    step: Tensor
    state: MemoryState

    def run(self, scan: Scan, **options: Any) -> tuple[Tensor, MemoryState]:
        return scan(*self.sequence().values(), self.state, **options)

    def sequence(self) -> dict[str, Tensor]:
        names = ("queries", "keys", "values", "forget", "momentum", "step")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"weights[{n}]": w for n, w in enumerate(self.state.weights)}
        past = {f"momentum[{n}]": s for n, s in enumerate(self.state.momentum)}
        return self.sequence() | weights | past

    def but(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Case":
        sequence = {name: change(x) for name, x in self.sequence().items()}
        return Case(**sequence, state=map_state(change, self.state))

    def leaves(self) -> "Case":
        return self.map(lambda x: x.detach().clone().requires_grad_())

    def between(self, first: int, last: int, state: MemoryState) -> "Case":
        part = {name: x[:, :, first:last] for name, x in self.sequence().items()}
        return Case(**part, state=state)


def map_state(change: Callable[[Tensor], Tensor], state: MemoryState) -> MemoryState:
    return MemoryState(
        tuple(change(w) for w in state.weights), tuple(change(s) for s in state.momentum)
    )


def random_case(
    *,
    seed: int = 0,
    batch: int = 2,
    heads: int = 2,
    time: int = 37,
    dim: int = 4,
    depth: int = 2,
    expansion: int = 3,
    max_step: float = 0.2,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Unit keys and queries, gates anywhere in (0, 1), weights that matter, nonzero momentum."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, heads, time, generator=generator, dtype=torch.float64)

    widths = [dim] + [dim * expansion] * (depth - 1) + [dim]
    shapes = [(batch, heads, out, inn) for inn, out in itertools.pairwise(widths)]
    case = Case(
        queries=torch.nn.functional.normalize(normal(batch, heads, time, dim), dim=-1),
        keys=torch.nn.functional.normalize(normal(batch, heads, time, dim), dim=-1),
        values=normal(batch, heads, time, dim),
        forget=uniform(),
        momentum=uniform(),
        step=max_step * uniform(),
        state=MemoryState(
            tuple(normal(*shape) / shape[-1] ** 0.5 for shape in shapes),
            tuple(0.1 * normal(*shape) for shape in shapes),
        ),
    )
    return case.map(lambda x: x.to(dtype))


def flat(result: tuple[Tensor, MemoryState]) -> dict[str, Tensor]:
    """Outputs and final state by name."""
    outputs, state = result
    weights = {f"final weights[{n}]": w for n, w in enumerate(state.weights)}
    past = {f"final momentum[{n}]": s for n, s in enumerate(state.momentum)}
    return {"outputs": outputs} | weights | past


def random_scalar(result: tuple[Tensor, MemoryState]) -> Tensor:
    """A scalar on which every output and every entry of the final state weighs differently."""
    generator = torch.Generator().manual_seed(99)
    total = torch.zeros((), dtype=torch.float64)
    for x in flat(result).values():
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    return total


def gradients(
    case: Case, result: tuple[Tensor, MemoryState], *, materialize: bool = False
) -> dict[str, Tensor]:
    """Gradients of ``random_scalar`` by every tensor of ``case``; zeros of unused ones if asked."""
    inputs = list(case.tensors().values())
    found = torch.autograd.grad(random_scalar(result), inputs, materialize_grads=materialize)
    return {f"gradient of {name}": g for name, g in zip(case.tensors(), found, strict=True)}


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], relative: float) -> None:
    """Every tensor is within ``relative`` of the wanted one's largest entry."""
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        assert found[name].shape == right.shape, name
        scale = right.abs().max().item() or 1.0
        error = (found[name].to(right.dtype) - right).abs().max().item() / scale
        assert error <= relative, f"{name} is off by {error:.2e} of its largest entry"
