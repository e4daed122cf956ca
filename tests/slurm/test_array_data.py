"""Data prepared by an array job whose tasks are killed, on the test cluster."""

import os
import random
import sys
from pathlib import Path

import pytest
from slurm_commands import until
from tiny import write_text

from titans_pretrain import cli

READY = Path(__file__).resolve().parents[2] / "launchers/prepare.sbatch"
TASKS, KILLED = 8, (1, 4, 6)
WRAPPER = """#!/bin/bash
case $SLURM_ARRAY_TASK_ID in {tasks}) exec {python} {stopping} "$@" ;; *) exec {python} "$@" ;; esac
"""
# Tasks 1, 4 and 6 stop as they publish their first, second and third file: a kill finds them there.
STOPPING = """
import os, runpy, signal, sys

left, publish = int(os.environ["SLURM_ARRAY_TASK_ID"]) // 3, os.replace

def stop(source, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGSTOP)
    left -= 1
    publish(source, target)

os.replace = stop
sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text of 16 files, and a tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    dice = random.Random(0)
    for number in range(2 * TASKS):
        write_text(directory / f"{number}.jsonl", 40, dice, f"{number}-")
    tokenizer = ["--vocab-size", "300", "--output", str(directory / "t.model")]
    assert not cli.main(["data", "tokenizer", "--input", f"{directory}/*.jsonl", *tokenizer])
    return directory


def plan(corpus, output):
    tokenizer = ["--tokenizer", str(corpus / "t.model"), "--tasks", str(TASKS)]
    source = ["--input", f"{corpus}/*.jsonl", *tokenizer]
    assert not cli.main(["data", "plan", *source, "--output", str(output)])


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_the_same_command_again_does_what_killed_tasks_left(slurm, corpus, tmp_path, monkeypatch):
    output, straight = tmp_path / "data", tmp_path / "straight"
    for directory in (output, straight):
        plan(corpus, directory)
    for task in range(TASKS):
        prepare = ["data", "prepare", "--output", str(straight), "--task", str(task)]
        assert not cli.main(prepare)
    monkeypatch.setenv("OUTPUT", str(output))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    python, stopping = tmp_path / "python", tmp_path / "stopping.py"
    stopping.write_text(STOPPING)
    tasks = "|".join(map(str, KILLED))
    python.write_text(WRAPPER.format(tasks=tasks, python=sys.executable, stopping=stopping))
    python.chmod(0o755)
    monkeypatch.setenv("TITANS_PYTHON", str(python))
    command = [f"--array=0-{TASKS - 1}%3", f"--output={tmp_path}/%A_%a.log", str(READY)]

    array = slurm.submit(*command)
    for task in KILLED:
        element = f"{array}_{task}"
        until(lambda: "RUNNING" in slurm.states(element), 120, f"{element} to run")  # noqa: B023
        slurm.run("scancel", "--batch", "--signal=KILL", element)
    slurm.wait(array, 240)
    ends = [slurm.states(f"{array}_{task}") for task in range(TASKS)]
    assert [task for task, end in enumerate(ends) if end != {"COMPLETED"}] == list(KILLED)
    assert not (output / "manifest.json").exists()

    monkeypatch.delenv("TITANS_PYTHON")
    again = slurm.submit(*command)
    assert slurm.wait(again, 240) == {"COMPLETED"}
    assert not cli.main(["data", "verify", str(output)])
    assert contents(output) == contents(straight)
