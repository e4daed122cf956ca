"""The README's cluster section and docs/slurm.md, command by command, on the test cluster."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_commands import until
from tiny import write_text

from launchers import submitted
from titans_pretrain import cli

ROOT = Path(__file__).resolve().parents[2]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, slurm):
    """A directory with what docs/slurm.md starts from."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(0)
    (tmp_path / "text").mkdir()
    for name in ("one", "two"):
        write_text(tmp_path / "text" / f"{name}.jsonl", 80, dice, f"{name}-")
    tokenizer = ["--vocab-size", "300", "--output", "tokenizer.model"]
    assert not cli.main(["data", "tokenizer", "--input", "text/*.jsonl", *tokenizer])
    run = yaml.safe_load(blocks("docs/slurm.md", "yaml")[0])
    run["job"] |= {"preflight_seconds": 180, "slow_factor": 1000.0}  # all nodes are one busy host
    Path("run.yaml").write_text(yaml.safe_dump(run))
    Path("launchers").symlink_to(ROOT / "launchers")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def shell(line):
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(text):
    found = [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    return [line for lines in found for line in lines if line]


def wait_for_all(slurm, seconds=800):
    """Wait until no job is queued or runs."""
    until(lambda: not slurm.run("squeue", "-h").stdout, seconds, "the end of all jobs")


def states(slurm, run):
    """Of the newest job of each stage."""
    jobs = {row.stage: row.job for row in submitted.read(run)}
    return {stage: slurm.wait(job, 10) for stage, job in jobs.items()}


@pytest.mark.timeout(900)
def test_the_readmes_cluster_section_is_one_chain_without_a_hand(slurm, workplace):
    section = (ROOT / "README.md").read_text().partition("## On a cluster")[2]
    lines = commands(section.partition("\n## ")[0])
    assert lines[1] == "titans submit run.yaml --pipeline"
    for line in lines:
        shell(line)
    wait_for_all(slurm)
    run = workplace / "runs/first"
    chain = ("plan", "prepare", "merge", "train", "export", "eval")
    assert states(slurm, run) == {stage: {"COMPLETED"} for stage in chain}
    ranks = json.loads((run / "ranks.json").read_text())
    hosts = [place["host"] for place in ranks.values()]
    assert len(hosts) == 4
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    scored = json.loads((run / "eval/heldout.json").read_text())
    assert scored["loss"] == pytest.approx(rows[-1]["validation_loss"], rel=1e-6)
    assert "done" in shell("titans status runs/first")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_pages_commands_run_as_written(slurm, workplace):
    metrics = workplace / "runs/second/metrics.jsonl"
    for line in commands((ROOT / "docs/slurm.md").read_text()):
        if line.startswith(("titans status runs", "OUTPUT", "CONFIG", "CHECKPOINT")):
            wait_for_all(slurm)
        if line.startswith("touch"):
            until(metrics.exists, 600, "the first step")
        shell(line)
        if line.startswith("touch"):
            until(lambda: not (workplace / "runs/second/save").exists(), 300, "the save")
    wait_for_all(slurm)
    chain = ("plan", "prepare", "merge", "train", "export", "eval")
    assert states(slurm, workplace / "runs/first") == {stage: {"COMPLETED"} for stage in chain}
    assert (workplace / "runs/second/checkpoints").is_dir()
    assert (workplace / "again/config.json").is_file()
    shell("titans data verify more")
