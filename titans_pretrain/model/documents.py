"""Documents packed into one row: how far back a token may look, and where the memory starts anew.

Shapes: B batch, T columns of a call or of the part of it that a layer is given.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .boundary import Boundary

STRETCH = 256


@dataclass(frozen=True)
class Bounds:
    """What a stretch of tokens may not look across.

    Attributes:
        reach: (B, T) integers, how many tokens before it in the row are of a token's document.
        begins: (B, T) bool on the host, True where a document begins, but for the row's first.
    """

    reach: Tensor
    begins: Tensor

    def part(self, columns: slice) -> "Bounds":
        """The same of some columns."""
        return Bounds(self.reach[:, columns], self.begins[:, columns])

    def own_chunk(self, chunk_size: int) -> Tensor:
        """(B, T) first column of each token's chunk, where a document begins a chunk of its own."""
        columns = torch.arange(self.reach.shape[1], device=self.reach.device)
        return torch.maximum(columns // chunk_size * chunk_size, columns - self.reach)

    def begun(self) -> Tensor | None:
        """(B, T) bool: whether a token's document began among these; None where none did."""
        if not bool(self.begins.any()):
            return None
        return (self.begins.cumsum(1) > 0).to(self.reach.device, non_blocking=True)


class Stretch(NamedTuple):
    """Whole documents, side by side in a row, that full attention takes at once.

    Attributes:
        tokens: how many, n.
        mask: (n, n) bool, which keys a query sees; None for one document: all up to its own.
    """

    tokens: int
    mask: Tensor | None


class Documents:
    """The documents of a call's rows.

    Args:
        starts: (B, T) integers, the column in its row of the first token of each token's document,
            0 where it began before the row; on the host, or the call waits for the device.
    """

    def __init__(self, starts: Tensor) -> None:
        self._starts = starts.cpu()
        self._known: dict[tuple[int, torch.device], Bounds] = {}
        self._stretches: dict[torch.device, list[list[Stretch]] | None] = {}

    def bounds(self, boundary: Boundary, device: torch.device) -> Bounds:
        """The bounds of a layer's span of the rows, made once.

        Args:
            boundary: the layer's.
            device: where it computes.

        Raises:
            ValueError: columns that no documents can have.
        """
        first = boundary.first(self._starts.shape[1])
        key = (first, device)
        if key not in self._known:
            columns = first + torch.arange(self._starts.shape[1])
            _check(self._starts, columns)
            reach = (columns - self._starts).to(device, non_blocking=True)
            begins = (self._starts == columns) & (columns > 0)
            self._known[key] = Bounds(reach, begins)
        return self._known[key]

    def stretches(self, boundary: Boundary, device: torch.device) -> list[list[Stretch]] | None:
        """The stretches of every whole row, found once; None where no document begins in any.

        Args:
            boundary: a layer's; the spans' starts are joined at the first one that asks.
            device: where it computes.

        Raises:
            ValueError: columns that no documents can have.
        """
        if device not in self._stretches:
            starts = boundary.joined(self._starts, device)
            _check(starts, torch.arange(starts.shape[1]))
            rows = [_stretches(row, device) for row in starts] if bool(starts.any()) else None
            self._stretches[device] = rows
        return self._stretches[device]


def _stretches(starts: Tensor, device: torch.device) -> list[Stretch]:
    """Those of a row: a document of more than STRETCH tokens alone, shorter ones together.

    So their masks grow with the tokens of a row, not with the square of these.
    """
    cuts = [0]
    for begin, end in pairwise([*starts.unique().tolist(), len(starts)]):
        if begin > cuts[-1] and end - cuts[-1] > STRETCH:
            cuts.append(begin)
    there = starts.to(device)
    return [
        Stretch(end - begin, None if starts[end - 1] == begin else _mask(there[begin:end]))
        for begin, end in pairwise([*cuts, len(starts)])
    ]


def _mask(starts: Tensor) -> Tensor:
    """Bool (n, n): which of n keys the queries of as many tokens, the first a start, see."""
    columns = torch.arange(len(starts), device=starts.device)
    return (columns <= columns[:, None]) & (columns >= (starts - starts[0])[:, None])


def _check(starts: Tensor, columns: Tensor) -> None:
    """Refuse starts after their token, and tokens of one document that tell different starts."""
    before = torch.cat([starts[:, :1].clamp(max=int(columns[0])), starts[:, :-1]], 1)
    good = (starts >= 0) & ((starts == before) | (starts == columns))
    if not bool(good.all()):
        row, place = (int(index) for index in (~good).nonzero()[0])
        raise ValueError(
            f"document_starts[{row}, {place}] is {int(starts[row, place])}: expected "
            f"{int(columns[place])}, the column itself, or {max(0, int(before[row, place]))}, the "
            "start of the token before"
        )
