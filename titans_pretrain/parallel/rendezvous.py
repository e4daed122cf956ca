"""The ranks of a start find each other, or it is told within minutes who is missing."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from titans_pretrain.errors import STOPPED, TitansError
from titans_pretrain.parallel import LISTENER

PATIENCE = timedelta(minutes=10)
LINGER_SECONDS = 15.0
TOLD = 8
BUSY = ("EADDRINUSE", "address already in use")
FIX = (
    "see why it did not start (its log, its node's state) and start again without that host; "
    "MASTER_ADDR and MASTER_PORT must be rank 0's, reachable from every host"
)


class MissingRanks(TitansError):
    """Not all ranks of a start came: it hangs.

    Attributes:
        rank: the first that is missing; None where this rank does not tell who is.
        host: of that rank, as far as known.
    """

    exit_code = STOPPED
    rank: int | None = None
    host = ""


def meet(hosts: Callable[[], Sequence[str]], patience: timedelta | None = None) -> Any:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT; the store that they share.

    Rank 0 keeps the store, or the agent of torchrun does.

    Args:
        hosts: of the ranks in their order, as far as known; asked only if some are missing.
        patience: with the ranks; None is ten minutes.

    Raises:
        MissingRanks: some did not come in time; the lowest that did names them.
        TitansError: rank 0 cannot listen, or cannot be reached.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = patience or PATIENCE
    store = _store(rank, ranks, patience)
    try:
        store.set(_key(rank), socket.gethostname())
        if store.add("titans/arrived", 1) == ranks:
            store.set("titans/all", "")
        # Rank 0 is the first to give up: whoever ends first may have the others killed.
        store.wait(["titans/all"], patience + timedelta(seconds=LINGER_SECONDS if rank else 0))
    except dist.DistError:
        if error := _missing(store, ranks, patience, hosts):
            raise error from None
    return store


def _store(rank: int, ranks: int, patience: timedelta) -> Any:
    """The store; under torchrun, whose store outlives its ranks, the part of this restart."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            ranks,
            is_master=rank == 0 and not of_agent,
            timeout=patience,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_inherited() if rank == 0 else None,
        )
    except dist.DistError as error:
        where = f"start of rank {rank} on {socket.gethostname()}"
        if any(sign in str(error) for sign in BUSY):
            raise TitansError(
                f"rank 0 cannot listen at port {port}: another process has it",
                where=where,
                fix="set MASTER_PORT to a free port, or end that process, and start again",
            ) from None
        why = str(error).splitlines()[0]
        what = f"rank {rank} cannot reach rank 0 at {address}:{port}: {why}"
        raise TitansError(what, where=where, fix=FIX) from None
    if of_agent:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"titans/{restart}", store)  # type: ignore[attr-defined]
    return store


def _inherited() -> int | None:
    """The socket at MASTER_PORT that the launcher of this rank 0 listens at for it, if it does."""
    number = os.environ.pop(LISTENER, None)
    if number is None:
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def _missing(
    store: Any, ranks: int, patience: timedelta, hosts: Callable[[], Sequence[str]]
) -> MissingRanks | None:
    """Who did not come, told by the lowest rank that did; the others give it time to.

    None if the last has come at the last moment.
    """
    rank, minutes = int(os.environ["RANK"]), patience.total_seconds() / 60
    where = f"start of rank {rank} on {socket.gethostname()}"
    what = f"not all {ranks} ranks came within {minutes:g} minutes"
    try:
        absent = [other for other in range(ranks) if not store.check([_key(other)])]
    except dist.DistError:  # rank 0 has told, and taken the store along
        return MissingRanks(what, where=where, fix=FIX)
    if not absent:
        return None
    if any(other not in absent for other in range(rank)):
        time.sleep(LINGER_SECONDS)
        return MissingRanks(what, where=where, fix=FIX)
    names = hosts()
    places = [names[other] if other < len(names) else "an unknown host" for other in absent]
    told = [f"{other} on {place}" for other, place in zip(absent, places, strict=True)][:TOLD]
    more = f" and {len(absent) - TOLD} more" if len(absent) > TOLD else ""
    what = f"rank {', rank '.join(told)}{more} did not come within {minutes:g} minutes"
    error = MissingRanks(what, where=where, fix=FIX)
    error.rank, error.host = absent[0], places[0]
    return error


def _key(rank: int) -> str:
    return f"titans/rank-{rank}"
