"""The commands of docs/evaluation.md run as written."""

import contextlib
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from benchmark_rows import rows, write
from tiny import WORDS

from titans_pretrain import cli
from titans_pretrain.evaluate import tasks

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"
SETS = {
    "EleutherAI/wikitext_document_level": "wikitext",
    "EleutherAI/lambada_openai": "lambada_openai",
    "baber/piqa": "piqa",
    "Rowan/hellaswag": "hellaswag",
    "allenai/winogrande": "winogrande",
    "allenai/ai2_arc": "arc_easy",
    "lighteval/siqa": "social_iqa",
    "aps/super_glue": "boolq",
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with few rows in each set."""
    found, load = rows(3), datasets.load_dataset

    def from_hub(path, name=None, **options):
        if path == "json":
            return load(path, name, **options)
        made = datasets.Dataset.from_list(found[SETS[path]])
        return datasets.DatasetDict({"train": made, "validation": made, "test": made})

    monkeypatch.setattr(datasets, "load_dataset", from_hub)


@pytest.fixture
def place(trained, manifest, tmp_path):
    """What the page supposes to be there."""
    shutil.copytree(manifest.parent, tmp_path / "data/demo")
    shutil.copytree(trained.model, tmp_path / "exported/demo")
    write(tmp_path / "data/benchmarks")
    (tmp_path / "data/books").mkdir()
    for name in ("one", "two"):
        text = " ".join(random.Random(name).choices(WORDS, k=4000))
        (tmp_path / f"data/books/{name}.txt").write_text(text)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def commands():
    return re.findall(r"^    titans (.*)$", PAGE.read_text(), re.MULTILINE)


def read(path):
    return json.loads(path.read_text())


def test_the_commands_of_held_out_text_run_in_order(place):
    told = [command for command in commands() if "--tasks" not in command]
    assert len(told) == 3
    for command in told:
        assert cli.main(shlex.split(command)) == 0, command
    assert read(place / "results/first/heldout.json")["sequences"] == 4
    assert read(place / "results/half/heldout.json")["sequence_length"] == 8


def test_as_many_sequences_as_the_run_validated_on_give_its_loss(trained, manifest, tmp_path):
    words = ["eval", str(trained.model), str(tmp_path), "--data", str(manifest)]
    assert cli.main([*words, "--sequences", "7"]) == 0
    assert read(tmp_path / "heldout.json")["loss"] == pytest.approx(
        trained.validation_loss, rel=1e-6
    )


@pytest.mark.slow
def test_the_commands_of_tasks_run_in_order(place, hub, capsys):
    told = [command for command in commands() if "--tasks" in command]
    assert len(told) == 3
    for command in told:
        assert cli.main(shlex.split(command)) == 0, command
    found = read(place / "results/demo/report.json")
    names = {row["task"] for row in found["results"]}
    assert names == {*tasks.PAPER, "position"}
    (ours,) = found["table_1"]["ours"]
    assert None not in ours["values"]
    assert [curve["name"] for curve in found["curves"]] == ["position 256", "position 1k"]
    local = read(place / "results/local/report.json")
    assert {row["identity"]["samples"] for row in local["results"]} == {4}
    capsys.readouterr()
    assert cli.main(shlex.split(told[0])) == 0
    assert "wikitext: there already" in capsys.readouterr().err


def test_the_page_names_every_task_and_group():
    page = PAGE.read_text()
    for name in (*tasks.PAPER, *tasks.NIAH, *tasks.GROUPS, "position"):
        assert f"`{name}`" in page, name


def test_the_columns_of_the_files_are_those_that_are_read():
    from titans_pretrain.evaluate import harness

    for line in re.findall(r"^\| (`\w+\.jsonl`.*)\|$", PAGE.read_text(), re.MULTILINE):
        files, columns = line.split("|")
        for name in re.findall(r"`(\w+)\.jsonl`", files):
            wanted = set(harness.BENCHMARKS[name].columns)
            assert wanted <= set(re.findall(r"`(\w+)`", columns)), name
