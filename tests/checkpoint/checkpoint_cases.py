"""Tensors to save, and how ranks cut them."""

from collections.abc import Mapping
from math import prod

import torch

from titans_pretrain.parallel.shards import FlatShard

SHAPES = {
    "parameters/model.embed.weight": (7, 5),
    "parameters/model.memory": (2, 3, 4),
    "parameters/model.scale": (),
    "parameters/model.norm.weight": (3,),
    "momentum/model.memory": (2, 3, 4),
}


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def cut(
    tensors: Mapping[str, torch.Tensor], rank: int, world: int, *, blank: bool = False
) -> list[FlatShard]:
    """The rank's equal flat range of every tensor, as ZeRO-3 cuts them."""
    shards = []
    for name, tensor in tensors.items():
        size = prod(tensor.shape)
        length = -(-size // world)
        start, stop = min(size, rank * length), min(size, (rank + 1) * length)
        part = tensor.reshape(-1)[start:stop].clone()
        if blank:
            part.fill_(-777.0)
        shards.append(FlatShard(name, tuple(tensor.shape), start, stop, part))
    return shards
