"""One layer of a memory or of attention, as contenders: built here, run in their own processes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.bench.ceilings import DTYPES
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.layers import merge_heads, split_heads
from titans_pretrain.model.modeling_titans import TitansModel
from titans_pretrain.plan import flops
from titans_pretrain.train import kernels

Built = tuple[dict[str, Any], dict[str, Callable[[], object]]]


class MemoryLayer(nn.Module):
    """The memory with its projections, and one of its output, as attention has."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        mixer: Any = TitansModel(config).layers[0].mixer  # with its initial weights
        self.memory, self.o_proj = mixer.memory, mixer.o_proj

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        reads, _ = self.memory(x, None, None, {})
        output: Tensor = self.o_proj(reads)
        return output


class AttentionLayer(nn.Module):
    """Full causal attention by torch's fastest kernel: q, k, v, o projections and nothing else."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        q, k, v = (split_heads(part, self.head_width) for part in self.qkv_proj(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: Tensor = self.o_proj(merge_heads(attended))
        return output


def memory(options: dict[str, Any]) -> Built:
    """Our layer; passes ``training`` and, of the scan alone without gradients, ``scan``.

    Args:
        options: ``model`` (fields of the configuration), ``length``, ``batch``, ``device``,
            ``dtype``, ``memory_kernels``.

    Raises:
        UserError, TitansError: see ``kernels.choose``.
    """
    torch.manual_seed(0)
    layer = MemoryLayer(TitansConfig(**options["model"]))
    x = prepared(layer, options)
    kernels.choose(layer, options["memory_kernels"], options["dtype"], x.device)
    length = options["length"]
    return (
        {
            "parameters": sum(p.numel() for p in layer.parameters()),
            "scan_flops": options["batch"] * flops.memory(options["model"], length),
        },
        training(layer, x) | {"scan": _scan(layer, x)},
    )


def attention(options: dict[str, Any]) -> Built:
    """The attention layer of the same width; pass ``training``. See ``memory``."""
    torch.manual_seed(0)
    model = options["model"]
    layer = AttentionLayer(model["hidden_size"], model["memory_heads"])
    x = prepared(layer, options)
    return {"parameters": sum(p.numel() for p in layer.parameters())}, training(layer, x)


def prepared(layer: nn.Module, options: Mapping[str, Any]) -> Tensor:
    """Move a layer to its device and dtype; its input (B, T, D)."""
    device, dtype = torch.device(options["device"]), DTYPES[options["dtype"]]
    layer.to(device=device, dtype=dtype)
    shape = options["batch"], options["length"], options["model"]["hidden_size"]
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def training(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Passes ``training``, gradients of parameters and input made anew, and ``forget``."""
    gradient = torch.randn_like(x)

    def forget() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    def run() -> None:
        forget()
        layer(x).backward(gradient)

    return {"training": run, "forget": forget}


def _scan(layer: MemoryLayer, x: Tensor) -> Callable[[], None]:
    """Forward of the scan; projected when it is first asked for."""
    inputs: list[Any] = []

    @torch.no_grad()
    def run() -> None:
        memory: Any = layer.memory
        if not inputs:
            inputs.extend((memory.project(x, None, {}).tokens, memory.start(x)))
        memory.scan(*inputs)

    return run
