import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.config import MeshSection, TrainSection
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.mesh import Mesh, plan

MESHES = st.builds(Mesh, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def settings(batch, micro=1):
    return TrainSection(steps=1, learning_rate=1, global_batch_size=batch, micro_batch_size=micro)


def test_tensor_is_fastest_and_sequence_outermost():
    mesh = Mesh(tensor=2, data=3, sequence=2)
    assert [mesh.coordinates(rank) for rank in (0, 1, 2, 6, 11)] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 2, 1),
    ]
    with pytest.raises(ValueError, match="not in a grid of 12"):
        mesh.coordinates(12)


@given(MESHES)
def test_a_place_and_its_rank_name_each_other(mesh):
    for rank in range(mesh.ranks):
        assert mesh.rank_of(*mesh.coordinates(rank)) == rank


@pytest.mark.parametrize("place", [(2, 0, 0), (0, 3, 0), (0, 0, 2), (-1, 0, 0)])
def test_a_place_outside_the_grid_is_refused(place):
    with pytest.raises(ValueError, match="not in a grid"):
        Mesh(tensor=2, data=3, sequence=2).rank_of(*place)


def test_groups_go_along_one_axis():
    mesh = Mesh(tensor=2, data=3, sequence=2)
    assert mesh.tensor_group(9) == (8, 9)
    assert mesh.data_group(9) == (7, 9, 11)
    assert mesh.sequence_group(9) == (3, 9)
    assert mesh.tensor_groups()[:2] == [(0, 1), (2, 3)]
    assert mesh.data_groups()[:2] == [(0, 2, 4), (1, 3, 5)]
    assert mesh.sequence_groups()[:2] == [(0, 6), (1, 7)]


@given(MESHES)
def test_every_rank_is_in_exactly_one_group_of_each_kind_its_own(mesh):
    kinds = {
        mesh.tensor_group: mesh.tensor_groups(),
        mesh.data_group: mesh.data_groups(),
        mesh.sequence_group: mesh.sequence_groups(),
    }
    for own, groups in kinds.items():
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.ranks))
        for group in groups:
            assert all(own(rank) == group for rank in group)


@given(MESHES)
def test_states_go_along_the_sequence_group(mesh):
    for group in mesh.sequence_groups():
        assert mesh.previous(group[0]) is None
        assert mesh.next(group[-1]) is None
        for before, after in itertools.pairwise(group):
            assert mesh.next(before) == after
            assert mesh.previous(after) == before


def test_it_describes_itself_in_a_line():
    assert str(Mesh(data=4)) == "4 ranks = tensor 1 x data 4 x sequence 1"
    assert str(Mesh()).startswith("1 rank =")


def test_its_table_names_every_rank_and_whom_it_works_with():
    assert Mesh(tensor=2, data=2, sequence=2).table().splitlines()[:5] == [
        "8 ranks = tensor 2 x data 2 x sequence 2",
        "rank  tensor data sequence  shares layers with  shards parameters with"
        "  state from  state to",
        "   0       0    0        0  1                   2                       -           4",
        "   1       1    0        0  0                   3                       -           5",
        "   2       0    1        0  3                   0                       -           6",
    ]
    assert len(Mesh(data=16).table().splitlines()) == 18


def test_a_large_grid_shows_both_ends_and_a_summary():
    lines = Mesh(tensor=8, data=4, sequence=4).table().splitlines()
    shown = " ".join(line.split()[0] for line in lines[2:11])
    assert shown == "0 1 2 3 … 124 125 126 127"
    assert lines[11:] == [
        "tensor groups: 16 of 8 ranks each; the first is 0 1 … 7",
        "data groups: 32 of 4 ranks each; the first is 0 8 16 24",
        "states go from rank n to n + 32, over 4 sequence ranks",
    ]
    assert "tensor groups: 32, each rank alone" in Mesh(data=32).table()
    assert max(map(len, Mesh(64, 64, 64).table().splitlines())) < 120


def test_accumulation_fills_the_global_batch():
    mesh = plan(4, MeshSection(), settings(48, micro=3))
    assert mesh == Mesh(data=4)
    assert mesh.accumulation(settings(48, micro=3)) == 4


def test_data_ranks_are_what_tensor_and_sequence_leave():
    assert plan(24, MeshSection(tensor=2, sequence=4), settings(48)) == Mesh(2, 3, 4)


def test_ranks_that_cannot_form_the_grid_name_the_nearest_counts_and_grids():
    with pytest.raises(UserError, match=r"6 ranks .* = 2 \* 2 = 4") as caught:
        plan(6, MeshSection(tensor=2, sequence=2), settings(48))
    assert caught.value.fix == "start 4 or 8 ranks, or keep 6 with mesh.tensor=1 mesh.sequence=2"
    with pytest.raises(UserError) as caught:
        plan(2, MeshSection(tensor=8), settings(48))
    assert caught.value.fix == "start 8 ranks, or keep 2 with mesh.tensor=2 mesh.sequence=1"
    with pytest.raises(UserError) as caught:
        plan(5, MeshSection(tensor=2), settings(1, micro=2))
    assert caught.value.fix == "start 4 or 6 ranks"
    with pytest.raises(UserError) as caught:
        plan(12, MeshSection(tensor=2, sequence=4), settings(12))
    assert caught.value.fix == "start 8 or 16 ranks, or keep 12 with mesh.tensor=1 mesh.sequence=4"
    with pytest.raises(UserError) as caught:
        plan(12, MeshSection(tensor=2, sequence=4), settings(1))
    assert caught.value.fix == "start 8 ranks"
    with pytest.raises(UserError) as caught:
        plan(9, MeshSection(sequence=2), settings(128))
    assert caught.value.fix == "start 8 or 16 ranks"


def test_a_global_batch_that_does_not_fit_names_the_nearest_sizes():
    with pytest.raises(UserError, match=r"20 is no multiple of .* = 3 \* 2 = 6") as caught:
        plan(3, MeshSection(), settings(20, micro=2))
    assert caught.value.fix == "use 18 or 24, or start 2 ranks"
    with pytest.raises(UserError) as caught:
        plan(8, MeshSection(), settings(4))
    assert caught.value.fix == "use 8, or start 4 ranks"
    with pytest.raises(UserError) as caught:
        plan(12, MeshSection(tensor=2, sequence=2), settings(4))
    assert caught.value.fix == "use 3 or 6, or start 8 ranks"


def test_no_rank_is_refused():
    with pytest.raises(UserError, match="0 ranks"):
        plan(0, MeshSection(), settings(4))
