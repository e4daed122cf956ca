"""Processes that join, add and exchange over gloo."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from launchers.fabric import PHASES, Place

ALONE = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


def start(place):
    reading, writing = os.pipe()
    place = dataclasses.replace(place, pipe=writing)
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.fabric", json.dumps(dataclasses.asdict(place))],
        pass_fds=(writing,),
        env=os.environ | ALONE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    return process, reading


def place(node, nodes, **changes):
    values = {"local": 0, "locals": 1, "address": "127.0.0.1", "port": 0, "seconds": 200.0}
    return Place(node, nodes, **values | {"cuda": False, "pipe": 0} | changes)


def told(process, reading):
    with os.fdopen(reading) as rows:
        found = [json.loads(row) for row in rows]
    _, complaints = process.communicate(timeout=60)
    return process.returncode, [row for row in found if row], complaints


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_three_processes_go_through_all_phases_and_measure_both_neighbours(port):
    started = [start(place(node, 3, port=port)) for node in range(3)]
    for node, (process, reading) in enumerate(started):
        code, found, complaints = told(process, reading)
        assert code == 0, complaints
        assert [row["phase"] for row in found if "phase" in row] == list(PHASES)
        assert next(row for row in found if row.get("phase") == "reduced")["right"]
        pairs = [row["pair"] for row in found if "pair" in row]
        assert sorted(pair["other"] for pair in pairs) == sorted({0, 1, 2} - {node})
        assert all(pair["right"] and pair["seconds"] > pair["latency"] > 0 for pair in pairs)


def test_a_process_that_cannot_join_tells_why_and_fails(port):
    code, found, _ = told(*start(place(1, 2, port=port, seconds=1.0)))
    assert code != 0
    assert [row["phase"] for row in found if "phase" in row][-1] == "device"
    assert "error" in found[-1]


def test_a_process_without_its_gpu_says_how_many_there_are(port, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, found, _ = told(*start(place(0, 2, port=port, cuda=True)))
    assert code != 0
    assert {"gpus": 0} in found
    assert found[-1] == {"error": "RuntimeError: torch sees 0 GPUs, too few for process 0"}
