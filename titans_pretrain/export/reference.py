"""What the trained model computes on the CPU, whatever this process's layers are bound to.

A process of its own computes it where they may be bound to GPU kernels: ``main`` is its entrance.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from titans_pretrain.baselines import gpu_packages
from titans_pretrain.errors import TitansError
from titans_pretrain.export import reload, weights

_SHOWN_LINES = 5


def logits(
    checkpoint: Path, model: nn.Module, dtype: torch.dtype, ids: torch.Tensor
) -> torch.Tensor:
    """Logits (rows, T, V) of a checkpoint's model, one block's weights in memory at a time.

    Args:
        checkpoint: a ``step-N`` directory.
        model: its model without weights, of the code that trained it.
        dtype: what the weights are rounded to.
        ids: (rows, T) token ids.

    Raises:
        TitansError: the model does not run, or a logit is not finite.
    """
    compute = _elsewhere if gpu_packages.are_taken() else _here
    found = compute(checkpoint, model, dtype, ids)
    if not found.isfinite().all():
        raise TitansError(
            "the checkpoint's logits are not finite",
            where=str(checkpoint),
            fix="export an earlier checkpoint",
        )
    return found


def _here(
    checkpoint: Path, model: nn.Module, dtype: torch.dtype, ids: torch.Tensor
) -> torch.Tensor:
    read = functools.partial(weights.read, checkpoint, dtype=dtype)
    try:
        return reload.logits(model, ids, read)
    except (TitansError, OSError, MemoryError):  # of the checkpoint's files, and of this machine
        raise
    except Exception as error:
        raise _does_not_run(f"{type(error).__name__}: {error}", checkpoint) from error


def _elsewhere(
    checkpoint: Path, model: nn.Module, dtype: torch.dtype, ids: torch.Tensor
) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        save_file({"ids": ids}, room / "ids.safetensors")
        request = {
            "checkpoint": str(checkpoint.absolute()),
            "dtype": str(dtype).removeprefix("torch."),
            "ids": str(room / "ids.safetensors"),
            "logits": str(room / "logits.safetensors"),
            "threads": torch.get_num_threads(),
        }
        (room / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run(room, checkpoint)
        return load_file(room / "logits.safetensors")["logits"]


def _run(room: Path, checkpoint: Path) -> None:
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(room / "request.json")],
        cwd=room,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _does_not_run(done.stderr, checkpoint)


def _does_not_run(told: str, checkpoint: Path) -> TitansError:
    last = " | ".join(told.strip().splitlines()[-_SHOWN_LINES:])
    return TitansError(
        f"the trained model does not run on the CPU: {last}",
        where=str(checkpoint),
        fix="train a model whose layers run without GPU kernels, to export it",
    )


def main(request_path: str) -> None:
    """Write the logits that a request asks for."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    checkpoint, dtype = Path(request["checkpoint"]), getattr(torch, request["dtype"])
    with gpu_packages.for_device("cpu"):
        from titans_pretrain.export import huggingface

        model = huggingface.reference_model(checkpoint, dtype)
        read = functools.partial(weights.read, checkpoint, dtype=dtype)
        found = reload.logits(model, load_file(request["ids"])["ids"], read)
    save_file({"logits": found}, request["logits"])


if __name__ == "__main__":
    main(sys.argv[1])
