"""``titans plan`` tells a step's memory by term and moment, and which GPUs hold it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from titans_pretrain import cli, config

MODEL = {
    "variant": "mag",
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
LONG = "data.length_schedule=[]"


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    content = {
        "model": MODEL,
        "data": {
            "manifest": "data/manifest.json",
            "sequence_length": 8192,
            "length_schedule": [{"from_step": 0, "length": 64}, {"from_step": 5, "length": 8192}],
        },
        "train": {"steps": 9, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1},
        "run": {"directory": "runs/x"},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def told(capsys, *arguments):
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def table(shown):
    """The line above the table, its rows by name, and the line below."""
    lines = shown.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("tensors on a rank"))
    end = next(n for n, line in enumerate(lines) if "in a micro-batch:" in line)
    assert lines[start + 1].split() == ["loss", "backward", "update"]
    rows = [line.rsplit(maxsplit=3) for line in lines[start + 2 : end]]
    return lines[start], {name.strip(): cells for name, *cells in rows}, lines[end + 1]


def test_the_table_adds_up_and_leaves_out_what_takes_nothing(run_file, capsys):
    head, rows, most = table(told(capsys, run_file))
    assert "16,384 tokens" in head
    for column, total in enumerate(rows.pop("total")):
        values = [cells[column] for cells in rows.values()]
        assert sum(float(value) for value in values if value != "-") == pytest.approx(
            float(total), abs=0.06
        )
    assert "gathered weights" not in rows
    assert "kept by other blocks" in rows
    assert "H200 141 GB: " in most


def test_json_has_bytes_of_the_stage_that_takes_most(run_file, capsys):
    known = json.loads(told(capsys, run_file, "train.activation_checkpointing=true", "--json"))
    found = known["memory"]
    assert found["sequence_length"] == 64
    for moment in found["moments"].values():
        terms = [value for name, value in moment.items() if name != "total"]
        assert sum(terms) == moment["total"] <= found["bytes"]
    most = list(found["largest_micro_batch"].values())
    assert most == sorted(most)
    assert most[0] > 2


def test_what_no_gpu_holds_is_told_as_none(run_file, capsys):
    changes = ["model.hidden_size=32768", "model.num_hidden_layers=40"]
    _, _, most = table(told(capsys, run_file, *changes))
    assert most.split(", ")[-1] == "B200: none"


def test_checkpointing_is_named(run_file, capsys):
    head, rows, _ = table(told(capsys, run_file, "train.activation_checkpointing=true"))
    assert head.endswith("and activation checkpointing:")
    assert "blocks' inputs" in rows


@pytest.mark.parametrize("field", ["remember_across_documents", "attend_across_documents"])
def test_it_is_told_that_documents_are_not_counted(run_file, field, capsys):
    assert "not counted" not in told(capsys, run_file)
    assert json.loads(told(capsys, run_file, "--json"))["memory"]["documents_counted"]
    change = f"model.{field}=false"
    assert "  not counted: what telling documents apart takes" in told(capsys, run_file, change)
    known = json.loads(told(capsys, run_file, change, "--json"))["memory"]
    assert not known["documents_counted"]


def test_another_library_s_model_is_not_counted(run_file, tmp_path, capsys):
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    model = {"hf": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 8192}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content | {"model": model}))
    assert "what a step takes in memory is not known of this model" in told(capsys, run_file)
    assert json.loads(told(capsys, run_file, "--json"))["memory"] is None


def test_the_documented_example_is_what_is_told(tmp_path, capsys):
    text = (Path(config.__file__).parent.parent / "docs" / "performance.md").read_text()
    section = text[text.index("## Memory of a training step") :]
    path = tmp_path / "run.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    last = re.search(r"\| all \| (.*?) \| \*\*(.*?)\*\* \((.*?)\) \| (.*?) \|", section).groups()
    _, rows, most = table(told(capsys, str(path)))
    assert rows["total"] == [last[0], last[1], last[3]]
    _, larger, more = table(told(capsys, str(path), "model.chunk_size=512"))
    assert larger["total"][1] == last[2]
    counts = re.search(r"up to (\d+) sequences \((\d+) at chunk 512\)", section).groups()
    for count, line in zip(counts, (most, more), strict=True):
        assert f"H200 141 GB: {count}," in line
    section, by_kernels = (
        " ".join(section.split()),
        r"chunk: ([\d.]+) GiB and ([\d.]+) in all here, up to (\d+) sequences",
    )
    states, whole, count = re.search(by_kernels, section).groups()
    _, rows, most = table(told(capsys, str(path), "train.memory_kernels=triton"))
    assert (rows["memory states of it"][1], rows["total"][1]) == (states, whole)
    assert f"H200 141 GB: {count}," in most


def test_the_kernels_that_a_run_asks_for_are_counted(run_file, capsys):
    found = [
        json.loads(told(capsys, run_file, LONG, f"train.memory_kernels={kernels}", "--json"))
        for kernels in ("torch", "triton")
    ]
    found = [one["memory"] for one in found]
    assert [one["memory_kernels"] for one in found] == ["torch", "triton"]
    by_torch, by_kernels = (one["moments"]["backward"]["states"] for one in found)
    assert 2 * by_torch < by_kernels  # one before each chunk of 64, not each stretch of 256
    plain = json.loads(told(capsys, run_file, LONG, "--json"))["memory"]
    assert plain == found[0]
    most = [list(one["largest_micro_batch"].values()) for one in found]
    assert most[0] > most[1]
