"""What crosses the two ends of the tokens a layer is given, where a sequence is cut into spans.

A layer of a whole sequence has nothing before it and hands nothing on: that is ``Boundary`` itself.
A trainer that holds one span of every sequence gives the layers another one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Like(NamedTuple):
    """What a tensor that another span may hand over looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Boundary:
    """The ends of a whole sequence: the first token has no past, and nothing comes after."""

    def first(self, tokens: int) -> int:
        """Place in its sequence of the first of ``tokens`` tokens."""
        return 0

    def halo(self, length: int, tensors: Tensors, dim: int) -> tuple[Tensors, Tensors]:
        """Look back over the start of the span.

        Args:
            length: entries wanted from before the first one.
            tensors: what this span has along ``dim``.
            dim: the axis of time.

        Returns:
            The tensors, to be used from here on, and of each at most ``length`` entries that come
            before them, fewer near the start of the sequence.
        """
        return tensors, tuple(tensor.narrow(dim, 0, 0) for tensor in tensors)

    def enter(self, start: Callable[[], Tensors], like: tuple[Like, ...]) -> Tensors:
        """The state before the first token: ``start()``, or what the span before hands over.

        Args:
            start: makes the state at the start of a sequence.
            like: what it looks like.
        """
        return start()

    def leave(self, tied: Tensor, state: Tensors) -> Tensor:
        """Hand the state on to the span after.

        Args:
            tied: a result of this span that its loss depends on.
            state: after the last token.

        Returns:
            ``tied``; its gradient is passed on once the state's has come back.
        """
        return tied

    def whole(self, attend: Callable[..., Tensor], queries: Tensor, *others: Tensor) -> Tensor:
        """``attend`` over whole sequences, for attention without a window.

        Args:
            attend: maps (B, H, T, h) tensors to one of them, head by head.
            queries: (B, H, T, h) of this span.
            others: keys and values, alike.
        """
        return attend(queries, *others)

    def joined(self, columns: Tensor, device: torch.device) -> Tensor:
        """(B, T) integers of this span's tokens to those of whole sequences, both on the host.

        Args:
            columns: of this span.
            device: where the layer computes, by which other spans are reached.
        """
        return columns


WHOLE = Boundary()
