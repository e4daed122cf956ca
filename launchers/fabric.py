"""Joins the processes of all nodes and measures the network between them.

One process a GPU over NCCL, or one a node over gloo, started by ``launchers.preflight_node``, which
reads the rows of JSON that it writes to a pipe. The only module here that needs torch.
"""

import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PHASES = ("started", "torch", "device", "connected", "joined", "reduced", "done")
BEAT_SECONDS = 1.0
SUM_ELEMENTS = 2**20
PAIR_BYTES = {"gloo": 2**23, "nccl": 2**26}
PAIR_SECONDS = 0.3
LEAST_REPEATS, MOST_REPEATS = 4, 20
FACTOR = 2654435761


@dataclass(frozen=True)
class Place:
    """Where one process stands among all.

    Attributes:
        node: its node's number, from 0.
        nodes: how many there are.
        local: its number on its node.
        locals: processes on each node.
        address: host of the first process.
        port: on which that one listens.
        seconds: the network may take for anything.
        cuda: whether it has a GPU, by its local number.
        pipe: file descriptor for what it found.
    """

    node: int
    nodes: int
    local: int
    locals: int
    address: str
    port: int
    seconds: float
    cuda: bool
    pipe: int


def turns(nodes: int) -> int:
    """How many exchanges each node takes part in at most, so that it meets two neighbours."""
    return 0 if nodes < 2 else 1 if nodes == 2 else 2 + nodes % 2


def partner(node: int, nodes: int, turn: int) -> int | None:
    """The neighbour, in a ring of all nodes, that a node exchanges with; None sits out."""
    if turn == 0:
        other = node ^ 1
        return other if other < nodes else None
    if turn == 2:
        return {0: nodes - 1, nodes - 1: 0}.get(node)
    other = node + 1 if node % 2 else node - 1
    if 0 <= other < nodes:
        return other
    return other % nodes if nodes % 2 == 0 else None


def main() -> None:
    """Join, add, exchange; each thing found is a row of the pipe."""
    place = Place(**json.loads(sys.argv[1]))
    rows = os.fdopen(place.pipe, "w", encoding="ascii")
    writing = threading.Lock()

    def tell(**found: Any) -> None:
        with writing:
            rows.write(json.dumps(found) + "\n")
            rows.flush()

    def beat() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            tell()

    threading.Thread(target=beat, daemon=True).start()
    tell(phase="started")
    try:
        _Fabric(place, tell).run()
    except Exception as error:  # what the libraries raise differs by version; all of it is told
        tell(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
        raise
    os._exit(0)  # taking a process group down may wait for others


class _Fabric:
    """The process group of a check."""

    def __init__(self, place: Place, tell: Callable[..., None]) -> None:
        self._place, self._tell = place, tell

    def run(self) -> None:
        """Do all there is to do, one phase after another."""
        import torch

        self._tell(phase="torch")
        place = self._place
        if place.cuda:
            gpus = torch.cuda.device_count()
            self._tell(gpus=gpus)
            if place.local >= gpus:
                raise RuntimeError(f"torch sees {gpus} GPUs, too few for process {place.local}")
            own = torch.device("cuda", place.local)
            torch.cuda.set_device(own)
            torch.zeros(1, device=own)
        else:
            own = torch.device("cpu")
        self._tell(phase="device")
        self._device = own
        self._join()
        self._add()
        for turn in range(turns(place.nodes)):
            other = partner(place.node, place.nodes, turn)
            if other is not None:
                self._tell(pair=self._exchange(other))
        self._tell(phase="done")
        self._together()  # the first process holds the store that the others may need yet

    def _join(self) -> None:
        import torch.distributed as dist

        place = self._place
        limit = datetime.timedelta(seconds=place.seconds)
        rank, ranks = place.node * place.locals + place.local, place.nodes * place.locals
        store = dist.TCPStore(  # type: ignore[attr-defined]
            place.address,
            place.port,
            ranks,
            is_master=rank == 0,
            timeout=limit,
            wait_for_workers=False,
        )
        self._tell(phase="connected", host=socket.gethostname())
        self._backend = "nccl" if place.cuda else "gloo"
        dist.init_process_group(
            self._backend, store=store, rank=rank, world_size=ranks, timeout=limit
        )
        self._together()
        self._tell(phase="joined", clock=time.time())

    def _together(self) -> None:
        import torch.distributed as dist

        dist.barrier(device_ids=[self._device.index] if self._place.cuda else None)

    def _add(self) -> None:
        """An all-reduce of integers, whose sum must be exact."""
        import torch.distributed as dist

        ranks, rank = dist.get_world_size(), dist.get_rank()
        values = self._pattern(SUM_ELEMENTS)
        total = values * (rank + 1)
        begun = time.perf_counter()
        dist.all_reduce(total)
        self._settle()
        seconds = time.perf_counter() - begun
        right = bool((total == values * (ranks * (ranks + 1) // 2)).all().item())
        self._tell(phase="reduced", right=right, seconds=seconds)

    def _exchange(self, other: int) -> dict[str, Any]:
        """Both directions at once with the process of the same local number on another node."""
        import torch

        size = PAIR_BYTES[self._backend]
        peer = other * self._place.locals + self._place.local
        sent = self._pattern(size // 8)
        got, one = torch.zeros_like(sent), torch.zeros(1, dtype=torch.int64, device=self._device)
        self._swap(one.clone(), one, peer)
        first = self._swap(sent, got, peer)
        count = max(LEAST_REPEATS, min(MOST_REPEATS, int(PAIR_SECONDS / max(first, 1e-6))))
        self._swap(torch.full_like(one, count), one, peer)
        count = min(count, int(one.item()))
        seconds = min(self._swap(sent, got, peer) for _ in range(count))
        latency = min(self._swap(one.clone(), one, peer) for _ in range(MOST_REPEATS))
        right = bool((got == sent).all().item())
        found = {"seconds": seconds, "latency": latency, "bytes": size, "right": right}
        return {"other": other, **found}

    def _swap(self, sent: Any, got: Any, peer: int) -> float:
        import torch.distributed as dist

        self._settle()
        begun = time.perf_counter()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
        ):
            work.wait()
        self._settle()
        return time.perf_counter() - begun

    def _settle(self) -> None:
        if self._place.cuda:
            import torch

            torch.cuda.synchronize()

    def _pattern(self, elements: int) -> Any:
        """Integers below 2^31 with all bits in use; the same everywhere."""
        import torch

        return torch.arange(elements, dtype=torch.int64, device=self._device) * FACTOR % 2**31


if __name__ == "__main__":
    main()
