"""Training on a mesh of tensor x data x sequence ranks against one plain process.

Every message between sequence ranks carries a label that its receiver compares, without tags and
first in first out, as NCCL would deliver it.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from mesh_training_cases import VARIANTS, assembled, configuration, mesh_runs, meshes, plain_run
from ranks import run_ranks

from titans_pretrain.parallel.sequence_comm import Links

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-6
expected = functools.cache(lambda variant: plain_run(configuration(variant)))


def check(sizes, cases, *, timeout=240, **changes):
    """Train each (variant, accumulation) on the mesh, all in one start of the ranks."""
    configs = [configuration(variant, sizes, steps, **changes) for variant, steps in cases]
    ranks = sizes[0] * sizes[1] * sizes[2]
    found = run_ranks(mesh_runs, ranks, configs, timeout=timeout)
    for index, (variant, _) in enumerate(cases):
        compare(variant, [rank[index] for rank in found])


def compare(variant, ranks):
    losses, norms, first, last = expected(variant)
    for rank_losses, rank_norms, *_ in ranks:
        assert rank_losses == pytest.approx(losses, abs=LOSS_TOLERANCE), variant
        assert rank_norms == pytest.approx(norms, rel=1e-4), variant
        assert rank_losses == ranks[0][0]
        assert rank_norms == ranks[0][1]
    gradients, equal = assembled([part for rank in ranks for part in rank[2]], "gradients")
    assert equal, f"{variant}: gradients differ between replicas"
    worst = max((float((gradients[n] - g).abs().max()), n) for n, g in first.items())
    assert worst[0] <= GRADIENT_TOLERANCE, (variant, worst)
    weights, equal = assembled([part for rank in ranks for part in rank[3]], "parameters")
    assert equal, f"{variant}: weights differ between replicas"
    assert weights.keys() == last.keys()
    for name, weight in last.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-4)
    for moment in ("exp_avg", "exp_avg_sq"):
        _, equal = assembled([part for rank in ranks for part in rank[3]], moment)
        assert equal, f"{variant}: {moment} differs between replicas"


PAIRWISE = [
    ((1, 1, 1), [("mac", 2)]),
    ((2, 1, 1), [("mal", 1), ("lmm", 2)]),
    ((1, 2, 1), [("mag", 2)]),
    ((1, 1, 2), [("lmm", 1), ("mac", 2)]),
    ((4, 1, 1), [("mag", 1)]),
    ((1, 1, 4), [("mac", 1), ("mal", 2)]),
    ((2, 1, 2), [("mac", 2), ("mag", 1)]),
    ((1, 2, 2), [("lmm", 2), ("mal", 1)]),
    ((2, 2, 1), [("mac", 1)]),
]


@pytest.mark.parametrize(("sizes", "cases"), PAIRWISE)
def test_a_mesh_trains_like_one_process(sizes, cases):
    check(sizes, cases)


def test_all_three_axes_at_once_train_like_one_process():
    check((2, 2, 2), [("mac", 2), ("mag", 1)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", meshes(1, 2, 4, 8))
def test_every_mesh_trains_every_variant_like_one_process(sizes):
    cases = [(variant, accumulation) for variant in VARIANTS for accumulation in (1, 2)]
    check(sizes, cases, timeout=1100)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 1, 2), (1, 2, 4)])
def test_the_transformer_exchanges_heads_for_sequence_and_trains_like_one_process(sizes):
    check(sizes, [("transformer", 1), ("transformer", 2)])


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_recomputed_blocks_train_alike(variant):
    check((2, 1, 2), [(variant, 2)], activation_checkpointing=True)


def test_without_interleaving_training_is_alike():
    check((1, 1, 4), [("mac", 2), ("lmm", 2)], interleave=False)


def test_an_optimizer_on_the_host_trains_alike():
    check((2, 1, 2), [("mag", 2)], offload_optimizer=True)


@pytest.mark.parametrize("variant", [*VARIANTS, "transformer"])
def test_bf16_on_a_mesh_follows_the_float32_run(variant):
    sizes = (2, 1, 2)
    config = configuration(variant, sizes, 2, precision="bf16")
    losses, *_ = expected(variant)
    for ((found, *_),) in run_ranks(mesh_runs, 4, [config]):
        assert found == pytest.approx(losses, abs=3e-2)


def without_the_sum_over_sequence_ranks(engine, parallel):
    engine._sum_over_sequence = lambda: None


def with_a_state_gradient_halved(engine, parallel):
    send = Links.send

    def halved(self, side, name, tensors):
        wrong = side == "previous" and name.endswith(".state")
        send(self, side, name, [tensor / 2 for tensor in tensors] if wrong else tensors)

    Links.send = halved


def without_a_reduction_over_tensor_ranks(engine, parallel):
    reduce, group = dist.all_reduce, parallel.groups.tensor

    def skipping(tensor, *arguments, **options):
        if options.get("group") is group and tensor.dim() == 3:
            return None
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = skipping


@pytest.mark.parametrize(
    ("sizes", "sabotage"),
    [
        ((1, 1, 2), without_the_sum_over_sequence_ranks),
        ((1, 1, 2), with_a_state_gradient_halved),
        ((2, 1, 1), without_a_reduction_over_tensor_ranks),
    ],
)
def test_a_broken_reduction_does_not_pass_these_tests(sizes, sabotage):
    config = configuration("lmm", sizes, 1)
    with pytest.raises(AssertionError):
        compare("lmm", [rank[0] for rank in run_ranks(mesh_runs, 2, [config], sabotage)])
