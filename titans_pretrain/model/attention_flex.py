"""Windowed attention of training by FlexAttention, where there is a GPU that it runs on.

Its kernels walk over blocks of keys. Which blocks a block of queries sees, in part or as a whole,
follows from where the window and the document of each query begin, without a mask of every pair.

Shapes: B batch, H heads, N slots, M keys before them, h head width, P persistent tokens.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention_blocks import by_blocks

try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError:
    flex_attention = None  # type: ignore[assignment]

BLOCK = 128
WIDTHS = range(16, 257)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MANY = 8  # shapes of one process, each of which is compiled anew
TOLERANCE = 0.03  # of the check, in any precision
SINCE = (2, 7)  # torch, whose block masks tell their lengths


def attend_window(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Causal attention over a window, by the fastest way there is here.

    Args:
        queries: (B, H, N, h).
        keys, values: (B, H, M + N, h), those of slot i at M + i.
        window: tokens in reach.
        prefix: keys and values (1, H, P, h) visible to all.
        reach: (B, N), how many keys before its own a query sees at most, None for no bound.

    Returns:
        Heads (B, H, N, h).
    """
    # what was attended to before does not count: a run that is resumed takes the same way
    if _fits(queries) and _whole_blocks(queries.shape[2]):
        sizes = (queries.shape, keys.shape, window, prefix and prefix[0].shape)
        flex = _compiled((*sizes, reach is None, queries.dtype, queries.device))
        return by_flex(queries, keys, values, window, prefix=prefix, reach=reach, flex=flex)
    return by_blocks(queries, keys, values, window, prefix=prefix, reach=reach)


def by_flex(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    reach: Tensor | None = None,
    flex: Callable[..., Tensor],
) -> Tensor:
    """The same by ``flex``, which is torch's ``flex_attention``, compiled or not."""
    persistent, past = 0, keys.shape[2] - queries.shape[2]
    if prefix is not None:
        persistent, batch = prefix[0].shape[2], len(keys)
        keys, values = (
            torch.cat([front.expand(batch, -1, -1, -1), own], 2)
            for front, own in zip(prefix, (keys, values), strict=True)
        )
    mask = block_mask(queries.shape[2], past, persistent, window, queries.device, reach)
    return flex(queries, keys, values, block_mask=mask)


# one for all layers of a pass, by the identity of its reach; few, for each takes 64 MB a row at
# 256K tokens
@functools.lru_cache(maxsize=2)
def block_mask(
    slots: int,
    past: int,
    persistent: int,
    window: int,
    device: torch.device,
    reach: Tensor | None = None,
) -> Any:
    """FlexAttention's mask over persistent tokens, keys before the slots, and the slots' own.

    Args:
        slots: queries.
        past: keys before theirs.
        persistent: keys in front that all see.
        window: tokens in reach.
        device: of the mask.
        reach: see ``attend_window``.
    """

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = query + past, key - persistent
        near = (column <= row) & (column > row - window)
        if reach is not None:
            near = near & (column >= row - reach[b, query])
        return near | (key < persistent)

    rows = torch.arange(past, past + slots, device=device)
    oldest = (rows - window + 1)[None]
    if reach is not None:
        oldest = torch.maximum(oldest, rows - reach)
    part, full = _blocks(oldest.clamp(min=0), past, persistent)
    return BlockMask.from_kv_blocks(
        *_listed(part),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(slots, persistent + past + slots),
    )


