"""The machine a benchmark runs on: what it is, and what it could do at most."""

import datetime
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from titans_pretrain.bench.contenders import Contender, Machine
from titans_pretrain.bench.figures import Spread, spread
from titans_pretrain.errors import UserError

NAME = "machine"
CEILINGS = (NAME, "product"), (NAME, "copy")


def choose(device: str | None, dtype: str | None, threads: int | None) -> tuple[Machine, str]:
    """What contenders may use, and the dtype; what is there where nothing is given.

    Raises:
        UserError: a GPU is asked for and there is none, or more threads than cores.
    """
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("no GPU is there", where="--device cuda", fix="use --device cpu")
    device = device or ("cuda" if there else "cpu")
    cores = len(os.sched_getaffinity(0))
    if threads is not None and threads > cores:
        raise UserError(
            f"{threads} threads on {cores} cores measure how they wait for each other",
            where="--threads",
            fix=f"give at most {cores}",
        )
    return Machine(device, threads or cores), dtype or ("bf16" if device == "cuda" else "fp32")


def contender(machine: Machine, dtype: str) -> Contender:
    """The measured ceilings, as one that takes its turns; passes ``product`` and ``copy``."""
    options = {"device": machine.device, "dtype": dtype}
    return Contender(NAME, Path(__file__).with_name("ceilings.py"), "build", options)


def facts(machine: Machine) -> dict[str, Any]:
    """The environment, as it is before a run."""
    load = os.getloadavg()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(one, 2) for one in load],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "device": machine.device,
        "threads": machine.threads,
    }
    if machine.device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def line(found: Mapping[str, Any], *more: str) -> str:
    """The environment in a sentence."""
    parts = [
        found.get("gpu") or found["cpu"],
        f"{found['cores']} cores",
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}",
        f"load {found['load'][0]:.2f} before",
        f"Python {found['python']}",
        f"torch {found['torch']}",
        *more,
    ]
    return ", ".join(parts)


def rates(
    built: Mapping[str, Any], times: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]
) -> dict[str, list[float]]:
    """FLOP/s of matrix products and bytes/s of copies, round by round.

    Args:
        built: the contender's facts.
        times: of ``Field.times``.
    """
    return {
        "product": [built["flops"] / one["seconds"] for one in times[NAME, "product"]],
        "copy": [built["bytes"] / one["seconds"] for one in times[NAME, "copy"]],
    }


def ceilings(found: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """``rates`` as they go into a result."""
    return {
        "product_flops_per_second": spread(found["product"]),
        "copy_bytes_per_second": spread(found["copy"]),
    }


def ceilings_line(found: Mapping[str, Sequence[float]], dtype: str) -> str:
    """``rates`` in a sentence."""
    product = spread([one / 1e9 for one in found["product"]])
    copy = spread([one / 1e9 for one in found["copy"]])
    return (
        f"measured ceilings: {dtype} matrix products {product.text('.0f')} GFLOP/s, "
        f"copies {copy.text('.1f')} GB/s read and written"
    )


def known_peak(machine: Machine, dtype: str) -> float | None:
    """FLOP/s of the GPU's data sheet, as the trainer's MFU has it; None where it is not known."""
    import torch

    from titans_pretrain.train import speed

    return speed.peak(torch.device(machine.device), dtype)


def check_kernels(ways: Iterable[str], machine: Machine) -> None:
    """Refuse Triton kernels where none can run.

    Args:
        ways: of scanning memories, as ``train.memory_kernels``.
        machine: what they may use.

    Raises:
        UserError: kernels on a CPU.
    """
    if "triton" in ways and machine.device != "cuda":
        raise UserError(
            "Triton kernels run on GPUs",
            where="--memory-kernels",
            fix="use --device cuda, or --memory-kernels torch",
        )


def _cpu() -> str:
    for told in Path("/proc/cpuinfo").read_text().splitlines():
        if told.startswith("model name"):
            return told.partition(":")[2].strip()
    return platform.machine()
