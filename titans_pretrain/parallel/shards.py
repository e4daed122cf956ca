"""What one rank holds of the training state: flat ranges of logical tensors.

ZeRO-3 cuts every parameter into equal flat ranges over the data ranks; a checkpoint is written in
hyper-rectangles of the logical tensor, so that any other cut can read it.
"""

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class FlatShard:
    """A rank's part of one logical tensor.

    Attributes:
        name: the logical tensor's full name.
        shape: its whole shape, over all ranks.
        start: first element of the part, counted row-major.
        stop: one past the last element; equal to ``start`` where the rank holds nothing.
        tensor: (stop - start,), the part itself on the rank's device. An engine's shards are views
            of its live state, so a checkpoint is read straight into them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= prod(self.shape):
            raise ValueError(
                f"{self.name}: [{self.start}, {self.stop}) is no range of a tensor of {self.shape}"
            )
        if self.tensor.shape != (self.stop - self.start,):
            raise ValueError(
                f"{self.name}: the part has shape {tuple(self.tensor.shape)}, "
                f"its range holds {self.stop - self.start} elements"
            )


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle of a logical tensor whose elements are contiguous row-major.

    Attributes:
        offsets: index of its first element, one a dimension.
        sizes: its extent, one a dimension.
        start: flat index of its first element in the logical tensor.
        stop: one past its last.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the row-major range ``[start, stop)`` into hyper-rectangles, in order and without gaps.

    Args:
        shape: the logical tensor's shape; () is a scalar.
        start: first flat index.
        stop: one past the last; an empty range has no boxes.

    Returns:
        At most ``2 * len(shape) - 1`` boxes that tile the range (one for a scalar).

    Raises:
        ValueError: the range does not lie in the tensor.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"[{start}, {stop}) is no range of a tensor of {shape}")
    return _boxes(shape, start, stop, (), 0) if start < stop else []


def _boxes(
    shape: tuple[int, ...], start: int, stop: int, prefix: tuple[int, ...], base: int
) -> list[Box]:
    """Boxes of a non-empty range under the leading indices ``prefix``, which start at ``base``."""
    leading = (1,) * len(prefix)
    if stop - start == prod(shape):
        return [Box(prefix + (0,) * len(shape), leading + shape, base + start, base + stop)]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        above = last * row
        return _boxes(shape[1:], start - above, stop - above, (*prefix, last), base + above)
    found = []
    if start < first * row:
        above = (first - 1) * row
        found += _boxes(shape[1:], start - above, row, (*prefix, first - 1), base + above)
    if first < last:
        rest = shape[1:]
        found.append(
            Box(
                (*prefix, first, *(0 for _ in rest)),
                (*leading, last - first, *rest),
                base + first * row,
                base + last * row,
            )
        )
    if last * row < stop:
        above = last * row
        found += _boxes(shape[1:], 0, stop - above, (*prefix, last), base + above)
    return found
