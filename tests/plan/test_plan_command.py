"""``titans plan`` tells a run's size, grid, steps and volumes, and refuses what cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from titans_pretrain import cli, config
from titans_pretrain.plan import flops, parameters

MODEL = {
    "variant": "mag",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "chunk_size": 8,
    "window_size": 7,
}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    content = {
        "model": MODEL,
        "data": {
            "manifest": "data/manifest.json",
            "sequence_length": 64,
            "length_schedule": [{"from_step": 0, "length": 32}, {"from_step": 5, "length": 64}],
        },
        "mesh": {"tensor": 2, "sequence": 2},
        "train": {"steps": 9, "global_batch_size": 12, "learning_rate": 1},
        "run": {"directory": "runs/x"},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def told(capsys, *arguments):
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_it_prints_size_grid_steps_and_volumes(run_file, capsys):
    lines = told(capsys, run_file, "train.precision=fp32", "--ranks", "8").splitlines()
    size = parameters.count(config.load(run_file).model)
    assert lines[0] == f"runs/x: mag, {size:,} parameters"
    assert "8 ranks = tensor 2 x data 2 x sequence 2" in lines
    start = lines.index("from step 5: sequences of 64 tokens, spans of 32; 768 tokens a step")
    assert lines[start + 1 :] == [
        "  6 micro-batches a rank, each of 1 sequence, interleaved: the first sequence rank keeps "
        "2 at a time, the last 1",
        "  a step takes 19 layer times; ranks that waited for each other layer by layer would "
        "take 36",
        "  58.4 kFLOPs a token and forward pass: projections 24.2%, convolutions 2.5%, "
        "attention 7.5%, memory 56.3%, feed forward 7.9%, head 1.8%",
        "  135 MFLOPs a step, backward passes included",
        "  bytes a layer and tensor rank:",
        "    between sequence ranks  state  convolution  window  step, both ways",
        "    0 and 1                 2,048          288     384           32,640",
        "  the same for sequences of any length in micro-batches of as many sequences",
        "",
        "1.21 GFLOPs in 9 steps, without validations",
    ]


def test_without_ranks_it_plans_the_fewest(run_file, capsys):
    assert "4 ranks = tensor 2 x data 1 x sequence 2" in told(capsys, run_file)


def test_micro_batches_one_after_another_take_longer(run_file, capsys):
    known = json.loads(told(capsys, run_file, "mesh.interleave=false", "--json"))
    stage = known["stages"][1]
    assert (stage["interleaved"], stage["micro_batches_in_flight"]) == (False, 1)
    assert stage["layer_times_per_step"] == 12 * (3 + 2 - 1)


def test_json_has_the_same_numbers(run_file, capsys):
    known = json.loads(told(capsys, run_file, "train.precision=fp32", "--ranks", "8", "--json"))
    assert known["mesh"] == {"ranks": 8, "tensor": 2, "data": 2, "sequence": 2}
    assert known["parameters"]["total"] == parameters.count(config.load(run_file).model)
    short, full = known["stages"]
    assert (short["from_step"], short["rows_per_micro_batch"], short["span"]) == (0, 2, 16)
    assert full["layer_times_per_step"] == 6 * 3 + 2 - 1
    assert full["boundaries"] == [
        {
            "boundary": 1,
            "state": 2048,
            "convolution": 288,
            "window": 384,
            "bytes_per_layer_and_step": 32640,
        }
    ]


def test_the_flops_of_a_run_are_those_of_its_stages(run_file, capsys):
    known = json.loads(told(capsys, run_file, "--json"))
    run = config.load(run_file)
    short, full = known["stages"]
    assert short["flops_per_step"] == 12 * flops.training(run.model, 32, 2)
    assert full["flops_per_step"] == 12 * flops.training(run.model, 64, 1)
    assert full["forward_flops_per_token"] == flops.token(run.model, 64)
    assert known["flops"] == 5 * short["flops_per_step"] + 4 * full["flops_per_step"]

    ended = json.loads(told(capsys, run_file, "train.steps=3", "--json"))
    assert ended["flops"] == 3 * short["flops_per_step"]


def test_flops_of_another_library_s_model_are_not_told(run_file, capsys):
    path = Path(run_file)
    model = {"hf": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}
    content = yaml.safe_load(path.read_text()) | {"model": model, "mesh": {}}
    path.write_text(yaml.safe_dump(content))
    assert told(capsys, run_file).splitlines()[-1] == "FLOPs of llama are not counted"
    known = json.loads(told(capsys, run_file, "--json"))
    assert known["flops"] is None
    assert not any("flops" in name for stage in known["stages"] for name in stage)


def test_boundaries_with_equal_volumes_share_a_row(run_file, capsys):
    changes = ["mesh.sequence=4", "model.window_size=20", "data.length_schedule=[]"]
    shown = told(capsys, run_file, *changes)
    assert "    0 and 1  " in shown
    assert "    1 and 2 … 2 and 3  " in shown
    assert "grows with the sequence until spans have 19 tokens" in shown


def test_one_sequence_rank_hands_nothing_on(run_file, capsys):
    shown = told(capsys, run_file, "mesh.sequence=1")
    assert "between sequence ranks" not in shown
    assert "one after another" in shown


def test_a_transformer_exchanges_heads_in_step(run_file, capsys):
    model = {key: MODEL[key] for key in MODEL if key not in ("chunk_size", "window_size")}
    path = Path(run_file)
    content = yaml.safe_load(path.read_text()) | {"model": model | {"variant": "transformer"}}
    path.write_text(yaml.safe_dump(content))
    shown = told(capsys, run_file)
    assert "one after another" in shown
    assert "a rank sends 1.0 kB a layer and pass to the others of its sequence" in shown


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--ranks", "6"], "6 ranks are no multiple of mesh.tensor * mesh.sequence = 2 * 2 = 4"),
        (["--ranks", "32"], "train.global_batch_size: 12 is no multiple of data ranks"),
        (["mesh.tensor=3"], "3 ranks cannot share model.num_attention_heads 4"),
        (["mesh.sequence=8"], "32 is no multiple of mesh.sequence * chunk_size = 8 * 8 = 64"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(run_file, capsys, arguments, what):
    assert cli.main(["plan", run_file, *arguments]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert "fix: " in error


def test_it_loads_no_torch(run_file):
    code = (
        "import sys; from titans_pretrain import cli; "
        f"cli.main(['plan', {run_file!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
