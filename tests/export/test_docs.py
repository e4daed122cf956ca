"""The commands and code of docs/checkpoints.md and docs/export.md do what they say."""

import contextlib
import re
import shlex
from pathlib import Path

import hub_server
from tiny_run import make_run

from titans_pretrain import cli

DOCS = Path(__file__).parents[2] / "docs"


def _commands(page):
    return re.findall(r"^    titans (.*)$", (DOCS / page).read_text(), re.MULTILINE)


def _code(page):
    return re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )


def test_the_pages_commands_and_code_run_in_order(tmp_path, capfd, monkeypatch):
    make_run(tmp_path / "runs" / "demo")
    with contextlib.chdir(tmp_path), hub_server.serving(monkeypatch) as hub:
        told = {}
        for page in ("checkpoints.md", "export.md"):
            for command in _commands(page):
                assert cli.main(shlex.split(command)) == 0, command
                told[command] = capfd.readouterr().out
            for code in _code(page):
                exec(code, {})
    assert "latest" in told["checkpoint list runs/demo"]
    assert told["checkpoint verify runs/demo"] == "step-30: good\n"
    assert "a clean process gives the same logits" in told["export runs/demo exported/demo"]
    assert hub.repositories["lab/demo"].keys() == {
        path.name for path in (tmp_path / "exported" / "demo").iterdir()
    }
    assert len(told) == 5
    assert "Once upon a time" in capfd.readouterr().out
