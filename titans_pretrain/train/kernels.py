"""Which code computes the memory's scan in training: PyTorch's operators, or Triton kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.model import memory, memory_triton
from titans_pretrain.model.memory_chunk import MemoryState, flatten
from titans_pretrain.model.neural_memory import NeuralMemory

Scan = Callable[..., tuple[Tensor, MemoryState]]
TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 2e-3}
WHERE = "train.memory_kernels"
FIX = "use train.memory_kernels=torch"


def choose(model: nn.Module, way: str, precision: str, device: torch.device) -> None:
    """Have the model's memories scan as asked.

    Kernels are used only after they agreed with PyTorch on this machine, at the model's own sizes.

    Args:
        model: whole or a part of it.
        way: ``torch`` or ``triton``, as ``train.memory_kernels``.
        precision: of the tokens, ``bf16`` or ``fp32``.
        device: where the model computes.

    Raises:
        UserError: the kernels cannot compute this model's memory here.
        TitansError: they compute something else.
    """
    if way == "torch":
        return
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not memories:
        raise UserError("triton, but the model has no memory", where=WHERE, fix="take it out")
    if not memories[0].across_documents:
        raise UserError(
            "triton, but the memory begins anew at documents inside a sequence, which kernels do "
            "not",
            where=f"{WHERE}, model.remember_across_documents",
            fix=FIX,
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    check(memories[0], device, dtype, _persistent(model))
    for module in memories:
        module.memory_scan = _with_kernels


def _persistent(model: nn.Module) -> int:
    """How many tokens every layer's memory reads before the first."""
    return int(getattr(getattr(model, "config", None), "num_persistent_tokens", 0))


def _with_kernels(*tokens_and_state: Any, **options: Any) -> tuple[Tensor, MemoryState]:
    """A scan in kernels; in PyTorch what they cannot: no token at all."""
    queries, state = tokens_and_state[0], tokens_and_state[-1]
    if memory_triton.supports(queries, state, resets=options["resets"]) is None:
        return memory_triton.memory_scan(*tokens_and_state, **options)
    return memory.memory_scan(*tokens_and_state, **options)


def check(
    module: NeuralMemory, device: torch.device, dtype: torch.dtype, persistent: int = 0
) -> None:
    """Compare reads, last state and gradients of random tokens in kernels and in PyTorch.

    As training and validation have them: three chunks and a part of one, and persistent tokens
    alone; with gradients and without. The process's random state stays.

    Args:
        module: a memory of the model.
        device: where.
        dtype: of the tokens.
        persistent: how many tokens are read before the first.

    Raises:
        UserError, TitansError: see ``choose``.
    """
    for rows, time in ((2, 3 * module.chunk_size + 5), (1, persistent)):
        if time:
            inputs = _random(module, rows, time, device, dtype)
            for with_gradients in (True, False):
                _compare(module, inputs, with_gradients=with_gradients)


def _compare(module: NeuralMemory, inputs: list[Tensor], *, with_gradients: bool) -> None:
    dtype, device = inputs[0].dtype, inputs[0].device
    if (why := memory_triton.supports(inputs[0], _state(module, inputs))) is not None:
        raise UserError(f"triton: {why}", where=WHERE, fix=FIX)
    wanted = _outcome(memory.memory_scan, module, inputs, with_gradients)
    try:
        found = _outcome(memory_triton.memory_scan, module, inputs, with_gradients)
    except Exception as error:  # of a compiler, a driver or a GPU that is too small
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"triton: the kernels do not run here: {told[-1]}",
            where=f"{WHERE}, on {device}",
            fix=FIX,
        ) from error
    for one, other in zip(wanted, found, strict=True):
        scale = one.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        off = float((other - one).abs().max() / scale)
        if not off <= TOLERANCES[dtype]:
            raise TitansError(
                f"the Triton kernels are {off:.1e} off what PyTorch computes here, more than "
                f"{TOLERANCES[dtype]:.0e}",
                where=f"{WHERE}, a scan of random tokens on {device}",
                fix=f"{FIX}, and report this with the GPU and its driver",
            )


def _random(
    module: NeuralMemory, rows: int, time: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Tokens, gates and a state of two heads; unit keys and queries, modest gates."""
    generator = torch.Generator().manual_seed(0)
    heads = 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = [normal(rows, heads, time, module.head_width) for _ in range(3)]
    tokens[:2] = [torch.nn.functional.normalize(x, dim=-1) for x in tokens[:2]]
    gates = [torch.rand(rows, heads, time, generator=generator) * most for most in (0.02, 1, 0)]
    gates[2] = module.max_step * (1 - gates[1]) / module.chunk_size
    shapes = [(rows, heads, *widths) for widths in module.initial.widths]
    state = [normal(*shape) / shape[-1] ** 0.5 for shape in shapes]
    state += [0.1 * normal(*shape) for shape in shapes]
    low = [x.to(device, dtype) for x in tokens]
    return [*low, *(x.to(device) for x in (*gates, *state))]


def _state(module: NeuralMemory, inputs: list[Tensor]) -> MemoryState:
    return MemoryState(tuple(inputs[6 : 6 + module.depth]), tuple(inputs[6 + module.depth :]))


def _outcome(
    scan: Scan, module: NeuralMemory, inputs: list[Tensor], with_gradients: bool
) -> list[Tensor]:
    """Reads, last state, and gradients by all inputs if asked for, in float32."""
    leaves = [x.clone().requires_grad_(with_gradients) for x in inputs]
    with torch.set_grad_enabled(with_gradients):
        options = module.rule._asdict() | {"chunk_size": module.chunk_size}
        reads, last = scan(*leaves[:6], _state(module, leaves), **options)
        outputs = [reads, *flatten(last)]
        ones = [torch.ones_like(x) for x in outputs]
        grads = torch.autograd.grad(outputs, leaves, ones) if with_gradients else ()
    return [x.detach().float() for x in (*outputs, *grads)]
