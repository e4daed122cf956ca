"""Worker processes that read and encode units, each on one core.

The parent deals out spans in order and takes their batches in order, so that what it sees does not
depend on how many workers there are. A worker whose parent is gone, however it went, reads the end
of its socket and exits.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.batch import Batch, Encoding, Span, Work
from titans_pretrain.errors import TitansError

BATCH, END, ERROR = 0, 1, 2
QUEUED = 2  # spans that a worker holds, so that it need not wait for the next
AHEAD_BYTES = 2**24  # of batches that wait for their turn, times the workers
INPUT_BYTES = 2**24  # of input for which one more worker is worth its start
SOCKET_BYTES = 2**22  # sent without waiting for the parent, where the system grants it
STOP_SECONDS = 10.0

Encode = Callable[[Span], Iterator[tuple[int, Batch]]]


def default_workers(work: Work) -> int:
    """How many processes to use: one a core, fewer for small inputs, 0 for very small ones."""
    size = sum(item.size / max(layout.units, 1) for _, item, layout, _ in work.units)
    most = min(len(os.sched_getaffinity(0)), len(work.units), int(size / INPUT_BYTES))
    return most if most > 1 else 0


class Workers:
    """Encodes units in other processes; use as a context manager.

    Args:
        work: what to encode.
        count: how many processes, at least 1.
    """

    def __init__(self, work: Work, count: int) -> None:
        self._work, self._count = work, count
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._dealt: dict[Connection, deque[int]] = {}
        self._received: dict[int, deque[tuple[int, Any]]] = {}
        self._waiting_bytes = 0

    def __enter__(self) -> "Workers":
        try:
            for _ in range(self._count):
                self._start()
            for connection in self._processes:
                with self._alive(connection):
                    connection.send(self._work)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not any(self._dealt.values()):
            for connection in self._processes:
                with contextlib.suppress(OSError):
                    connection.send(None)
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
        self._kill()

    def batches(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, Batch]]:
        """The batches of spans, in order, each with its span and its number within the unit.

        Raises:
            TitansError: what a worker raised, or one that died; once it is that unit's turn.
        """
        todo = deque(enumerate(spans))
        for turn, span in enumerate(spans):
            while True:
                self._deal(todo, turn)
                messages = self._received[turn]
                if not messages:
                    self._receive(turn)
                    continue
                kind, content = messages.popleft()
                if kind == END:
                    del self._received[turn]
                    break
                if kind == ERROR:
                    raise content
                index, batch = content
                self._waiting_bytes -= batch.bytes
                yield span, index, batch

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        path = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[1])])
        command = [sys.executable, "-P", "-m", "data_prep.workers", str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        connection = Connection(ours.detach())
        self._processes[connection], self._dealt[connection] = process, deque()

    def _deal(self, todo: deque[tuple[int, Span]], turn: int) -> None:
        """Give spans to workers that have room, as far ahead as memory allows."""
        room = self._waiting_bytes < AHEAD_BYTES * self._count
        while todo and (room or todo[0][0] == turn):
            connection = min(self._dealt, key=lambda one: len(self._dealt[one]))
            if len(self._dealt[connection]) >= QUEUED:
                return
            number, span = todo.popleft()
            self._dealt[connection].append(number)
            self._received[number] = deque()
            with self._alive(connection):
                connection.send(span)

    def _receive(self, turn: int) -> None:
        """Take what has come; from those who are ahead only while memory allows."""
        room = self._waiting_bytes < AHEAD_BYTES * self._count
        sources = [
            connection
            for connection, dealt in self._dealt.items()
            if dealt and (room or dealt[0] == turn)
        ]
        for connection in wait(sources):
            assert isinstance(connection, Connection)
            with self._alive(connection):
                kind, content = connection.recv()
            number = self._dealt[connection][0]
            self._received[number].append((kind, content))
            if kind == BATCH:
                self._waiting_bytes += content[1].bytes
            else:
                self._dealt[connection].popleft()

    @contextlib.contextmanager
    def _alive(self, connection: Connection) -> Iterator[None]:
        """Name how a worker ended."""
        try:
            yield
        except (EOFError, OSError):
            code = self._processes[connection].wait()
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            )
            raise TitansError(
                f"a worker process {how}",
                where=f"process {self._processes[connection].pid}",
                fix="if memory ran out use fewer --workers; repeat the command: what is finished "
                "is kept",
            ) from None

    def _kill(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
            process.wait()


def main(arguments: list[str]) -> None:
    """Serve spans over the socket with this descriptor until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    connection = Connection(int(arguments[0]))
    try:
        work: Work = connection.recv()
    except (EOFError, OSError):
        return
    spans: queue.SimpleQueue[Span | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, spans), daemon=True).start()
    import pyarrow as pa

    pa.set_cpu_count(1)
    with contextlib.ExitStack() as stack:
        encode: Encode
        try:
            encode = stack.enter_context(Encoding(work)).span
        except Exception as error:
            encode = _failing(_told(error, "its start"))
        while (span := spans.get()) is not None:
            _serve(connection, encode, span)


def _listen(connection: Connection, spans: "queue.SimpleQueue[Span | None]") -> None:
    """Take spans from the parent; without a parent there is nothing left to do."""
    try:
        while (span := connection.recv()) is not None:
            spans.put(span)
        spans.put(None)
    except (EOFError, OSError):
        os._exit(1)


def _serve(connection: Connection, encode: Encode, span: Span) -> None:
    try:
        for found in encode(span):
            _send(connection, BATCH, found)
    except Exception as error:
        _send(connection, ERROR, _told(error, str(span)))
    else:
        _send(connection, END, None)


def _failing(error: TitansError) -> Encode:
    """What a worker that cannot start answers to every span."""

    def encode(_: Span) -> Iterator[tuple[int, Batch]]:
        raise error

    return encode


def _told(error: Exception, where: str) -> TitansError:
    """An error as it is; one that nobody foresaw with a trace."""
    if isinstance(error, TitansError):
        return error
    traceback.print_exception(error)
    what = f"a worker process failed: {type(error).__name__}: {error}"
    return TitansError(what, where=where, fix="see the traceback above")


def _send(connection: Connection, kind: int, content: Any) -> None:
    try:
        connection.send((kind, content))
    except OSError:
        os._exit(1)  # the parent is gone


if __name__ == "__main__":
    main(sys.argv[1:])
