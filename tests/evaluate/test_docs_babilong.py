"""The commands of docs/babilong.md run as written."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from babi_files import write_background, write_facts
from tiny import MODEL

from titans_pretrain import cli, config

PAGE = (Path(__file__).parents[2] / "docs/babilong.md").read_text()
COMMANDS = re.findall(r"^    titans (.*)$", PAGE, re.MULTILINE)
TASKS = ("babilong_qa1", "babilong_qa4")


@pytest.fixture
def place(tiny_model, tokenizer_model, tmp_path):
    write_facts(tmp_path / "data/babi")
    (tmp_path / "data/books").mkdir()
    for name in ("one", "two"):
        write_background(tmp_path / f"data/books/{name}.txt")
    shutil.copytree(tiny_model, tmp_path / "exported/demo")
    shutil.copy(tokenizer_model, tmp_path / "tokenizer.model")
    with contextlib.chdir(tmp_path):
        yield tmp_path


def _run(commands):
    for command in commands:
        assert cli.main(shlex.split(command)) == 0, command


def _cells(out):
    found = [json.loads(path.read_text()) for path in sorted(out.glob("cells/*.json"))]
    return {(cell["task"], cell["cell"]): cell["result"] for cell in found}


def test_the_few_shot_command_scores_each_task_at_each_length(place):
    _run(COMMANDS[:1])
    cells = _cells(place / "results/few-shot")
    assert set(cells) == {(task, length) for task in TASKS for length in ("0k", "1k")}
    assert all(0 <= metrics["accuracy"] <= 1 for metrics in cells.values())
    assert cells["babilong_qa1", "0k"]["samples"] == 3


def _settings():
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])


def test_the_configuration_is_one(place):
    (place / "babilong.yaml").write_text(yaml.safe_dump(_settings()))
    assert config.load(str(place / "babilong.yaml")).data.sequence_length == 512


def test_the_training_data_is_made_and_prepared(place):
    _run(COMMANDS[1:3])
    made = json.loads((place / "data/babilong-512/manifest.json").read_text())
    assert made["tokens"] == 40 * 512
    assert made["masks"]


@pytest.mark.slow
def test_the_route_from_an_export_to_a_fine_tuned_one_runs(place):
    changes = {
        "model": MODEL,
        "train": {"steps": 2, "global_batch_size": 2, "learning_rate": 0.001, "precision": "fp32"},
    }
    (place / "babilong.yaml").write_text(yaml.safe_dump(_settings() | changes))
    _run(COMMANDS[1:])
    assert set(_cells(place / "results/tuned")) == {
        (task, length) for task in TASKS for length in ("0k", "1k")
    }
