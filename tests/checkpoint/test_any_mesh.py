"""What one mesh wrote, any other reads bit by bit."""

from itertools import pairwise
from math import prod

import pytest
import torch
from forked_ranks import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cases import SPLIT, mesh_cut, whole

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.load import load, read_tensors
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.shards import FlatShard

HOME = Mesh(2, 2, 2)
OTHERS = [Mesh(4, 1, 2), Mesh(1, 4, 2), Mesh(2, 1, 4), Mesh(1, 8, 1)]


def _save(root, mesh, rank):
    return save(root, 1, mesh_cut(mesh, rank), state={}, files={}, keep=1)


def _load_and_compare(path, mesh, rank):
    shards = mesh_cut(mesh, rank, blank=True)
    load(path, shards)
    for shard, wanted in zip(shards, mesh_cut(mesh, rank), strict=True):
        bits = shard.tensor.view(torch.int32)
        assert torch.equal(bits, wanted.tensor.view(torch.int32)), (mesh, shard.name)


def test_a_checkpoint_goes_to_every_other_mesh_and_back_bit_by_bit(tmp_path):
    def there_and_back(rank):
        home = _save(tmp_path / "home", HOME, rank)
        for mesh in OTHERS:
            _load_and_compare(home, mesh, rank)
            away = _save(tmp_path / str(mesh), mesh, rank)
            _load_and_compare(away, HOME, rank)
        _load_and_compare(tmp_path / "one" / "step-1", HOME, rank)

    _save(tmp_path / "one", Mesh(), 0)
    assert on_ranks(8, there_and_back) == [None] * 8
    for root in tmp_path.iterdir():
        path = root / "step-1"
        assert layout.verify(path) == []
        _load_and_compare(path, Mesh(), 0)
        stored = sum(file.stat().st_size for file in path.glob("rank-*"))
        headers = sum(
            8 + int.from_bytes(file.read_bytes()[:8], "little") for file in path.glob("rank-*")
        )
        assert stored - headers == 4 * sum(prod(shape) for shape, _ in SPLIT.values()), root
        for name, tensor in read_tensors(path, ""):
            assert torch.equal(tensor, whole(name)), name


@st.composite
def cuts(draw, shape):
    """Shards that tile a tensor: windows along one dimension, each in flat ranges."""
    dimension = draw(st.integers(0, len(shape) - 1))
    edges = sorted({0, shape[dimension], *draw(st.lists(st.integers(0, shape[dimension])))})
    shards = []
    for first, last in pairwise(edges):
        offsets = tuple(first if d == dimension else 0 for d in range(len(shape)))
        sizes = tuple(last - first if d == dimension else e for d, e in enumerate(shape))
        part = _numbers(shape).narrow(dimension, first, last - first).reshape(-1)
        ends = sorted({0, len(part), *draw(st.lists(st.integers(0, len(part)), max_size=4))})
        shards += [
            FlatShard("a", shape, i, j, part[i:j].clone(), offsets, sizes)
            for i, j in pairwise(ends)
        ]
    return shards


def _numbers(shape):
    return torch.arange(prod(shape), dtype=torch.float32).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tiling_in_windows_and_flat_ranges_is_read_by_any_other(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    written, read = data.draw(cuts(shape)), data.draw(cuts(shape))
    path = save(tmp_path_factory.mktemp("any"), 1, written, state={}, files={}, keep=1)
    wanted = [shard.tensor.clone() for shard in read]
    for shard in read:
        shard.tensor.fill_(-1)
    load(path, read)
    for shard, values in zip(read, wanted, strict=True):
        assert torch.equal(shard.tensor, values)


def test_a_window_that_no_rank_holds_is_named(tmp_path):
    def without_the_second_half(rank):
        shards = mesh_cut(Mesh(2, 1, 1), 0)
        save(tmp_path, 1, shards, state={}, files={}, keep=1)

    for error in on_ranks(2, without_the_second_half):
        assert isinstance(error, TitansError)
        assert "embed.weight: the ranks hold 24 of its 48 elements" in error.what
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_cut_the_same_window_differently_are_told_so(tmp_path):
    def crosswise(rank):
        sizes = (2, 4) if rank else (4, 2)
        shard = FlatShard("a", (4, 4), 0, 8, torch.zeros(8), (0, 0), sizes)
        save(tmp_path, 1, [shard], state={}, files={}, keep=1)

    for error in on_ranks(2, crosswise):
        assert "a: rank 1 holds (2, 4) from (0, 0), rank 0 (4, 2)" in error.what


def test_windows_that_overlap_are_refused(tmp_path):
    shards = [FlatShard("a", (4,), 0, 2, torch.zeros(2), (offset,), (2,)) for offset in (0, 1)]
    with pytest.raises(TitansError, match="a has overlapping chunks"):
        save(tmp_path, 1, shards, state={}, files={}, keep=1)


def test_a_tensor_of_another_width_is_refused_by_name_on_every_rank_of_the_mesh(tmp_path):
    path = _save(tmp_path, Mesh(), 0)

    def load_wider(rank):
        shards = mesh_cut(Mesh(2, 1, 1), rank, blank=True)
        shards[1] = FlatShard(shards[1].name, (6, 16), 0, 48, torch.zeros(48), (0, 0), (6, 8))
        load(path, shards)

    for error in on_ranks(2, load_wider):
        assert isinstance(error, UserError)
        assert "parameters/down.weight (6, 8) instead of (6, 16)" in error.what
        assert "embed" not in error.what
        assert str(path / "config.yaml") in error.fix


def test_a_cut_file_is_named_whichever_rank_wanted_it(tmp_path):
    path = on_ranks(2, lambda rank: _save(tmp_path, Mesh(2, 1, 1), rank))[0]
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert layout.verify(path)[0].startswith("rank-00001.safetensors has")

    def load_split(rank):
        load(path, mesh_cut(Mesh(1, 2, 1), rank, blank=True))

    for error in on_ranks(2, load_split):
        assert isinstance(error, TitansError)
        assert str(file) in error.what
        assert "titans checkpoint verify" in error.fix
