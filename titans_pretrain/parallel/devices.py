"""The device a rank computes on and the process group it talks through."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel import rendezvous

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=30)
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def local_device() -> torch.device:
    """This rank's GPU by LOCAL_RANK, or the CPU where the machine has none.

    A SLURM task that ``srun --gpus-per-task=1`` shows one GPU, its own, takes that one.

    Raises:
        UserError: more local ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank and gpus == 1 and _task_has_own_gpu():
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise UserError(
            f"local rank {local_rank} has no GPU: this host shows {gpus}",
            where=f"rank {os.environ.get('RANK', '0')} on {os.uname().nodename}",
            fix=f"start at most {gpus} ranks on each host, or give them GPUs: "
            "srun --gpus-per-task=1, or --gpus-per-node",
        )
    return torch.device("cuda", local_rank)


def _task_has_own_gpu() -> bool:
    """Whether this rank is a SLURM task to which CUDA_VISIBLE_DEVICES shows one GPU.

    Ranks that torchrun or ``titans train`` started share their parent's, so it is not their own.
    """
    is_task = os.environ.get("SLURM_LOCALID") == os.environ.get("LOCAL_RANK")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return is_task and len(shown) == 1 and bool(shown[0])


@contextlib.contextmanager
def process_group(
    device: torch.device,
    hosts: Callable[[], Sequence[str]] = tuple,
    patience: timedelta | None = None,
) -> Iterator[None]:
    """The default process group while the block runs.

    NCCL for GPU tensors, gloo for host tensors; needs the variables in ``RANK_VARIABLES``. It is
    left as it is when the block fails, as taking it down may wait for the other ranks.

    Args:
        device: of this rank.
        hosts: of the ranks in their order, as far as known, for the error.
        patience: with ranks that come late; None is ten minutes.

    Raises:
        TitansError: variables are missing, or rank 0 cannot listen or be reached.
        MissingRanks: ranks are.
    """
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise TitansError(
            f"variables {', '.join(missing)} are not set",
            where="environment of the rank",
            fix="start with `titans train`, torchrun or srun",
        )
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its GPU from it
    store = rendezvous.meet(hosts, patience)
    store.set_timeout(TIMEOUT)  # torch leaves that of a given store as it is
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    yield
    dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """The number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of a host tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class OtherRankFailed(TitansError):
    """The same failure as another rank's, which tells it; this rank only ends with its code."""

    def __init__(self, error: TitansError, rank: int) -> None:
        super().__init__(error.what, where=f"{error.where} (rank {rank})", fix=error.fix)
        self.exit_code = error.exit_code


def together(action: Callable[[], Result]) -> Result:
    """Run ``action`` on all ranks; where it fails on one rank, all of them raise.

    A rank that raised alone would leave the others waiting in their next collective.

    Raises:
        TitansError: on the lowest rank that failed, its own error.
        OtherRankFailed: on all other ranks.
    """
    result: Result | None = None
    failure: TitansError | None = None
    try:
        result = action()
    except TitansError as error:
        failure = error
    for number, first in enumerate(gather_objects(failure)):
        if first is not None:
            raise failure if failure and number == rank() else OtherRankFailed(first, number)
    return cast(Result, result)


def from_first(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and give every rank its result; its failure is everyone's."""
    result = together(lambda: action() if rank() == 0 else None)
    return cast(Result, gather_objects(result)[0])
