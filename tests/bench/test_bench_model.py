"""``titans bench model``: its models, their Transformer++, table, JSON, and what is refused."""

import json

import pytest
import torch
from stub_contenders import FILE
from tiny import MODEL

from titans_pretrain import cli, config
from titans_pretrain.bench import contenders, machine, model, steps
from titans_pretrain.errors import UserError
from titans_pretrain.model import fields
from titans_pretrain.plan import parameters

TITANS = sorted(path.stem for path in config.PRESETS.glob("titans-*.yaml"))
SIZES = ["--length", "8", "--micro-batch", "2", "--rounds", "1"]
RUN = """
model: {variant: lmm, vocab_size: 300, hidden_size: 64, num_hidden_layers: 1,
  num_attention_heads: 1, intermediate_size: 64, memory_depth: 1, chunk_size: 16,
  num_persistent_tokens: 2}
data: {manifest: nowhere/manifest.json, sequence_length: 64}
train: {steps: 1, global_batch_size: 1, learning_rate: 1.0e-3}
run: {directory: nowhere}
"""


@pytest.fixture
def run_file(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(RUN)
    return str(file)


@pytest.fixture
def stubs(monkeypatch):
    """Everyone does next to nothing."""

    def start(contender, place):
        return Worker(contenders.Contender(contender.name, FILE, "quick"), place)

    Worker = contenders.Worker
    monkeypatch.setattr(contenders, "Worker", start)


def bench(*arguments):
    return cli.main(["bench", "model", *SIZES, "--device", "cpu", "--threads", "1", *arguments])


@pytest.mark.parametrize("preset", TITANS)
def test_a_transformer_of_equal_parameters_stands_beside_each_preset(preset):
    titans = config.resolve_model({"preset": preset})
    peer = model.equal_transformer(titans)
    assert abs(parameters.count(peer) / parameters.count(titans) - 1) < 2e-3
    assert not fields.problems(peer)
    same = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    assert [peer[name] for name in same] == [titans[name] for name in same]
    assert peer["variant"] == "transformer"
    assert peer["partial_rotary_factor"] == 1


def test_models_are_presets_and_files_of_runs_with_fields_of_ones_own(run_file):
    found = model.named(["titans-mag-170m", run_file], ["chunk_size=32"])
    assert list(found) == ["titans-mag-170m", "small"]
    assert [one["chunk_size"] for one in found.values()] == [32, 32]
    assert found["titans-mag-170m"]["variant"] == "mag"


@pytest.mark.parametrize(
    ("models", "override", "told"),
    [
        (["titans-mag-17m"], [], "no preset 'titans-mag-17m'"),
        (["no/such.yaml"], [], "cannot read the configuration"),
        (["titans-mag-170m"] * 2, [], "given twice"),
        (["titans-mag-170m"], ["chunk_size"], "sets nothing"),
        (["titans-mag-170m"], ["chunksize=2"], "chunk_size"),
        (["titans-mag-170m"], ["chunk_size={"], "no YAML value"),
        (["titans-mag-170m"], ["chunk_size=-1"], "too small"),
    ],
)
def test_models_that_are_none_are_refused(models, override, told):
    with pytest.raises(UserError, match=told):
        model.named(models, override)


def test_a_table_a_target_and_all_figures_as_json(stubs, run_file, tmp_path, capsys):
    file = tmp_path / "result.json"
    preset = "transformer-170m"
    targets = ["speed=1e-9", "mfu@small=1e-9"]
    assert bench(run_file, preset, "--json", str(file), "--check", *targets) == 0
    assert capsys.readouterr().out.count("PASS  small") == 2
    found = json.loads(file.read_text())
    assert set(found) == {"benchmark", "environment", "options", "ceilings", "rows", "checks"}
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows) == ["small", preset, "Transformer++ for small"]
    wanted = {"parameters", "seconds", "tokens_per_second", "of_peer", "flops", "products", "mfu"}
    wanted |= {"of_against", "memory_kernels"}
    assert set(rows["small"]) == wanted | {"model", "peak_bytes"}
    assert rows["small"]["of_peer"]["median"] > 0
    assert rows[preset]["of_peer"] is None
    kernels = {name: row["memory_kernels"] for name, row in rows.items()}
    assert kernels == {"small": "torch", preset: None, "Transformer++ for small": None}
    assert rows["small"]["mfu"] is None  # of a CPU no peak is known
    assert rows["small"]["products"]["median"] > 0
    assert found["options"]["length"] == 8


def test_a_missed_target_exits_with_1(stubs, run_file, capsys):
    assert bench(run_file, "--check", "mfu=1e9") == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["speed=1", "mfu@other=1", "mfu", "mfu=0", "pace=1"])
def test_a_target_that_cannot_be_judged_is_refused(run_file, target, capsys):
    assert bench(run_file, "--no-peer", "--check", target) == 2
    assert "where: --check" in capsys.readouterr().err


