"""Runs training steps of one rank and tells the bytes of tensors that were alive at most.

``python measured_step.py``: run configurations as a JSON list on stdin, one line of JSON each on
stdout. Tensors are counted by their storages, when an operation makes them and when they die; what
a kernel takes for itself inside is not seen.
"""

import json
import os
import sys
import tempfile
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations in its scope made or touched and that still live.

    Attributes:
        live: now.
        peak: at most since ``mark``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def mark(self) -> None:
        """Count the peak from here."""
        self.peak = self.live

    def take(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            weakref.finalize(storage, self._forget, key)
            self._known[key] = 0
        self.live += size - self._known[key]  # DeepSpeed empties and refills storages
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.take(leaf)
        return result


def measure(settings: dict[str, Any]) -> dict[str, int]:
    """One step of a run on made-up tokens.

    Returns:
        Bytes alive before it (``resting``), at most (``peak``), and at most in the passes
        (``passes``) and in the update (``update``).
    """
    from titans_pretrain import config as run_config
    from titans_pretrain.data.loader import Batch
    from titans_pretrain.parallel.mesh import Mesh
    from titans_pretrain.parallel.parallelize import Parallel
    from titans_pretrain.train.build import build_engine
    from titans_pretrain.train.passes import Passes

    config = run_config.resolve(settings, source="here")
    train, device = config.train, torch.device("cpu")
    shape = train.global_batch_size, config.data.sequence_length + 1
    with LiveTensors() as tensors:
        checkpointed = train.activation_checkpointing
        parallel = Parallel(Mesh(), 0, activation_checkpointing=checkpointed)
        engine = build_engine(config, parallel, device)
        passes = Passes(engine, parallel, config, device)
        batch = Batch(torch.randint(config.model["vocab_size"], shape), None)
        resting = tensors.live
        tensors.mark()
        passes.train(batch, batch.tokens[:, 1:].numel())
        in_passes = tensors.peak
        tensors.mark()
        engine.step(1e-3)
        in_update = tensors.peak
        engine.destroy()
    return {
        "resting": resting,
        "passes": in_passes,
        "update": in_update,
        "peak": max(in_passes, in_update),
    }


def main() -> None:
    """Measure the runs on stdin."""
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
        for settings in json.load(sys.stdin):
            sys.stdout.write(json.dumps(measure(settings)) + "\n")
            sys.stdout.flush()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
