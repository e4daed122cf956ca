"""The commands of docs/evaluation.md run as written."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from titans_pretrain import cli

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"


def test_the_commands_run_in_order_and_the_loss_is_the_runs(trained, manifest, tmp_path):
    shutil.copytree(manifest.parent, tmp_path / "data/demo")
    shutil.copytree(trained.model, tmp_path / "exported/demo")
    commands = re.findall(r"^    titans (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 3
    with contextlib.chdir(tmp_path):
        for command in commands:
            assert cli.main(shlex.split(command)) == 0, command
    first, half = (
        json.loads((tmp_path / f"results/{name}/heldout.json").read_text())
        for name in ("first", "half")
    )
    assert first["sequences"] == 4
    assert half["sequence_length"] == 8


def test_as_many_sequences_as_the_run_validated_on_give_its_loss(trained, manifest, tmp_path):
    words = ["eval", str(trained.model), str(tmp_path), "--data", str(manifest)]
    assert cli.main([*words, "--sequences", "7"]) == 0
    result = json.loads((tmp_path / "heldout.json").read_text())
    assert result["loss"] == pytest.approx(trained.validation_loss, rel=1e-6)
