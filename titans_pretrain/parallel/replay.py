"""What communication gave a forward pass, kept for its recomputation.

A checkpointed block runs twice: in forward, and again inside backward. Its neighbours communicate
once, so the second run takes from here what the first one received.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from torch import Tensor

Tensors = tuple[Tensor, ...]


class Replay:
    """A micro-batch's received tensors by the name of their place in the model.

    Args:
        enabled: whether blocks are recomputed; otherwise nothing is kept.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._kept: dict[int, dict[str, deque[Tensors]]] = {}
        self._current: dict[str, deque[Tensors]] | None = None
        self._recomputing = False

    @contextlib.contextmanager
    def recording(self, micro_batch: int) -> Iterator[None]:
        """During the forward pass of a micro-batch that will have a backward pass."""
        if self._enabled:
            self._current = self._kept[micro_batch] = {}
        try:
            yield
        finally:
            self._current = None

    @contextlib.contextmanager
    def recomputing(self, micro_batch: int) -> Iterator[None]:
        """During the backward pass of a micro-batch; forgets it afterwards."""
        self._recomputing, self._current = self._enabled, self._kept.pop(micro_batch, None)
        try:
            yield
        finally:
            self._recomputing, self._current = False, None

    def once(self, name: str, communicate: Callable[[], Tensors]) -> Tensors:
        """What ``communicate`` returns, from its first run where a block is recomputed.

        Args:
            name: of the place in the model; several calls at one place keep their order.
            communicate: sends, receives or reduces; its tensors carry no graph.
        """
        if self._recomputing:
            assert self._current is not None
            return self._current[name].popleft()
        received = communicate()
        if self._current is not None:
            self._current.setdefault(name, deque()).append(received)
        return received
