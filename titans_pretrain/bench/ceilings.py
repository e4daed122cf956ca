"""What the machine can do at most: a large matrix product, and a copy beyond the caches."""

from collections.abc import Callable
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = {"cpu": 2048, "cuda": 8192}
BYTES = {"cpu": 2**27, "cuda": 2**31}


def build(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """Passes ``product`` and ``copy``; ``flops`` of the one, ``bytes`` of the other.

    Args:
        options: ``device``, ``dtype``, and ``size`` of the matrices if not as usual.
    """
    device, dtype = options["device"], DTYPES[options["dtype"]]
    size = options.get("size") or SIZE[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    count = options.get("bytes") or BYTES[device]
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return (
        {"flops": 2 * size**3, "bytes": 2 * count},
        {
            "product": lambda: torch.mm(left, right, out=product),
            "copy": lambda: target.copy_(source),
        },
    )
