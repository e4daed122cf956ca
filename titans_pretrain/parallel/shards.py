"""What one rank holds of the training state: flat ranges of windows of logical tensors.

Tensor parallelism gives a rank a window of every parameter it splits, ZeRO-3 cuts the window into
equal flat ranges over the data ranks; a checkpoint is written in hyper-rectangles of the logical
tensor, so that any other cut can read it.
"""

from dataclasses import dataclass, replace
from math import prod
from operator import add

import torch


@dataclass(frozen=True)
class FlatShard:
    """A rank's part of one logical tensor: a flat range of a window of it.

    Attributes:
        name: the logical tensor's full name.
        shape: its whole shape, over all ranks.
        start: first element of the part, counted row-major inside the window.
        stop: one past the last element; equal to ``start`` where the rank holds nothing.
        tensor: (stop - start,), the part itself on the rank's device. An engine's shards are views
            of its live state, so a checkpoint is read straight into them.
        offsets: index of the window's first element, one a dimension; None: the tensor's first.
        sizes: the window's extent, one a dimension; None: the tensor's. Given with ``offsets``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: torch.Tensor
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        offsets, sizes = self.window
        if not len(offsets) == len(sizes) == len(self.shape) or any(
            not 0 <= offset <= offset + size <= extent
            for offset, size, extent in zip(offsets, sizes, self.shape, strict=True)
        ):
            raise ValueError(
                f"{self.name}: offsets {offsets} with sizes {sizes} are no window of a tensor of "
                f"{self.shape}"
            )
        if not 0 <= self.start <= self.stop <= prod(sizes):
            raise ValueError(
                f"{self.name}: [{self.start}, {self.stop}) is no range of a tensor of {sizes}"
            )
        if self.tensor.shape != (self.stop - self.start,):
            raise ValueError(
                f"{self.name}: the part has shape {tuple(self.tensor.shape)}, "
                f"its range holds {self.stop - self.start} elements"
            )

    @property
    def window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes of the window."""
        if (self.offsets is None) != (self.sizes is None):
            raise ValueError(f"{self.name}: a window has offsets and sizes")
        if self.offsets is None or self.sizes is None:
            return (0,) * len(self.shape), self.shape
        return self.offsets, self.sizes

    def boxes(self) -> list["Box"]:
        """The part as hyper-rectangles of the logical tensor, in order.

        Returns:
            Boxes at offsets in the logical tensor; their ``start`` and ``stop`` count inside the
            window, like the shard's.
        """
        offsets, sizes = self.window
        return [
            replace(box, offsets=tuple(map(add, offsets, box.offsets)))
            for box in boxes(sizes, self.start, self.stop)
        ]


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle of a tensor or window whose elements are contiguous row-major there.

    Attributes:
        offsets: index of its first element, one a dimension.
        sizes: its extent, one a dimension.
        start: flat index of its first element in the tensor or window that was cut.
        stop: one past its last.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the row-major range ``[start, stop)`` into hyper-rectangles, in order and without gaps.

    Args:
        shape: the shape of the tensor or window; () is a scalar.
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
