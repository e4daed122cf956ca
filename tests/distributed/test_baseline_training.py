"""Models of other libraries in the project's trainer: on several ranks, checkpointed, resumed."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny import prepare

from titans_pretrain import config
from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint.format import newest_good
from titans_pretrain.checkpoint.load import read_tensors
from titans_pretrain.errors import UserError
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train import self_check
from titans_pretrain.train.build import build_engine, open_data
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.trainer import Trainer

SIZE = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
MODELS = {
    "llama": {
        **SIZE,
        "hf": "llama",
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        **SIZE,
        "hf": "mamba2",
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "mixed": {
        **SIZE,
        "hf": "titans_baseline",
        "num_hidden_layers": 3,
        "num_heads": 2,
        "intermediate_size": 16,
        "mixers": ["ttt_mlp", "gated_deltanet", "mamba"],
        "chunk_size": 8,
        "state_size": 4,
    },
    "rmt": {
        **SIZE,
        "hf": "titans_baseline",
        "num_heads": 2,
        "intermediate_size": 16,
        "mixers": ["window"],
        "memory_embeddings": 2,
        "segment_length": 8,
    },
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return str(prepare(tmp_path_factory.mktemp("corpus")))


def configuration(manifest, directory, name, **train):
    sections = {
        "model": MODELS[name],
        "data": {"manifest": manifest, "sequence_length": 16, "validation_fraction": 0.05},
        "train": {
            "steps": 4,
            "global_batch_size": 4,
            "learning_rate": 0.01,
            "epsilon": 1e-3,  # a small one turns the rounding of tiny gradients into whole steps
            "precision": "fp32",
            "validation_every": 2,
            "validation_sequences": 3,
            **train,
        },
        "checkpoint": {"every": 2, "asynchronous": False},
        "run": {"directory": str(directory)},
    }
    return config.resolve(sections, source="test")


def train(settings, resume=False):
    """Every parameter and moment in the last checkpoint of a run."""
    directory = RunDirectory(Path(settings.run.directory))
    devices.from_first(directory.create)
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    parallel = Parallel(
        grid, devices.rank(), activation_checkpointing=settings.train.activation_checkpointing
    )
    device, stop = torch.device("cpu"), StopRequest()
    data = open_data(settings)
    trainer = Trainer(settings, parallel, device, data, directory, stop, lambda sentence: None)
    root = directory.path / "checkpoints"
    if resume:
        trainer.restore(devices.from_first(lambda: newest_good(root)[0]))
    trainer.run()
    devices.gather_objects(None)
    newest = newest_good(root)[0]
    return {name: tensor.clone() for name, tensor in read_tensors(newest, "")}


@pytest.mark.parametrize(
    "name",
    ["llama", "rmt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mamba2", "mixed"))],
)
def test_two_ranks_that_recompute_train_like_one(manifest, tmp_path, name):
    one = configuration(manifest, tmp_path / "one", name, micro_batch_size=4)
    two = configuration(manifest, tmp_path / "two", name, activation_checkpointing=True)
    (expected,) = run_ranks(train, 1, one)
    found = run_ranks(train, 2, two)[0]
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


def forget_the_end(settings):
    """Take away what a run saved after its second step."""
    root = Path(settings.run.directory) / "checkpoints"
    shutil.rmtree(root / "step-4")


def train_twice(settings):
    """The state after a run, and after it went on from its middle in an engine of its own."""
    whole = train(settings)
    forget_the_end(settings)
    return whole, train(settings, resume=True)


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "mamba2", "rmt"))],
)
def test_a_resumed_run_ends_with_the_same_bits(manifest, tmp_path, name):
    ((whole, resumed),) = run_ranks(train_twice, 1, configuration(manifest, tmp_path, name))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def bfloat16_buffers(settings):
    """Whether an engine's buffers are those of float32, and its other types in bfloat16."""
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    parallel = Parallel(grid, devices.rank())
    whole = foreign.build(settings.model, 0)
    engine = build_engine(settings, parallel, torch.device("cpu"))
    trained = engine._engine.module
    same = [
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(trained.buffers(), whole.buffers(), strict=True)
    ]
    logits = engine.forward(torch.arange(8)[None])
    return same, {p.dtype for p in trained.parameters()}, logits.dtype


def test_in_bfloat16_rotary_frequencies_keep_their_precision(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "llama", precision="bf16")
    ((same, kinds, logits),) = run_ranks(bfloat16_buffers, 1, settings)
    assert same
    assert all(same)
    assert kinds == {torch.bfloat16}
    assert logits == torch.bfloat16


def losses_and_logits(settings):
    """Of one sequence by an engine, its gradient's norm, and whether the head gave the losses."""
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    engine = build_engine(settings, Parallel(grid, devices.rank()), torch.device("cpu"))
    ids = torch.arange(17)[None]
    losses = engine.losses(ids[:, :-1], ids[:, 1:])
    engine.backward(losses.sum())
    norm = engine.gradient_norm()
    with torch.no_grad():
        logits = engine.forward(ids[:, :-1])
    return losses.detach(), norm, logits, engine._loss_head() is not None


BOUNDED = {
    **SIZE,
    "hf": "gemma2",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "final_logit_softcapping": 0.05,
}


def of_each(runs):
    return [losses_and_logits(settings) for settings in runs]


def test_losses_are_those_of_the_logits_that_come_out(manifest, tmp_path):
    llama = configuration(manifest, tmp_path, "llama", global_batch_size=1)
    bounded = llama.model_copy(update={"model": foreign.resolve(BOUNDED)})
    (results,) = run_ranks(of_each, 1, [llama, bounded])
    assert [by_the_head for *_, by_the_head in results] == [True, False]
    targets = torch.arange(1, 17)
    for settings, (losses, norm, logits, _) in zip([llama, bounded], results, strict=True):
        expected = torch.nn.functional.cross_entropy(logits[0], targets, reduction="none")
        torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-6)
        alone = construct(settings.model, settings.train.seed)
        own = alone(input_ids=torch.arange(16)[None]).logits[0]
        torch.nn.functional.cross_entropy(own, targets, reduction="sum").backward()
        whole = torch.stack([parameter.grad.norm() for parameter in alone.parameters()]).norm()
        assert norm == pytest.approx(float(whole), rel=1e-5)


def test_initial_weights_are_those_of_the_class_for_the_seed(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "mamba2")
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = (construct(settings.model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(2), expected)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    scales = first.backbone.layers[0].mixer.A_log.exp()
    assert ((scales >= 1) & (scales <= 16)).all()
    assert scales.frac().any()  # drawn, not counted


def test_the_check_of_the_mesh_takes_a_transformer_in_their_place():
    values = self_check.tiny_fields(MODELS["llama"], mesh.Mesh(1, 2, 1))
    assert type(construct(values, 0).model.layers[0].mixer).__name__ == "AttentionMixer"


def test_layers_that_are_gpu_kernels_are_refused_on_a_cpu_before_anything_is_built():
    settings = SimpleNamespace(model={"hf": "fla.models:GLAForCausalLM"})
    with pytest.raises(UserError, match="are GPU kernels, and there is no GPU here"):
        build_engine(settings, None, torch.device("cpu"))
    foreign.check_device({"hf": "fla.models:GLAForCausalLM"}, "cuda")
    foreign.check_device({"hf": "llama"}, "cpu")
