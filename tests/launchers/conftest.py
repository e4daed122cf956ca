"""A run's directory, and SLURM as tests without one have it."""

import signal

import pytest
from submit_cases import FakeSlurm

from launchers import nodes, slurm_command, slurm_utils
from launchers.asked import AskedToStop
from titans_pretrain.train.directory import RunDirectory


@pytest.fixture
def slurm(monkeypatch):
    fake = FakeSlurm()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def known(monkeypatch):
    """Jobs that SLURM knows, by id; all nodes are fine."""
    jobs = {}
    monkeypatch.setattr(slurm_utils, "job", jobs.get)
    monkeypatch.setattr(nodes, "states", lambda partition: {"a1": "idle", "a2": "mixed"})
    monkeypatch.setattr(slurm_command, "call", lambda query: "1000 N/A")
    return jobs


@pytest.fixture
def asked():
    before = {number: signal.getsignal(number) for number in AskedToStop.SIGNALS}
    yield AskedToStop()
    for number, handler in before.items():
        signal.signal(number, handler)
