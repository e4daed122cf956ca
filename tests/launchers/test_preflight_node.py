"""One node's part of a preflight: it tells how far it came, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import preflight_node
from launchers.preflight_facts import Task

HERE = Path(__file__).parent
DONE = 'tell(phase="joined", clock=1.5)\ntell(pair={"other": 1})\ntell(phase="done")\n'
STUCK = 'tell(phase="torch")\nprint("stuck", flush=True)\ntime.sleep(600)\n'


class LoneNode:
    """A node that has a task of its own.

    Args:
        directory: the test's.
    """

    def __init__(self, directory):
        self.check = directory / "check"
        self.check.mkdir()
        (self.check / "nonce").write_text("abc")
        self.task = {
            "directory": str(self.check),
            "config": str(self.check / "nonce"),
            "seconds": 60.0,
            "begun": 0.0,
            "write_bytes": 2**20,
            "gpus": 0,
            "scratch": "",
        }

    def start(self, script, **changes):
        task = self.task | {"begun": time.time()} | changes
        variables = {
            "SLURMD_NODENAME": "n1",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "n1",
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_NODES": "1",
        }
        return subprocess.Popen(
            [sys.executable, HERE / "lone_node.py", script, json.dumps(task)],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script, **changes):
        process = self.start(script, **changes)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return printed

    @property
    def answer(self):
        return json.loads((self.check / "n1.json").read_text())


@pytest.fixture
def node(tmp_path):
    return LoneNode(tmp_path)


def test_what_was_checked_and_measured_is_in_one_file(node):
    printed = node.run(DONE)
    answer = node.answer
    assert printed == "titans-preflight n1 done\n"
    assert answer.keys() == preflight_node.PARTS
    assert (answer["node"], answer["ended"], answer["doing"]) == ("n1", True, "")
    assert answer["values"]["nonce"] == "abc"
    (process,) = answer["processes"]
    assert (process["phase"], process["clock"]) == ("done", 1.5)
    assert process["pairs"] == [{"other": 1}]
    assert sorted(path.name for path in node.check.iterdir()) == ["n1.json", "nonce"]


def test_each_gpu_has_a_process_and_each_process_its_place(node):
    node.run("tell(phase='done', place=place)", gpus=3)
    places = [process["place"] for process in node.answer["processes"]]
    assert [place["local"] for place in places] == [0, 1, 2]
    assert all(place["locals"] == 3 and place["cuda"] for place in places)
    assert {place["address"] for place in places} == {"n1"}
    assert len({place["port"] for place in places}) == 1


def test_a_process_that_waits_is_told_of_before_the_time_is_over_and_ended(node):
    printed = node.run(f"tell(pid=os.getpid())\n{STUCK}", seconds=12.0)
    assert "titans-preflight n1 torch" in printed
    (process,) = node.answer["processes"]
    assert (process["phase"], process["exit"]) == ("torch", None)
    assert process["silent"] > 1
    assert not Path(f"/proc/{process['pid']}/cmdline").exists() or not (
        Path(f"/proc/{process['pid']}/cmdline").read_bytes()
    )


def test_a_process_that_dies_is_told_of_with_its_end(node):
    node.run('tell(phase="device", error="RuntimeError: no")\nrows.close()\nsys.exit(3)')
    (process,) = node.answer["processes"]
    assert (process["phase"], process["error"]) == ("device", "RuntimeError: no")


def test_the_slowest_process_tells_how_far_the_node_is(node):
    script = 'tell(phase="done" if place["local"] else "connected")'
    assert "titans-preflight n1 connected" in node.run(script, gpus=2)


def test_a_node_that_cannot_write_says_so_where_the_batch_process_hears_it(node):
    printed = node.run(DONE, directory=str(node.check / "absent"))
    assert "titans-preflight n1 unwritable [Errno 2]" in printed


def test_a_late_start_leaves_less_time_and_a_wrong_clock_never_none(node, monkeypatch):
    left = []
    for late in (-1000.0, 0.0, 3.0, 1000.0):
        monkeypatch.setattr(preflight_node.time, "time", lambda late=late: late)
        monkeypatch.setattr(preflight_node.time, "monotonic", lambda: 0.0)
        one = preflight_node.Node(Task(**node.task), {"SLURMD_NODENAME": "n1"})
        left.append(one._deadline)
    assert left == [51.0, 51.0, 48.0, 21.0]


def test_signals_that_ask_a_job_to_save_do_not_end_the_check(node):
    process = node.start(STUCK, seconds=12.0)
    assert process.stdout.readline() == "stuck\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert node.answer["ended"]
