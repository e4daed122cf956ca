"""Batches read ahead of their steps, by threads."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from titans_pretrain.data.loader import Batch


class ReadAhead:
    """Reads the batches of coming steps while the present one is trained on.

    A batch is a function of its step and position alone, so that neither the number of threads nor
    which of them reads it changes anything. A step that is not the next one, as after a rollback,
    is read then.

    Args:
        read: the batch of a step and a position.
        tokens: that a step consumes.
        steps: of the run; none is read beyond them.
        workers: threads, and steps read ahead; 0 reads when asked.
    """

    def __init__(
        self, read: Callable[[int, int], Batch], *, tokens: int, steps: int, workers: int
    ) -> None:
        self._read, self._tokens, self._steps, self._workers = read, tokens, steps, workers
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="reading")
        self._ahead: deque[tuple[tuple[int, int], Future[Batch]]] = deque()

    def take(self, step: int, position: int) -> Batch:
        """The batch of a step (from 0) that begins at a position.

        Raises:
            TitansError: what reading it raised.
        """
        if not self._workers:
            return self._read(step, position)
        if self._ahead and self._ahead[0][0] != (step, position):
            self._drop()
        while len(self._ahead) <= self._workers:
            number = len(self._ahead)
            if number and step + number >= self._steps:
                break
            place = (step + number, position + number * self._tokens)
            self._ahead.append((place, self._pool.submit(self._read, *place)))
        return self._ahead.popleft()[1].result()

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
