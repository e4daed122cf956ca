"""titans-pytorch's memory as a contender; runs in any interpreter that has that package."""

from collections.abc import Callable
from typing import Any


def titans_pytorch(
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """Its memory at the paper's anchors: surprises are taken at the chunk's first weights.

    Args:
        options: see ``layers.memory``.
    """
    from importlib.metadata import version

    import torch
    from titans_pytorch import MemoryMLP, NeuralMemory  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = options["model"]
    width, heads, chunk = (model[key] for key in ("hidden_size", "memory_heads", "chunk_size"))
    head = width // heads
    depth, expansion = model["memory_depth"], model["memory_expansion"]
    layer = NeuralMemory(
        dim=width,
        heads=heads,
        dim_head=head,
        chunk_size=chunk,
        batch_size=chunk,
        model=MemoryMLP(head, depth=depth, expansion_factor=expansion),
    )
    device = torch.device(options["device"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["dtype"]]
    layer.to(device=device, dtype=dtype)
    shape = options["batch"], options["length"], width
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def forget() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    def training() -> None:
        forget()
        output, _ = layer(x)
        output.backward(gradient)

    facts = {
        "parameters": sum(p.numel() for p in layer.parameters()),
        "version": version("titans-pytorch"),
        "torch": torch.__version__,
    }
    return facts, {"training": training, "forget": forget}
