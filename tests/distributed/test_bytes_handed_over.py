"""What `titans plan` says crosses between spans, against the bytes that a step of training sent."""

import pytest
import torch
from mesh_training_cases import configuration
from ranks import run_ranks

from titans_pretrain.data.loader import Batch
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.plan import handover
from titans_pretrain.train import build
from titans_pretrain.train.passes import Passes


def with_length(config, length):
    data = config.data.model_copy(update={"sequence_length": length})
    return config.model_copy(update={"data": data})


def sent_in_a_step(configs):
    """(to the next rank, to the previous one) in bytes, of one step of each run."""
    return [_sent(config) for config in configs]


def _sent(config):
    train, sequence = config.train, config.mesh.sequence
    mesh = Mesh(config.mesh.tensor, 1, sequence)
    parallel = Parallel(mesh, devices.rank())
    engine = build.build_engine(config, parallel, torch.device("cpu"))
    passes = Passes(engine, parallel, config, torch.device("cpu"))
    tokens = torch.zeros(train.global_batch_size, config.data.sequence_length + 1, dtype=torch.long)
    passes.train(Batch(tokens, None), tokens[:, 1:].numel())
    engine.step(1e-3)
    sent = dict.fromkeys(("next", "previous"), 0)
    for (_, side), count in parallel.links.bytes_sent.items():
        sent[side] += count
    engine.destroy()
    return sent["next"], sent["previous"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("tensor", "sequence", "precision"),
    [
        (2, 2, "bf16"),
        (1, 4, "fp32"),
        pytest.param(1, 2, "fp32", marks=SLOW),
        pytest.param(1, 2, "bf16", marks=SLOW),
        pytest.param(2, 2, "fp32", marks=SLOW),
        pytest.param(1, 4, "bf16", marks=SLOW),
    ],
)
def test_a_step_sends_what_the_plan_says_each_way_whatever_the_length(tensor, sequence, precision):
    lengths = (64, 128)
    configs = [
        with_length(configuration(variant, (tensor, 1, sequence), 2, precision=precision), length)
        for variant in ("lmm", "mac", "mag", "mal")
        for length in lengths
    ]
    found = run_ranks(sent_in_a_step, tensor * sequence, configs, timeout=200)
    mesh = Mesh(tensor, 1, sequence)
    for index, config in enumerate(configs):
        for boundary in range(1, sequence):
            layers = config.model["num_hidden_layers"]
            planned = layers * handover.step_bytes(config, mesh, boundary)
            for rank in range(tensor):
                before = found[mesh.rank_of(rank, 0, boundary - 1)][index]
                after = found[mesh.rank_of(rank, 0, boundary)][index]
                assert (2 * before[0], 2 * after[1]) == (planned, planned)
    assert [found[0][i] for i in range(0, len(configs), 2)] == [
        found[0][i] for i in range(1, len(configs), 2)
    ]
