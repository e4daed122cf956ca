import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs/data.md"


def blocks():
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_every_command_of_the_page_runs_as_written(tmp_path):
    assert len(blocks()) >= 7
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, block + done.stderr
    assert json.loads((tmp_path / "tokens/manifest.json").read_text())["tokens"] > 10**5
    assert json.loads((tmp_path / "answers/manifest.json").read_text())["masks"]


@pytest.mark.parametrize("job", ["tokenizer", "prepare", "merge", "verify", "inspect"])
def test_every_job_is_on_the_page(job):
    assert f"titans data {job}" in PAGE.read_text()


def test_every_option_of_the_page_exists(capsys):
    from titans_pretrain import cli

    known = ""
    for job in ("tokenizer", "prepare", "merge", "verify", "inspect"):
        with pytest.raises(SystemExit):
            cli.main(["data", job, "--help"])
        known += capsys.readouterr().out
    assert not [
        name for name in re.findall(r"--[a-z][a-z-]+", PAGE.read_text()) if name not in known
    ]
