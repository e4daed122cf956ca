"""The ranks of a start find each other, or it is told within minutes who is missing."""

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from titans_pretrain.errors import TitansError

PATIENCE = timedelta(minutes=10)
TOLD = 8
FIX = (
    "see why it did not start (its log, its node's state) and start again without that host; "
    "MASTER_ADDR and MASTER_PORT must be rank 0's, reachable from every host"
)


class MissingRanks(TitansError):
    """Not all ranks of a start came."""


def meet(hosts: Callable[[], Sequence[str]]) -> Any:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT; the store that they share.

    Rank 0 keeps the store, or the agent of torchrun does.

    Args:
        hosts: of the ranks in their order, as far as known; asked only if some are missing.

    Raises:
        MissingRanks: some did not come within ten minutes; rank 0 names them.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            ranks,
            is_master=rank == 0 and not of_agent,
            timeout=PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(_key(rank), socket.gethostname())
        if store.add("titans/arrived", 1) == ranks:
            store.set("titans/all", "")
    except dist.DistError as error:
        raise MissingRanks(
            f"rank {rank} cannot reach rank 0 at {address}:{port}: {str(error).splitlines()[0]}",
            where=f"start of rank {rank} on {socket.gethostname()}",
            fix=FIX,
        ) from None
    try:
        store.wait(["titans/all"], PATIENCE)
    except dist.DistError:
        raise _missing(store, rank, ranks, hosts) from None
    return store


def _missing(store: Any, rank: int, ranks: int, hosts: Callable[[], Sequence[str]]) -> MissingRanks:
    minutes = PATIENCE.total_seconds() / 60
    if rank:
        what = f"not all {ranks} ranks came within {minutes:g} minutes; rank 0 names the missing"
    else:
        absent = [other for other in range(ranks) if not store.check([_key(other)])]
        names = hosts()
        told = [
            f"{other} on {names[other] if other < len(names) else 'an unknown host'}"
            for other in absent[:TOLD]
        ]
        more = f" and {len(absent) - TOLD} more" if len(absent) > TOLD else ""
        what = f"rank {', rank '.join(told)}{more} did not come within {minutes:g} minutes"
    return MissingRanks(what, where=f"start of rank {rank} on {socket.gethostname()}", fix=FIX)


def _key(rank: int) -> str:
    return f"titans/rank-{rank}"
