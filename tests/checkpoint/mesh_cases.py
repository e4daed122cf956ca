"""Tensors as a mesh of ranks cuts them: split over tensor ranks, flat over data ranks."""

from math import prod

import torch

from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.shards import FlatShard

SPLIT = {
    "parameters/embed.weight": ((8, 6), 0),
    "parameters/down.weight": ((6, 8), 1),
    "parameters/memory": ((4, 3, 5), 0),
    "parameters/middle": ((3, 8, 5), 1),
    "parameters/gate.bias": ((12,), 0),
    "parameters/norm.weight": ((5,), None),
    "parameters/scale": ((), None),
    "exp_avg/down.weight": ((6, 8), 1),
}


def whole(name: str) -> torch.Tensor:
    """A tensor's values before any cut."""
    shape = SPLIT[name][0]
    generator = torch.Generator().manual_seed(sorted(SPLIT).index(name))
    return torch.randn(shape, generator=generator)


def mesh_cut(mesh: Mesh, rank: int, *, blank: bool = False) -> list[FlatShard]:
    """The shards of a rank; sequence ranks hold the same."""
    tensor_rank, data_rank, _ = mesh.coordinates(rank)
    shards = []
    for name, (shape, dimension) in SPLIT.items():
        offsets, sizes = [0] * len(shape), list(shape)
        if dimension is not None:
            sizes[dimension] = shape[dimension] // mesh.tensor
            offsets[dimension] = tensor_rank * sizes[dimension]
        window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        size = prod(sizes)
        length = -(-size // mesh.data)
        start, stop = min(size, data_rank * length), min(size, (data_rank + 1) * length)
        part = whole(name)[window].reshape(-1)[start:stop].clone()
        if blank:
            part.fill_(-777.0)
        shards.append(FlatShard(name, shape, start, stop, part, tuple(offsets), tuple(sizes)))
    return shards
