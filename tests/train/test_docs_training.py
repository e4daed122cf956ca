"""docs/training.md: the reference is config.py's, the commands run as written."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from titans_pretrain import config

PAGE = Path(__file__).resolve().parents[2] / "docs/training.md"
SECTIONS = {
    name: field.annotation
    for name, field in config.RunConfig.model_fields.items()
    if isinstance(field.annotation, type)
    and issubclass(field.annotation, BaseModel)
    and name not in ("job", "pipeline")  # docs/slurm.md has them
}


def reference():
    """The table of every key: name, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
            lines.append(f"| `{section}.{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_reference_is_that_of_config_py():
    assert reference() in PAGE.read_text()


@pytest.fixture
def workplace(tmp_path, manifest):
    """A directory with the page's run.yaml and its data."""
    shutil.copytree(manifest.parent, tmp_path / "data")
    (run,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(run)
    return tmp_path


def test_the_commands_run_as_written(workplace):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert commands[0].startswith("titans train run.yaml")
    bin_directory = str(Path(sys.executable).parent)
    for command in commands:
        words = shlex.split(command)
        done = subprocess.run(
            words,
            cwd=workplace,
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": f"{bin_directory}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    section = PAGE.read_text().partition("## A run's directory")[2].partition("## ")[0]
    files = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    present = {name for name in files if (workplace / "runs/first" / name).exists()}
    assert files - present == {"error.json", "evaluations", "hang", "wandb-id"}
