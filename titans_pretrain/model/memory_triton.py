"""The memory's scan on a GPU: the function of ``memory.py`` in Triton kernels, both ways.

A program walks over the chunks of one batch row and head in order, at depth 1 with its state on
chip, at depth 2 tile by tile through memory. Matrix products multiply bfloat16 for bfloat16 inputs
and float32 (TF32 where torch is told so) for float32 ones; sums, gates' coefficients and states
are float32. Kept for backward are the inputs and the state at the start of each chunk.

Deeper memories, documents that begin inside and other dtypes are not here: ``supports`` says so,
and ``memory.py`` computes them. Unlike there, norms of clipped surprise overflow beyond 1e19.
"""

import contextlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memory import check
from .memory_chunk import MemoryState, Resets, Rule, Tokens, flatten, unflatten

INSTALLED = importlib.util.find_spec("triton") is not None
LARGEST_BLOCK = 64
LARGEST_WIDTH = 128
DEEPEST = 2


class Plan(NamedTuple):
    """How a scan is cut up, and what is fixed about its memory.

    Attributes:
        rows: batch rows times heads, one program each.
        time: tokens of a row.
        width, hidden: of a head, of the memory between its layers.
        chunk, chunks: tokens of a chunk, chunks of a row.
        block, per_chunk: tokens held at once, blocks of a chunk.
    """

    rows: int
    time: int
    width: int
    hidden: int
    depth: int
    chunk: int
    chunks: int
    block: int
    per_chunk: int
    gelu: bool
    residual: bool
    clip: float | None
    precision: str

    def arguments(self) -> tuple[int | float, ...]:
        """What all kernels of a scan take after their tensors."""
        return self.time, self.chunk, self.chunks, self.per_chunk, self.clip or 0.0

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        wide = _power_of_two(self.width)
        constants: dict[str, Any] = {
            "width": self.width,
            "wide": wide,
            "block": self.block,
            "precision": self.precision,
            "residual": self.residual,
            "clipped": self.clip is not None,
            "num_stages": 1,
            "num_warps": 8,
        }
        if self.depth == 2:
            tile = min(_power_of_two(self.hidden), 64 if wide <= 64 else 32)
            constants |= {"hidden": self.hidden, "tile": tile, "gelu": self.gelu}
        return constants


def supports(
    queries: Tensor, state: MemoryState, *, resets: Resets | None = None, **_: Any
) -> str | None:
    """Why these kernels cannot compute this scan, None if they can.

    Takes the queries, the state and the options of ``memory_scan``.
    """
    if not INSTALLED:
        return "triton is not installed (pip install 'titans-pretrain[gpu]')"
    if not _interpreted():
        if not queries.is_cuda:
            return f"the tensors are on {queries.device.type}, not on a GPU"
        if torch.version.hip or torch.cuda.get_device_capability(queries.device) < (8, 0):
            return "the GPU is none of NVIDIA's from compute capability 8.0 on"
    if queries.dtype not in (torch.bfloat16, torch.float32):
        return f"the inputs are {queries.dtype}, neither bfloat16 nor float32"
    if resets is not None:
        return "documents begin inside the sequence"
    if len(state.weights) > DEEPEST:
        return f"the memory is {len(state.weights)} layers deep, more than {DEEPEST}"
    if queries.shape[-1] > LARGEST_WIDTH:
        return f"a head is {queries.shape[-1]} wide, more than {LARGEST_WIDTH}"
    return "there is no token" if queries.numel() == 0 else None


