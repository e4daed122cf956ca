"""Where the tokens of a call lie on each row's own chunk grid: padding and decoding as no-ops.

Rows of a batch may have consumed different numbers of tokens, and a call may bring pads. The model
moves tokens into slots so that chunk (or segment) boundaries of all rows coincide; everything
inside the blocks then works on slots, and ``leave`` moves results back to the call's columns.

Shapes: B batch, T columns of the call, N slots.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Tokens of a call as slots on a grid.

    Attributes:
        position: (B,) tokens the row consumed before this call.
        offset: (B,) grid coordinate of slot 0.
        lead: (B,) slots before the row's first token.
        count: (B,) tokens of the row.
        valid: (B, N) whether a slot holds a token.
        column: (B, N) the call's column a slot takes its token from, any where not valid.
        slot: (B, T) the slot a column's token is in, any for pads.
        padding: (B, T) False for pads.
    """

    position: Tensor
    offset: Tensor
    lead: Tensor
    count: Tensor
    valid: Tensor
    column: Tensor
    slot: Tensor
    padding: Tensor

    @classmethod
    def build(cls, mask: Tensor, position: Tensor, grid: int) -> "Layout":
        """Lay out the tokens of a call.

        Args:
            mask: (B, T) bool, False for pads.
            position: (B,) tokens each row has consumed.
            grid: slots per chunk (MAC: per segment).
        """
        count = mask.sum(1)
        start = position % grid
        alone = mask.shape[1] == 1
        lead = torch.zeros_like(start) if alone else start
        if alone:
            slots = 1
        elif torch.compiler.is_compiling():  # a graph has room for any: it cannot ask a tensor
            slots = mask.shape[1] + grid - 1
        else:
            slots = max(1, int((lead + count).max()))
        slot = (lead[:, None] + mask.long().cumsum(1) - 1).clamp(0, slots - 1)
        cells = torch.arange(slots, device=mask.device)
        valid = (cells >= lead[:, None]) & (cells < (lead + count)[:, None])
        columns = torch.arange(mask.shape[1], device=mask.device).expand_as(slot)
        column = slot.new_zeros(mask.shape[0], slots + 1)
        column = column.scatter(1, torch.where(mask, slot, slots), columns)[:, :slots]
        offset = start - lead
        return cls(position, offset, lead, count, valid, column, slot, mask)

    def to(self, device: torch.device | int | str, *, non_blocking: bool = False) -> "Layout":
        """On a device; accelerate calls it where a layer lies on another one than the layer before.

        Args:
            device: where the layer computes.
            non_blocking: whether copies may still be under way.
        """
        if self.valid.device == torch.device(device):
            return self
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
        }
        return Layout(**tensors)

    def enter(self, x: Tensor) -> Tensor:
        """(B, T, D) columns to (B, N, D) slots; empty slots hold zeros."""
        taken = x.gather(1, self.column[..., None].expand(-1, -1, x.shape[-1]))
        return taken * self.valid[..., None]

    def leave(self, x: Tensor) -> Tensor:
        """(B, N, D) slots to (B, T, D) columns, on the device of ``x``; pads become zeros."""
        here = self.to(x.device)
        taken = x.gather(1, here.slot[..., None].expand(-1, -1, x.shape[-1]))
        return taken * here.padding[..., None]

    def part(self, first: int, length: int) -> "Layout":
        """The slots [first, first + length) as a layout of their own, for one segment."""
        last = min(first + length, self.valid.shape[1])
        lead = (self.lead - first).clamp(0, last - first)
        count = self.valid[:, first:last].sum(1)
        return Layout(
            position=self.position,
            offset=self.offset,
            lead=lead,
            count=count,
            valid=self.valid[:, first:last],
            column=self.column[:, first:last],
            slot=self.slot,
            padding=self.padding,
        )

    @property
    def cells(self) -> Tensor:
        """(B, N) grid coordinate of every slot."""
        slots = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.offset[:, None] + slots

    @property
    def start(self) -> Tensor:
        """(B,) grid coordinate of the row's first token."""
        return self.offset + self.lead

    @property
    def end(self) -> Tensor:
        """(B,) grid coordinate after the row's last token."""
        return self.offset + self.lead + self.count

    @property
    def positions(self) -> Tensor:
        """(B, N) tokens of the row before each slot's: the token's place in its sequence."""
        return self.position[:, None] + self.cells - self.start[:, None]


def join(history: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Put each row's history directly before its tokens.

    Args:
        history: (B, M, ...) what the row saw last, newest last.
        x: (B, N, ...) slots.
        layout: the slots.

    Returns:
        (B, M + N, ...): slot i is at M + i, the history ends right before the row's first token.
    """
    length = history.shape[1]
    joined = torch.cat([torch.zeros_like(history), x], 1)
    index = layout.lead[:, None] + torch.arange(length, device=x.device)
    return joined.scatter(1, _expand(index, history), history.to(x.dtype))


def newest(joined: Tensor, length: int, layout: Layout) -> Tensor:
    """The last ``length`` entries of each row of what ``join`` returned, its history afterwards."""
    first = layout.lead + layout.count + joined.shape[1] - layout.valid.shape[1] - length
    index = first[:, None] + torch.arange(length, device=joined.device)
    return joined.gather(1, _expand(index, joined))


def choose(row: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` where ``row`` (B,) is true, else ``no``; both (B, ...)."""
    return torch.where(row.view(-1, *[1] * (yes.dim() - 1)), yes, no)


def _expand(index: Tensor, like: Tensor) -> Tensor:
    shape = (*index.shape, *[1] * (like.dim() - 2))
    return index.view(shape).expand(*index.shape, *like.shape[2:])
