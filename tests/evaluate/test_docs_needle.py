"""The commands of docs/needle.md run as written."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.evaluate import needle, tasks

PAGE = Path(__file__).parents[2] / "docs/needle.md"


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("titans ")]


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A directory with a model, of which few needles are asked."""
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.setattr(needle, "SAMPLES", 2)
    monkeypatch.setattr(needle, "greedy", lambda model, texts, **_: [" 1"] * len(texts))
    with contextlib.chdir(tmp_path):
        yield tmp_path


def test_the_commands_run_in_order(place):
    told = commands()
    assert [words[:2] for words in told] == [
        ["eval", "model"],
        *(["data", verb] for verb in ("needle", "tokenizer", "needle", "prepare")),
    ]
    for words in told:
        assert cli.main(words) == 0, words
    report = json.loads((place / "needles/report.json").read_text())
    assert [row["result"]["accuracy"] for row in report["results"]] == [0, 0]
    assert (place / "samples/manifest.json").exists()


def test_the_page_names_every_task():
    for name in tasks.NIAH:
        assert f"| `{name}` |" in PAGE.read_text()