def memory_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    activation: str = "gelu",
    residual: bool = True,
    surprise_clip: float | None = None,
    resets: Resets | None = None,
) -> tuple[Tensor, MemoryState]:
    """``memory.memory_scan`` for what ``supports`` agrees to; see there.

    Raises:
        ValueError: arguments that ``memory.memory_scan`` refuses, or a scan that ``supports`` does.
    """
    tokens = Tokens(queries, keys, values, forget, momentum, step)
    check(tokens, state, chunk_size, Rule(activation, residual, surprise_clip), resets)
    if (why := supports(queries, state, resets=resets)) is not None:
        raise ValueError(f"no Triton kernel for this scan: {why}")
    batch, heads, time, width = queries.shape
    chunk = min(chunk_size, time)
    block = min(_power_of_two(chunk), LARGEST_BLOCK)
    plan = Plan(
        rows=batch * heads,
        time=time,
        width=width,
        hidden=state.weights[0].shape[-2],
        depth=len(state.weights),
        chunk=chunk,
        chunks=-(-time // chunk),
        block=block,
        per_chunk=-(-chunk // block),
        gelu=activation == "gelu",
        residual=residual,
        clip=surprise_clip,
        precision=_precision(queries.dtype),
    )
    gates = (gate.float() for gate in (forget, momentum, step))
    flat = (queries, keys, values, *gates, *(tensor.float() for tensor in flatten(state)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        reads, *final = _TritonScan.apply(plan, *flat)
    else:
        reads, final, _ = _forward(plan, flat, keep=False)
    return reads, unflatten(final)


def _power_of_two(size: int) -> int:
    """The next one, and what a matrix product takes at least."""
    return max(16, 1 << (size - 1).bit_length())


def _interpreted() -> bool:
    from .memory_triton_kernels import coefficients_forward

    return type(coefficients_forward).__name__ == "InterpretedFunction"


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return "rounded" if _interpreted() else "bf16"
    # three TF32 products are one of float32, on tensor cores
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _joined(plan: Plan, state: tuple[Tensor, ...]) -> Tensor:
    """A state as kernels have it, (rows, 2 depth, hidden * width)."""
    return torch.stack([tensor.reshape(plan.rows, -1) for tensor in state], 1)


def _split(joined: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """The counterpart of ``_joined``; copies, which keep no larger tensor alive."""
    return [
        part.reshape(one.shape).clone() for part, one in zip(joined.unbind(1), like, strict=True)
    ]


def _coefficients(plan: Plan, gates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mixing (rows, blocks, block, block) and shares (rows, blocks, 4, block) of all blocks."""
    from .memory_triton_kernels import coefficients_forward

    blocks = plan.chunks * plan.per_chunk
    mixing = gates[0].new_empty(plan.rows, blocks, plan.block, plan.block)
    shares = gates[0].new_empty(plan.rows, blocks, 4, plan.block)
    cut = (plan.time, plan.chunk, plan.per_chunk)
    coefficients_forward[(blocks, plan.rows)](*gates, mixing, shares, *cut, block=plan.block)
    return mixing, shares


def _forward(
    plan: Plan, flat: tuple[Tensor, ...], *, keep: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Reads, the last state, and the states at chunks' starts where they are kept."""
    from .memory_triton_deep import scan_forward_2
    from .memory_triton_shallow import scan_forward_1

    tokens, gates = ([t.contiguous() for t in part] for part in (flat[:3], flat[3:6]))
    grid, options = (plan.rows,), plan.constants() | {"keep": keep}
    state = _joined(plan, flat[6:])
    reads = torch.empty_like(tokens[0])
    with _on(reads):
        mixing, shares = _coefficients(plan, tuple(gates))
        if plan.depth == 1:
            starts = state.new_empty(plan.rows, plan.chunks if keep else 0, *state.shape[1:])
            buffers = (mixing, shares, state, starts, reads)
            scan_forward_1[grid](*tokens, *buffers, *plan.arguments(), **options)
            return reads, _split(state, flat[6:]), starts
        starts = state.new_empty(plan.rows, plan.chunks + 1 if keep else 2, *state.shape[1:])
        starts[:, 0] = state
        scan_forward_2[grid](*tokens, mixing, shares, starts, reads, *plan.arguments(), **options)
        final = starts[:, plan.chunks if keep else plan.chunks % 2]
        return reads, _split(final, flat[6:]), starts


class _TritonScan(torch.autograd.Function):
    """The scan, keeping its inputs and the states at chunks' starts."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *flat: Tensor) -> tuple[Tensor, ...]:
        reads, final, starts = _forward(plan, flat, keep=True)
        ctx.plan, ctx.like = plan, [tensor.shape for tensor in flat[6:]]
        ctx.save_for_backward(*flat[:6], starts)
        return reads, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on here only under create_graph
        if torch.is_grad_enabled():
            raise RuntimeError("memory_scan has no second derivative; memory_reference has")
        *inputs, starts = ctx.saved_tensors
        return None, *_backward(ctx.plan, inputs, starts, grads)


def _backward(
    plan: Plan, inputs: list[Tensor], starts: Tensor, grads: tuple[Tensor, ...]
) -> list[Tensor]:
    """Gradients of tokens, gates and the first state."""
    from .memory_triton_deep_backward import scan_backward_2
    from .memory_triton_kernels import coefficients_backward
    from .memory_triton_shallow import scan_backward_1

    tokens, gates = ([t.contiguous() for t in part] for part in (inputs[:3], inputs[3:]))
    grid, options = (plan.rows,), plan.constants()
    state_grad = _joined(plan, grads[1:])
    token_grads = [torch.empty_like(tensor) for tensor in tokens]
    gate_grads = [torch.empty_like(gate) for gate in gates]
    inner = starts.new_empty(plan.rows, plan.per_chunk - 1, *starts.shape[2:])
    with _on(starts):
        mixing, shares = _coefficients(plan, tuple(gates))
        to_mixing, to_shares = torch.empty_like(mixing), torch.empty_like(shares)
        buffers = [*tokens, mixing, shares, starts, inner]
        outputs = [*token_grads, to_mixing, to_shares]
        if plan.depth == 1:
            buffers += [grads[0].contiguous(), state_grad]
            scan_backward_1[grid](*buffers, *outputs, *plan.arguments(), **options)
        else:
            single = plan.per_chunk == 1
            half = state_grad.shape[1] // 2
            gathered = state_grad if single else torch.zeros_like(state_grad[:, :half])
            scratch = starts.new_empty(plan.rows, plan.block * (3 * plan.hidden + plan.width))
            buffers += [scratch, grads[0].contiguous(), state_grad, gathered]
            options |= {"single": single}
            scan_backward_2[grid](*buffers, *outputs, *plan.arguments(), **options)
        coefficients_backward[(plan.chunks * plan.per_chunk, plan.rows)](
            *gates,
            to_mixing,
            to_shares,
            *gate_grads,
            plan.time,
            plan.chunk,
            plan.per_chunk,
            block=plan.block,
        )
    return [*token_grads, *gate_grads, *_split(state_grad, grads[1:])]
