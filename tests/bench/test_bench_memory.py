"""``titans bench memory``: contenders, table, JSON, targets, and what is refused."""

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stub_contenders import FILE, ONE, named

from titans_pretrain import cli
from titans_pretrain.bench import ceilings, layers, machine, memory, peer_layers
from titans_pretrain.bench.contenders import Contender, Field
from titans_pretrain.bench.memory_targets import ATTENTION, OURS, THEIRS
from titans_pretrain.errors import UserError

TINY = ["--lengths", "8", "16", "--dim", "8", "--heads", "2", "--chunk", "4", "--rounds", "2"]
OPTIONS = memory.Options([12], dim=8, heads=2, depth=2, expansion=2, chunk=4)
MODEL = {
    "model": memory._model(OPTIONS),
    "length": 12,
    "batch": 2,
    "device": "cpu",
    "dtype": "fp32",
    "memory_kernels": "torch",
}


def bench(*arguments):
    return cli.main(["bench", "memory", *TINY, "--device", "cpu", "--threads", "1", *arguments])


@pytest.fixture
def stubs(monkeypatch):
    """Everyone does next to nothing; returns how titans-pytorch is replaced."""

    def replace(function="quick"):
        def contenders(options, place, dtype):
            own = options.peer_python or Path(sys.executable)
            return [
                named(machine.NAME),
                named(OURS),
                named(ATTENTION, required=False),
                Contender(THEIRS, FILE, function, python=own, required=False),
            ]

        monkeypatch.setattr(memory, "_contenders", contenders)

    replace()
    return replace


def test_a_table_a_verdict_a_target_and_all_figures_as_json(stubs, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert bench("--json", str(file), "--check", "speed=1e-9", "growth@16=1e9") == 0
    told = capsys.readouterr().out
    assert told.count("PASS") == 3
    assert "chunk 4, scanned by torch, batch 2" in told
    assert told.count("| titans-pytorch |") == 2
    found = json.loads(file.read_text())
    assert set(found) == {"benchmark", "environment", "options", "ceilings", "rows", "checks"}
    environment = found["environment"]
    assert environment["threads"] == 1
    assert environment["dtype"] == "fp32"
    assert environment["titans_pytorch"] == "0.5.5"
    assert len(environment["load"]) == 3
    assert found["options"]["chunk"] == 4
    assert found["options"]["memory_kernels"] == "torch"
    assert set(found["ceilings"]) == {"product_flops_per_second", "copy_bytes_per_second"}
    rows = {(row["tokens"], row["layer"]): row for row in found["rows"]}
    assert set(rows) == {(length, name) for length in (8, 16) for name in (OURS, ATTENTION, THEIRS)}
    ours = rows[16, OURS]
    assert set(ours["ratios"]) == {THEIRS, ATTENTION}
    assert set(ours["ratios"][THEIRS]) == {"median", "least", "most"}
    assert {"seconds", "tokens_per_second", "peak_bytes", "products", "growth"} <= set(ours)
    assert len(found["checks"]) == 3


def test_a_missed_target_exits_with_1(stubs, capsys):
    assert bench("--lengths", "8", "--check", "speed=1e9") == 1
    assert "FAIL" in capsys.readouterr().out


def test_peers_are_left_out_beyond_their_limit(stubs, tmp_path):
    file = tmp_path / "result.json"
    assert bench("--peer-limit", "8", "--rounds", "1", "--json", str(file)) == 0
    rows = [(row["tokens"], row["layer"]) for row in json.loads(file.read_text())["rows"]]
    assert rows == [(8, OURS), (8, ATTENTION), (8, THEIRS), (16, OURS)]


def test_peers_that_are_not_wanted_are_left_out(stubs, capsys):
    assert bench("--lengths", "8", "--rounds", "1", "--peers") == 0
    told = capsys.readouterr()
    assert "| titans |" in told.out
    assert "| attention |" not in told.out
    assert "titans-pytorch" not in told.err


def test_a_peer_that_is_not_installed_is_left_out_with_the_command_that_installs_it(stubs, capsys):
    stubs("missing")
    assert bench("--lengths", "8", "--rounds", "1") == 0
    told = capsys.readouterr()
    assert "pip install titans-pytorch==0.5.5" in told.err
    assert "| titans-pytorch |" not in told.out


@pytest.mark.parametrize(
    "wanted", [["--check", "memory=0.2"], ["--peer-python", sys.executable]], ids=["check", "named"]
)
def test_a_peer_that_is_asked_for_must_be_there(stubs, wanted, capsys):
    stubs("missing")
    assert bench(*wanted) == 2
    told = capsys.readouterr().err
    assert "titans-pytorch cannot be measured" in told
    assert "pip install titans-pytorch==0.5.5" in told
    assert "--peer-python" in told


def test_an_interpreter_that_is_none_is_refused(stubs, capsys):
    assert bench("--peer-python", "/no/such/python") == 2
    assert "cannot be started" in capsys.readouterr().err


def test_a_peer_that_cannot_be_built_is_left_out_with_the_reason(stubs, capsys):
    stubs("broken")
    assert bench("--lengths", "8", "--rounds", "1") == 0
    assert "titans-pytorch is left out: ValueError: heads do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (["--heads", "3"], "--heads"),
        (["--depth", "5"], "--depth"),
        (["--lengths", "8", "8"], "--lengths"),
        (["--check", "speed"], "--check"),
        (["--json", "/no/such/directory/file.json"], "--json"),
        (["--threads", "100000"], "--threads"),
        (["--memory-kernels", "triton"], "--memory-kernels"),
    ],
)
def test_sizes_and_targets_that_cannot_be_are_refused(stubs, wrong, where, capsys):
    assert bench(*wrong) == 2
    assert f"where: {where}" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--dtype", "fp8"], ["--lengths", "0"], ["--rounds", "0"]])
