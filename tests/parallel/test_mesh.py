import pytest

from titans_pretrain.config import MeshSection, TrainSection
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.mesh import Mesh, plan


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


def test_data_groups_share_tensor_and_sequence_place_and_cover_every_rank_once():
    mesh = Mesh(tensor=2, data=3, sequence=2)
    assert mesh.data_group(9) == (7, 9, 11)
    assert mesh.data_groups()[0] == (0, 2, 4)
    assert sorted(rank for group in mesh.data_groups() for rank in group) == list(range(12))


def test_it_describes_itself_in_a_line():
    assert str(Mesh(data=4)) == "4 ranks = tensor 1 x data 4 x sequence 1"
    assert str(Mesh()).startswith("1 rank =")


def test_accumulation_fills_the_global_batch():
    mesh = plan(4, MeshSection(), settings(48, micro=3))
    assert mesh == Mesh(data=4)
    assert mesh.accumulation(settings(48, micro=3)) == 4


def test_a_global_batch_that_does_not_fit_names_the_nearest_sizes():
    with pytest.raises(UserError, match=r"20 is no multiple of .* = 3 \* 2 = 6") as caught:
        plan(3, MeshSection(), settings(20, micro=2))
    assert caught.value.fix == "use 18 or 24, or start 2 ranks"
    with pytest.raises(UserError) as caught:
        plan(8, MeshSection(), settings(4))
    assert caught.value.fix == "use 8, or start 4 ranks"


def test_no_rank_is_refused():
    with pytest.raises(UserError, match="0 ranks"):
        plan(0, MeshSection(), settings(4))
