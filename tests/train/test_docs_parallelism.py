"""docs/parallelism.md: the commands run as written, and what it names is there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/parallelism.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_commands_run_as_written(tmp_path, manifest):
    shutil.copytree(manifest.parent, tmp_path / "data")
    (run,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(run)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["plan", "train"]
    bin_directory = str(Path(sys.executable).parent)
    for command in commands:
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            env={"PATH": f"{bin_directory}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "state from" in done.stdout, command


def test_the_files_it_names_are_there():
    named = set(re.findall(r"`((?:titans_pretrain|tests)/[\w/]+\.py)`", TEXT))
    named |= set(re.findall(r"^python (tests/\S+\.py)", TEXT, re.MULTILINE))
    named |= {f"docs/{name}" for name in re.findall(r"\]\(([\w.-]+\.png)\)", TEXT)}
    assert len(named) > 9
    assert not [name for name in named if not (ROOT / name).exists()]