def test_values_that_are_none_of_an_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench(*wrong)
    assert stopped.value.code == 2


def test_growth_is_over_the_first_length_in_the_same_rounds(stubs, monkeypatch, tmp_path):
    """A machine that is slower, the longer a benchmark takes, and a layer that is linear."""
    slowness, measured = itertools.count(1), iter([8, 16, 32])

    def times(self, jobs, rounds, what=""):
        slow, length = next(slowness), next(measured)
        taken = {name: 8 if name == f"{OURS} at 8" else length for name, _ in jobs}
        return {job: [{"seconds": slow * taken[job[0]]}] * rounds for job in jobs}

    monkeypatch.setattr(Field, "times", times)
    file = tmp_path / "result.json"
    assert bench("--lengths", "8", "16", "32", "--json", str(file), "--peers") == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["layer"] for row in rows] == [OURS] * 3
    assert [row["growth"]["median"] for row in rows] == [1, 1, 1]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_our_layer_is_scanned_by_the_kernels_asked_for(monkeypatch, kernels):
    chosen = []
    monkeypatch.setattr(layers.kernels, "choose", lambda layer, *rest: chosen.append(rest))
    options = replace(OPTIONS, memory_kernels=kernels)
    ours = next(one for one in memory._contenders(options, ONE, "fp32") if one.name == OURS)
    layers.memory(MODEL | ours.options)
    assert chosen == [(kernels, "fp32", torch.device("cpu"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no GPU"):
        machine.choose("cuda", None, None)
    place, dtype = machine.choose(None, None, 1)
    assert (place.device, dtype) == ("cpu", "fp32")


def test_our_layer_is_the_memory_with_a_projection_and_its_passes_run():
    facts, passes = layers.memory(MODEL)
    passes["training"]()
    passes["scan"]()
    width, heads = 8, 2
    gates = 3 * (width + 1) * heads
    memories = heads * 2 * (4 * 8)
    convolutions = 3 * 4 * width
    assert facts["parameters"] == 4 * width**2 + convolutions + gates + memories + width // heads
    assert facts["scan_flops"] > 0


def test_a_training_pass_reaches_the_input_and_every_parameter():
    layer = layers.AttentionLayer(8, 2)
    x = layers.prepared(layer, MODEL)
    passes = layers.training(layer, x)
    passes["training"]()
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    once = x.grad.clone()
    passes["training"]()
    assert torch.equal(x.grad, once)  # made anew, not added to
    passes["forget"]()
    assert x.grad is None
    assert all(p.grad is None for p in layer.parameters())


def test_the_attention_layer_is_causal():
    layer = layers.AttentionLayer(8, 2)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(layer(x)[:, :4], layer(changed)[:, :4])


def test_the_ceilings_passes_do_what_their_figures_say():
    facts, passes = ceilings.build({"device": "cpu", "dtype": "fp32", "size": 8, "bytes": 64})
    assert passes["product"]().shape == (8, 8)
    assert passes["copy"]().numel() == 64
    assert facts == {"flops": 1024, "bytes": 128}


@pytest.mark.skipif(
    importlib.util.find_spec("titans_pytorch") is None, reason="titans-pytorch is not installed"
)
def test_titans_pytorchs_layer_runs():
    facts, passes = peer_layers.titans_pytorch(MODEL)
    passes["training"]()
    assert facts["parameters"] > 0
