"""Preflight over the nodes of a real cluster, some of them spoilt."""

import contextlib
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import until

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = """
model: {preset: titans-lmm-170m, num_hidden_layers: 1, hidden_size: 96, vocab_size: 256}
data: {manifest: none/manifest.json, sequence_length: 64}
train: {steps: 1, global_batch_size: 4, learning_rate: 1.0e-3, precision: fp32}
"""


class Preflight:
    """One job that does nothing but check its nodes.

    Args:
        cluster: to run on.
        directory: the test's.
        nodes: of the job.
    """

    def __init__(self, cluster, directory, nodes):
        self.cluster, self.directory, self.nodes = cluster, directory, nodes
        self.run = directory / "run"
        self.verdict = directory / "verdict.json"
        self.job = ""

    def submit(self, *overrides, python=sys.executable):
        config = self.directory / "run.yaml"
        config.write_text(f"{CONFIG}run: {{directory: {self.run}}}\n")
        arguments = [
            f"job.nodes={self.nodes}",
            f"job.python={python}",
            "job.slow_factor=1000",  # the processors of the test machine are shared
            *overrides,
        ]
        program = [sys.executable, HERE / "preflight_job.py", config, self.verdict, *arguments]
        self.job = self.cluster.submit(
            f"--nodes={self.nodes}",
            f"--output={self.directory}/job.log",
            f"--export=ALL,PYTHONPATH={ROOT},OMP_NUM_THREADS=1",
            "--wrap",
            shlex.join(map(str, program)),
        )
        return self

    def told(self, seconds=120):
        """The verdict, once the job has ended."""
        states = self.cluster.wait(self.job, seconds)
        assert states == {"COMPLETED"}, (self.directory / "job.log").read_text()
        return json.loads(self.verdict.read_text())


@pytest.fixture
def preflight(slurm, tmp_path):
    def make(nodes):
        return Preflight(slurm, tmp_path, nodes)

    return make


@pytest.fixture
def odd_python(slurm):
    """Makes an interpreter that is another on one node: a script on each node's own disk."""
    if not slurm.isolated:
        pytest.skip("nodes share their files here")

    def make(odd, script):
        for node in slurm.nodes:
            path = slurm.directory / "local" / node / "python"
            path.write_text(f"#!/bin/bash\n{script if node == odd else ''}\n")
            with path.open("a") as handle:
                handle.write(f'exec {sys.executable} "$@"\n')
            path.chmod(0o755)
        return slurm.scratch / "python"

    return make


def test_four_nodes_that_are_well_have_no_problem(preflight):
    asked = preflight(4).submit()
    told = asked.told()
    assert told["problems"] == []
    assert told["seconds"] < 60
    assert told["write_bytes_per_second"] > 0
    kept = json.loads((asked.run / "preflight.json").read_text())
    assert {node["phase"] for node in kept["nodes"].values()} == {"done"}
    assert [len(node["bytes_per_second"]) for node in kept["nodes"].values()] == [2] * 4
    assert list((asked.run / "preflight").iterdir()) == []


@pytest.mark.slow
def test_a_node_without_the_interpreter_is_named(preflight, odd_python, slurm):
    python = odd_python(slurm.nodes[2], "exit 127")
    told = preflight(4).submit("job.preflight_seconds=20", python=python).told()
    assert told["suspects"] == [slurm.nodes[2]]
    assert "Exited with exit code 127" in told["problems"][0]["what"]


@pytest.mark.slow
def test_a_frozen_node_is_named_within_the_time_given(preflight, odd_python, slurm):
    python = odd_python(slurm.nodes[1], "kill -STOP $$")
    told = preflight(4).submit("job.preflight_seconds=20", python=python).told()
    assert told["suspects"] == [slurm.nodes[1]]
    assert told["seconds"] < 25


@pytest.mark.slow
def test_a_node_with_other_code_and_clock_is_named(preflight, odd_python, slurm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import time, importlib.metadata as metadata\n"
        "now, version = time.time, metadata.version\n"
        "time.time = lambda: now() + 100\n"
        "metadata.version = lambda name: '0.0.1' if name == 'deepspeed' else version(name)\n"
    )
    python = odd_python(slurm.nodes[3], f"export PYTHONPATH={tmp_path}:$PYTHONPATH")
    told = preflight(4).submit(python=python).told()
    assert told["suspects"] == [slurm.nodes[3]]
    whats = " ".join(problem["what"] for problem in told["problems"])
    assert "deepspeed 0.0.1; the others have" in whats
    assert "its clock is +100" in whats


@pytest.mark.slow
def test_a_node_that_cannot_write_the_run_directory_is_named(preflight, odd_python, slurm):
    asked = preflight(4)
    asked.run.mkdir()
    remount = (
        f"unshare --mount bash -c 'mount --bind {asked.run} {asked.run}"
        f' && mount -o remount,ro,bind {asked.run} && exec {sys.executable} "$@"\' - "$@"; exit'
    )
    told = asked.submit(python=odd_python(slurm.nodes[1], remount)).told()
    assert told["suspects"] == [slurm.nodes[1]]
    assert "Read-only file system" in told["problems"][0]["what"]


@pytest.mark.slow
def test_a_node_that_sees_another_directory_is_named(preflight, odd_python, slurm, tmp_path):
    asked = preflight(4)
    asked.run.mkdir()
    other = tmp_path / "other"
    elsewhere = (
        f"mkdir -p {other} && cp -r {asked.run}/. {other} && "
        f"find {other} -name nonce -exec sh -c 'echo -n wrong > $1' - {{}} ';' && "
        f"unshare --mount bash -c 'mount --bind {other} {asked.run}"
        f' && exec {sys.executable} "$@"\' - "$@"; exit'
    )
    told = asked.submit(python=odd_python(slurm.nodes[1], elsewhere)).told()
    assert told["suspects"] == [slurm.nodes[1]]


@pytest.mark.slow
def test_a_node_that_exchanges_slowly_is_named(preflight, odd_python, slurm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "clock, sleep = time.perf_counter, time.sleep\n"
        "if 'launchers.fabric' in sys.orig_argv:\n"
        "    time.perf_counter = lambda: (sleep(0.15), clock())[1]\n"
    )
    python = odd_python(slurm.nodes[1], f"export PYTHONPATH={tmp_path}:$PYTHONPATH")
    told = preflight(4).submit("job.slow_factor=3", python=python).told()
    assert told["suspects"] == [slurm.nodes[1]]
    assert "network: with" in told["problems"][0]["what"]
    assert "usual here is" in told["problems"][0]["what"]


@pytest.mark.slow
def test_processes_that_freeze_while_they_join_are_named(preflight, slurm):
    odd = slurm.nodes[2]
    asked = preflight(4).submit("job.preflight_seconds=30")
    until(lambda: "launchers.fabric" in "".join(_processes(slurm, odd).values()), 60, "joining")
    for pid, words in _processes(slurm, odd).items():
        if "launchers." in words:
            os.kill(pid, signal.SIGSTOP)
    told = asked.told()
    assert told["suspects"] == [odd]
    assert told["seconds"] < 35


def _processes(cluster, node):
    """The command lines of a node's processes."""
    found = {}
    for pid in cluster.node_processes(node):
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    return found
