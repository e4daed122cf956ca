"""Which code computes the memory's scan in training: PyTorch's operators, or Triton kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.model import memory, memory_triton
from titans_pretrain.model.memory_chunk import MemoryState, flatten
from titans_pretrain.model.neural_memory import NeuralMemory

Scan = Callable[..., tuple[Tensor, MemoryState]]
TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 2e-3}
WHERE = "train.memory_kernels"


def choose(model: nn.Module, train: TrainSection, device: torch.device) -> None:
    """Have the model's memories scan as the configuration says.

    Kernels are used only after they agreed with PyTorch on this machine, at the model's own sizes.

    Raises:
        UserError: the kernels cannot compute this model's memory here.
        TitansError: they compute something else.
    """
    if train.memory_kernels == "torch":
        return
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not memories:
        raise UserError("triton, but the model has no memory", where=WHERE, fix="take it out")
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    check(memories[0], device, dtype)
    for module in memories:
        module.memory_scan = _with_kernels


def _with_kernels(*tokens_and_state: Any, **options: Any) -> tuple[Tensor, MemoryState]:
    """A scan in kernels; in PyTorch where documents begin inside, or no token is there."""
    queries, state = tokens_and_state[0], tokens_and_state[-1]
    if memory_triton.supports(queries, state, resets=options["resets"]) is None:
        return memory_triton.memory_scan(*tokens_and_state, **options)
    return memory.memory_scan(*tokens_and_state, **options)


def check(module: NeuralMemory, device: torch.device, dtype: torch.dtype) -> None:
    """Compare reads, last state and gradients of random tokens in kernels and in PyTorch.

    Three chunks and a part of one; the process's random state stays.

    Raises:
        UserError, TitansError: see ``choose``.
    """
    inputs = _random(module, device, dtype)
    state = MemoryState(tuple(inputs[6 : 6 + module.depth]), tuple(inputs[6 + module.depth :]))
    if (why := memory_triton.supports(inputs[0], state)) is not None:
        raise UserError(f"triton: {why}", where=WHERE, fix="use train.memory_kernels=torch")
    wanted, found = (
        _outcome(scan, module, inputs) for scan in (memory.memory_scan, memory_triton.memory_scan)
    )
    for one, other in zip(wanted, found, strict=True):
        scale = one.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        off = float((other - one).abs().max() / scale)
        if not off <= TOLERANCES[dtype]:
            raise TitansError(
                f"the Triton kernels are {off:.1e} off what PyTorch computes here, more than "
                f"{TOLERANCES[dtype]:.0e}",
                where=f"{WHERE}, a scan of random tokens on {device}",
                fix="use train.memory_kernels=torch, and report this with the GPU and its driver",
            )


def _random(module: NeuralMemory, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Tokens, gates and a state of two rows and heads; unit keys and queries, modest gates."""
    generator = torch.Generator().manual_seed(0)
    heads, time = 2, 3 * module.chunk_size + 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = [normal(2, heads, time, module.head_width) for _ in range(3)]
    tokens[:2] = [torch.nn.functional.normalize(x, dim=-1) for x in tokens[:2]]
    gates = [torch.rand(2, heads, time, generator=generator) * most for most in (0.02, 1, 0)]
    gates[2] = module.max_step * (1 - gates[1]) / module.chunk_size
    shapes = [(2, heads, *widths) for widths in module.initial.widths]
    state = [normal(*shape) / shape[-1] ** 0.5 for shape in shapes]
    state += [0.1 * normal(*shape) for shape in shapes]
    low = [x.to(device, dtype) for x in tokens]
    return [*low, *(x.to(device) for x in (*gates, *state))]


def _outcome(scan: Scan, module: NeuralMemory, inputs: list[Tensor]) -> list[Tensor]:
    """Reads, last state, and gradients by all inputs, in float32."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    state = MemoryState(tuple(leaves[6 : 6 + module.depth]), tuple(leaves[6 + module.depth :]))
    with torch.enable_grad():
        reads, last = scan(
            *leaves[:6], state, chunk_size=module.chunk_size, **module.rule._asdict()
        )
        outputs = [reads, *flatten(last)]
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    return [x.detach().float() for x in (*outputs, *grads)]
