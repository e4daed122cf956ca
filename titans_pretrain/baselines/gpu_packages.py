"""Packages of GPU kernels, which transformers' layers take wherever they can be imported.

Layers are bound to them, or to plain torch, when their module is imported; kernels refuse tensors
on a CPU.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder

NAMES = ("causal_conv1d", "mamba_ssm", "fla")


@contextlib.contextmanager
def for_device(kind: str | None = None, *, keep: str | None = None) -> Iterator[None]:
    """Bind layers whose modules are imported inside to what runs on a kind of device.

    Args:
        kind: ``cpu``, or any other, which has the kernels, with an index or not; None for a GPU if
            there is one.
        keep: a package that is asked for by its name, and stays, unless it is hidden already.
    """
    if kind is None:
        import torch

        kind = "cuda" if torch.cuda.device_count() else "cpu"
    on_cpu = kind.partition(":")[0] == "cpu"
    hidden = [name for name in NAMES if on_cpu and name != keep]
    held = {name: sys.modules[name] for name in hidden if name in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: cannot be imported
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(held)


def is_hidden(name: str) -> bool:
    """Whether a package is installed, and ``for_device`` keeps it from being imported now."""
    hidden = name in NAMES and sys.modules.get(name, name) is None
    return hidden and PathFinder.find_spec(name) is not None


def are_taken() -> bool:
    """Whether layers of this process may be bound to GPU kernels."""
    return any(sys.modules.get(name) is not None for name in NAMES)
