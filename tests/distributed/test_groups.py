"""Which process groups a mesh needs: all ranks take part in making each."""

import pytest
from ranks import run_ranks
from torch.distributed import distributed_c10d

from titans_pretrain.parallel import devices
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel


def made(sizes):
    """Ranks of every group that is made for a mesh, in order."""
    new_group, ranks = distributed_c10d.new_group, []

    def noting(*, ranks, noted=ranks, **options):
        noted.append(ranks)
        return new_group(ranks=ranks, **options)

    distributed_c10d.new_group = noting
    Parallel(Mesh(*sizes), devices.rank())
    return ranks


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 2, 1), [[0, 1]]),
        ((2, 1, 1), [[0, 1], [0], [1]]),
        ((1, 1, 2), [[0], [1], [0, 1], [0, 1], [0, 1]]),
    ],
)
def test_groups_of_one_rank_are_made_only_for_deepspeed(sizes, expected):
    assert run_ranks(made, 2, sizes) == [expected] * 2