def test_a_models_step_reaches_every_parameter(monkeypatch):
    built = []
    construct = steps.construct
    monkeypatch.setattr(steps, "construct", lambda *a: built.append(construct(*a)) or built[-1])
    options = {
        "model": fields.defaults() | MODEL | {"memory_heads": 1, "partial_rotary_factor": 1.0},
        "length": 20,
        "rows": 2,
        "memory_kernels": "torch",
        "device": "cpu",
        "dtype": "fp32",
    }
    gradients = []
    for checkpointing in (False, True):
        facts, passes = steps.build(options | {"checkpointing": checkpointing})
        passes["training"]()
        (network,) = built
        assert network.is_gradient_checkpointing == checkpointing
        assert facts["parameters"] == parameters.count(options["model"])
        gradients.append([p.grad.clone() for p in network.parameters()])
        built.clear()
    assert all(one.abs().sum() > 0 for one in gradients[0])
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("gpu", "dtype", "products", "peak"),
    [
        ("NVIDIA H200", "bf16", "highest", 989.5e12),
        ("NVIDIA H200", "fp32", "highest", 67e12),
        ("NVIDIA H200", "fp32", "high", 494.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", "highest", None),
        ("NVIDIA A100X", "bf16", "highest", None),
    ],
)
def test_the_peak_is_that_of_the_trainers_mfu(gpu, dtype, products, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products)
    assert machine.known_peak(contenders.Machine("cuda", 1), dtype) == peak
    assert machine.known_peak(contenders.Machine("cpu", 1), dtype) is None


def test_memories_are_scanned_as_a_run_says_or_as_is_asked(tmp_path):
    file = tmp_path / "kernels.yaml"
    file.write_text(RUN.replace("train: {", "train: {memory_kernels: triton, "))
    names = [str(file), "titans-mag-170m", "transformer-170m", "gla-170m"]

    def chosen(**given):
        options = model.Options(names, **given)
        return model._kernels(options, model._models(options))

    assert chosen() == {"kernels": "triton", "titans-mag-170m": "torch"}
    for asked in ("torch", "triton"):
        assert set(chosen(memory_kernels=asked).values()) == {asked}
    entrant = model._contender("kernels", {}, "triton")
    assert entrant.options["memory_kernels"] == "triton"
    with pytest.raises(UserError, match="no model has a memory"):
        names = ["transformer-170m"]
        chosen(memory_kernels="triton")


def test_a_step_scans_by_the_kernels_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(steps.kernels, "choose", lambda model, *rest: asked.append(rest))
    options = {"model": fields.defaults() | MODEL | {"memory_heads": 1}, "length": 4, "rows": 1}
    options |= {"checkpointing": False, "device": "cpu", "dtype": "fp32"}
    steps.build(options | {"memory_kernels": "triton"})
    assert asked == [("triton", "fp32", torch.device("cpu"))]


def test_kernels_that_a_run_asks_for_are_refused_on_a_cpu_and_may_be_refused_by_hand(
    stubs, run_file, tmp_path, capsys
):
    file = tmp_path / "kernels.yaml"
    file.write_text(RUN.replace("train: {", "train: {memory_kernels: triton, "))
    assert bench(str(file)) == 2
    assert "where: --memory-kernels" in capsys.readouterr().err
    assert bench(str(file), "--memory-kernels", "torch") == 0
    assert "| kernels | torch |" in capsys.readouterr().out


def test_all_are_compared_with_one_more_that_set_does_not_change(stubs, run_file, tmp_path, capsys):
    file, other = tmp_path / "result.json", "gated-deltanet-170m"
    options = ["--set", "chunk_size=8", "--against", other, "--json", str(file)]
    assert bench(run_file, *options) == 0
    assert f"| of {other}'s |" in capsys.readouterr().out
    rows = {row["model"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["small", other, "Transformer++ for small"]
    assert rows[other]["of_against"] is None
    assert rows["small"]["of_against"]["median"] > 0
    names = tmp_path / "elsewhere"
    names.mkdir()
    (names / "small.yaml").write_text(RUN)
    assert bench(run_file, "--against", str(names / "small.yaml")) == 2
    assert "where: --against" in capsys.readouterr().err


def test_a_loss_is_that_of_the_logits_by_the_head_and_without_it(monkeypatch):
    network = steps.construct(fields.defaults() | MODEL | {"memory_heads": 1}, 0)
    ids, targets = torch.randint(300, (2, 2, 9)).unbind()
    by_head = steps._losses(network)(ids, targets).flatten()
    monkeypatch.setattr(steps.loss_head, "find", lambda model: None)
    by_logits = steps._losses(network)(ids, targets)
    assert by_head.shape == (18,)
    assert torch.allclose(by_head, by_logits, atol=1e-5)
