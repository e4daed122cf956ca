"""What a node finds out about itself."""

import hashlib
import sys

import pytest

from launchers import preflight_facts
from launchers.preflight_facts import Facts, Task, collect, write_rate


@pytest.fixture
def task(tmp_path):
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / "nonce").write_text("abc")
    (tmp_path / "run.yaml").write_text("run: {}")
    return Task(
        directory=str(tmp_path / "check"),
        config=str(tmp_path / "run.yaml"),
        seconds=60.0,
        begun=0.0,
        write_bytes=2**20,
        gpus=0,
        scratch="",
    )


def with_(task, **changes):
    return Task(**vars(task) | changes)


def collected(task):
    facts = Facts()
    collect(task, "n1", facts)
    assert facts.doing == ""
    return facts


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def make(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


def test_a_node_that_is_well_tells_facts_and_no_faults(task, tmp_path):
    facts = collected(task)
    assert facts.faults == []
    assert facts.values["nonce"] == "abc"
    assert facts.values["config"] == hashlib.sha256(b"run: {}").hexdigest()
    assert facts.values["versions"]["python"] == sys.version.split()[0]
    assert facts.values["versions"]["torch"].startswith("2.")
    assert len(facts.values["code"]) == 64
    assert 0 < facts.values["memory_free_bytes"] <= facts.values["memory_bytes"]
    assert facts.values["free_bytes"] > 0
    assert facts.values["write_bytes_per_second"] > 0
    assert [path.name for path in (tmp_path / "check").iterdir()] == ["nonce"]


def test_a_package_that_is_absent_is_told_as_such(task, monkeypatch):
    monkeypatch.setattr(preflight_facts, "PACKAGES", ("no-such-package",))
    assert collected(task).values["versions"]["no-such-package"] == "absent"


def test_a_run_directory_that_is_not_there_is_a_fault(task):
    (fault,) = collected(with_(task, directory="/nowhere")).faults
    assert fault["what"] == "run directory /nowhere/nonce: No such file or directory"


def test_a_run_directory_on_a_full_disk_is_a_fault(task, monkeypatch):
    def full(path, size):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(preflight_facts, "write_rate", full)
    (fault,) = collected(task).faults
    assert "No space left on device" in fault["what"]


def test_a_configuration_that_is_not_there_is_a_fault(task):
    (fault,) = collected(with_(task, config="/nowhere.yaml")).faults
    assert "configuration /nowhere.yaml: No such file" in fault["what"]


def test_local_scratch_is_made_and_tried(task, tmp_path):
    facts = collected(with_(task, scratch=str(tmp_path / "scratch" / "mine")))
    assert facts.faults == []
    assert facts.values["scratch_free_bytes"] > 0
    assert list((tmp_path / "scratch" / "mine").iterdir()) == []


def test_local_scratch_that_cannot_be_made_is_a_fault(task, tmp_path):
    (tmp_path / "file").write_text("")
    (fault,) = collected(with_(task, scratch=str(tmp_path / "file" / "scratch"))).faults
    assert fault["what"].startswith("local scratch")


def test_code_of_another_content_or_name_has_another_hash(tmp_path, monkeypatch):
    package = tmp_path / "titans_pretrain"
    package.mkdir()
    monkeypatch.setattr(preflight_facts, "__file__", str(tmp_path / "launchers" / "x.py"))
    hashes = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("c.py", "")):
        (package / name).write_text(text)
        hashes.add(preflight_facts.code_hash())
    assert len(hashes) == 4


def test_writing_stops_when_its_time_has_passed(tmp_path):
    path = tmp_path / "file"
    assert write_rate(path, 2**40, seconds=0.0) > 0
    assert path.stat().st_size == preflight_facts.WRITE_PIECE


def test_writing_stops_at_its_size(tmp_path):
    write_rate(tmp_path / "file", 3 * 2**20)
    assert (tmp_path / "file").stat().st_size == 3 * 2**20


def test_the_price_of_each_sync_is_not_taken_for_the_rate(tmp_path, monkeypatch):
    clock = [0.0]

    def sync(handle):
        clock[0] += 0.1

    monkeypatch.setattr(preflight_facts.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(preflight_facts.os, "fsync", sync)
    assert write_rate(tmp_path / "file", 2**26) == pytest.approx(2**25 / 0.1)


def test_gpus_are_told_by_name_and_errors_of_one_are_a_fault(task, nvidia_smi):
    nvidia_smi("echo 'NVIDIA H200, 0'; echo 'NVIDIA H200, 3'; echo 'NVIDIA H200, [N/A]'")
    facts = collected(with_(task, gpus=3))
    assert facts.values["gpus"] == ["NVIDIA H200"] * 3
    (fault,) = facts.faults
    assert fault["what"] == "GPU 1 (NVIDIA H200) had 3 uncorrectable memory errors"


def test_a_gpu_query_that_fails_is_a_fault_with_its_words(task, nvidia_smi):
    nvidia_smi("echo 'Unable to determine the device handle for GPU3'; exit 15")
    (fault,) = collected(with_(task, gpus=3)).faults
    assert fault["what"] == (
        "nvidia-smi ended with 15: Unable to determine the device handle for GPU3"
    )


def test_a_gpu_query_that_hangs_is_a_fault(task, nvidia_smi, monkeypatch):
    nvidia_smi("exec sleep 60")
    monkeypatch.setattr(preflight_facts, "GPU_SECONDS", 0.1)
    (fault,) = collected(with_(task, gpus=3)).faults
    assert "nvidia-smi does not answer" in fault["what"]


def test_gpus_are_not_asked_for_where_the_job_has_none(task, nvidia_smi):
    nvidia_smi("exit 15")
    assert collected(task).faults == []