def _blocks(oldest: Tensor, past: int, persistent: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries sees.

    Args:
        oldest: (1 or B, N) place among the keys, without persistent ones, of the oldest that each
            query sees.
        past: keys before the queries' own.
        persistent: keys in front.

    Returns:
        Bool (1 or B, blocks of queries, blocks of keys): those seen in part, and those of which
        each query sees all.
    """
    slots, before = oldest.shape[1], persistent + past
    by_block = oldest.split(BLOCK, 1)
    widest = torch.stack([block.amin(1) for block in by_block], 1)[..., None] + persistent
    narrowest = torch.stack([block.amax(1) for block in by_block], 1)[..., None]
    # a query that sees all before it sees one stretch with the persistent tokens
    narrowest = torch.where(narrowest > 0, narrowest + persistent, 0)
    query = torch.arange(0, slots, BLOCK, device=oldest.device)[:, None]
    first_own, last_own = before + query, before + (query + BLOCK - 1).clamp(max=slots - 1)
    begin = torch.arange(0, before + slots, BLOCK, device=oldest.device)
    end = begin + BLOCK - 1
    some = (end >= widest) & (begin <= last_own) | (begin < persistent)
    complete = (end < before + slots) & (query + BLOCK <= slots)
    whole = complete & ((begin >= narrowest) & (end <= first_own) | (end < persistent))
    return some & ~whole, whole


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries sees, and which, those first."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None], order[:, None]


def _fits(queries: Tensor) -> bool:
    """Whether they are of a kind that is worth compiling for: training on a GPU."""
    return (
        _on_gpu(queries)
        and queries.requires_grad
        and not torch.compiler.is_compiling()  # a model that is compiled as a whole
        and queries.dtype in DTYPES
        and queries.shape[-1] in WIDTHS
        and _runs(queries.shape[-1], queries.dtype, queries.device)
    )


def _on_gpu(queries: Tensor) -> bool:
    return queries.is_cuda


def _whole_blocks(slots: int) -> bool:
    """Whether they are: where lengths vary freely, every step would wait for a compiler."""
    if slots % BLOCK:
        _say_that_blocks_are_cut()
    return slots % BLOCK == 0


@functools.cache  # once
def _say_that_blocks_are_cut() -> None:
    warnings.warn(
        f"window attention goes by blocks where a length is no multiple of {BLOCK}: FlexAttention "
        "is compiled for multiples alone",
        stacklevel=4,
    )


@functools.cache
def _compiled(shape: Any) -> Callable[..., Tensor]:
    """The function for arguments of one shape, kept: torch lets go of none that it compiled."""
    if _compiled.cache_info().currsize == MANY:
        warnings.warn(
            f"window attention has met more than {MANY} shapes, and each is compiled anew: fewer "
            "lengths and batch sizes train faster",
            stacklevel=3,
        )
    return _compile()


def _compile() -> Callable[..., Tensor]:
    def attend(queries: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask) -> Tensor:
        return flex_attention(queries, keys, values, block_mask=block_mask)

    # torch counts what it compiled by code objects, and gives up after eight of one
    attend.__code__ = attend.__code__.replace()
    # an error, not torch's way without kernels, which takes the memory of every pair
    return torch.compile(attend, dynamic=False, fullgraph=True)


@functools.cache
def _runs(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels compile here, and give what blocks give on a few tokens."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if flex_attention is None or version < SINCE:
        return False
    try:
        _check(width, dtype, device)
    except Exception as error:  # whatever a compiler may say
        warnings.warn(
            f"window attention goes by blocks: FlexAttention does not run here: {error}",
            stacklevel=2,
        )
        return False
    return True


def _check(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare output and gradients with those by blocks, without drawing random numbers.

    Raises:
        RuntimeError: they differ by more than rounding; or anything that a compiler raises.
    """
    slots, past, persistent = 2 * BLOCK + 40, 30, 5
    sizes = (slots, past + slots, past + slots, persistent, persistent)
    numbers = torch.arange(sum(sizes) * width, device=device, dtype=torch.float64)
    waves = (numbers.square() % 1009 / 504.5 - 1).to(dtype).split([size * width for size in sizes])
    given = [wave.view(1, 1, -1, width).requires_grad_() for wave in waves]
    reach = torch.arange(slots, device=device)[None] % 100
    ways: list[Callable[..., Tensor]] = [functools.partial(by_flex, flex=_compile()), by_blocks]
    found = []
    # hooks of its own: in a checkpointed block, its backward pass would run the block again
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        for attend in ways:
            heads = attend(*given[:3], 70, prefix=(given[3], given[4]), reach=reach)
            gradients = torch.autograd.grad(heads.square().sum(), given)
            found.append([heads.detach(), *gradients])
    for flexed, blocked in zip(*found, strict=True):
        error = float((flexed.double() - blocked.double()).norm() / blocked.double().norm())
        if not error < TOLERANCE:
            raise RuntimeError(f"it is {error:.0e} off attention by blocks")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
