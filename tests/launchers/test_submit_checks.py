"""What is refused before anything is queued; each refusal names the key, the value and the fix."""

import os
import stat

import pytest
from submit_cases import write_checkpoint, write_config

from launchers import checks, submit
from titans_pretrain import config as run_config
from titans_pretrain.errors import UserError
from titans_pretrain.files import write_json

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def refused(tmp_path, slurm):
    """``refused(override…, section={…})``: the error of a submission that queued nothing."""

    def refuse(*overrides, resume=False, **sections):
        file = write_config(tmp_path, **sections)
        with pytest.raises(UserError) as caught:
            submit.submit(str(file), overrides, resume=resume)
        assert not slurm.submitted
        assert caught.value.fix
        return caught.value

    return refuse


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(name, text)``: an executable script before all others on PATH."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def make(name, text):
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
        return place / name

    return make


def test_ranks_that_do_not_fit_the_mesh(refused):
    error = refused("job.nodes=3", mesh={"sequence": 2})
    assert "3 ranks are no multiple of mesh.tensor * mesh.sequence" in error.what
    assert error.where == "job.nodes 3 * job.ranks_per_node 1 = 3 ranks"
    assert "start 2 or 4 ranks" in error.fix


def test_ranks_that_do_not_fit_the_batch(refused):
    error = refused("job.nodes=2", "job.ranks_per_node=4")
    assert "train.global_batch_size: 4 is no multiple" in error.what


def test_more_ranks_than_gpus(refused):
    error = refused("job.ranks_per_node=4", "job.gpus_per_node=2")
    assert error.fix == "use job.ranks_per_node=2, one rank a GPU"


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "AWS_SECRET_ACCESS_KEY"]
)
def test_a_secret_in_the_job_section(name, refused):
    error = refused(job={"environment": {name: "hidden-value"}})
    assert name in error.what
    assert "hidden-value" not in str(error)


@pytest.mark.parametrize("name", ["RANK", "TITANS_ATTEMPT", "SLURM_JOB_ID", "MASTER_PORT"])
def test_a_variable_that_each_job_has_for_itself(name, refused):
    assert name in refused(job={"environment": {name: "1"}}).what


def test_ordinary_variables_are_allowed(tmp_path, slurm):
    names = ("NCCL_IB_PKEY", "NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    file = write_config(tmp_path, job={"environment": dict.fromkeys(names, "1")})
    assert submit.submit(str(file)) == 0


def test_a_time_limit_that_ends_as_it_begins(refused):
    error = refused("job.time='2'")
    assert error.where == "job.time"
    assert error.fix == "use a longer time, or job.signal_seconds=30"


def test_a_time_limit_that_leaves_nothing_between_load_and_save(refused, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "last_save.json", {"step": 2, "seconds": 200.0, "bytes": 1})
    error = refused("job.time='9'", "job.signal_seconds=400")
    assert "leaves no time to train" in error.what
    assert error.fix == "use job.time=20 or more"


def test_a_grace_too_short_for_the_storage_that_was_given(refused):
    error = refused("job.storage_bytes_per_second=100.0")
    assert "job.signal_seconds: 120 is too short" in error.what


def test_a_rate_that_was_only_measured_raises_doubt_and_refuses_nothing(tmp_path):
    run = run_config.load(write_config(tmp_path))
    checks.of_run(run, tmp_path)
    assert "job.signal_seconds: 120 is too short" in checks.doubt(run, tmp_path, 100.0)
    assert checks.doubt(run, tmp_path, 1e12) == ""


def test_the_slowest_step_counts_into_the_grace(refused, tmp_path):
    write_checkpoint(write_config(tmp_path), tmp_path / "run", 2)
    write_json(tmp_path / "run" / "last_save.json", {"step": 2, "seconds": 100.0, "bytes": 1})
    rows = '{"step": 1, "seconds": 30.5}\n{"event": "stop"}\nnot json\n{"step": 2, "sec'
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    error = refused(resume=True)
    assert "a step takes 30 s and a save 100 s" in error.what
    assert error.fix == "use job.signal_seconds=197"


def test_a_manifest_that_is_not_there(refused, tmp_path):
    error = refused(f"data.manifest={tmp_path}/nothing/manifest.json")
    assert f"{tmp_path}/nothing/manifest.json does not exist" in error.what


def test_a_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").touch()
    error = refused(f"run.directory={tmp_path}/file/run")
    assert error.what == "cannot write the run's directory: Not a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    error = refused(f"run.directory={tmp_path}/closed/run")
    assert error.what == "cannot write the run's directory: Permission denied"


def test_no_room_for_a_checkpoint(refused, monkeypatch):
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: full)
    assert "a checkpoint takes about" in refused().what


def test_modules_are_loaded_one_upon_the_other_and_the_first_that_fails_is_told(
    refused, tmp_path, monkeypatch
):
    asked = tmp_path / "asked"
    monkeypatch.setenv("BASH_ENV", "")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bash_profile").write_text(
        f'module() {{ printf "%s\\n" "$*" >>{asked}\n'
        'case $2 in gcc/12) in_gcc=1 ;; openmpi/4) [ "${in_gcc:-}" ] ;; *) false ;; esac; }\n'
    )
    monkeypatch.setenv("HOME", str(home))
    error = refused(job={"modules": ["gcc/12", "openmpi/4", "nccl/9", "never"]})
    assert error.what.startswith("job.modules: module nccl/9 cannot be loaded on ")
    assert asked.read_text() == "load gcc/12\nload openmpi/4\nload nccl/9\n"


def test_modules_are_not_asked_for_where_there_is_no_such_command(tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_config(tmp_path, job={"modules": ["cuda/12.4"]})
    if checks.has_modules():
        pytest.skip("this machine has modules")
    assert submit.submit(str(file)) == 0


def test_an_image_that_is_not_there(refused):
    error = refused(job={"container": {"runtime": "apptainer", "image": "/nothing.sif"}})
    assert error.what == "job.container.image: /nothing.sif does not exist"


def test_an_interpreter_that_is_none(refused):
    assert "job.python: /nothing is no program here" in refused("job.python=/nothing").what


LOW = {"GraceTime": "5", "PreemptMode": "REQUEUE", "Default": "NO"}
OTHER = {"GraceTime": "900", "PreemptMode": "OFF", "Default": "YES"}


@pytest.mark.parametrize(
    ("job", "kind", "warned"),
    [
        ({"partition": "low"}, "preempt/qos", True),
        ({"partition": "other,low"}, "preempt/partition_prio", True),
        ({"partition": "low"}, "preempt/none", False),
        ({"partition": "other"}, "preempt/partition_prio", False),
        ({}, "preempt/partition_prio", False),
        ({"partition": "low", "preempt_seconds": 600.0}, "preempt/partition_prio", False),
        ({"preempt_seconds": 1.0}, "preempt/none", True),
    ],
)
def test_a_preemption_too_short_for_a_save_is_warned_of(job, kind, warned, tmp_path, slurm, capsys):
    slurm.settings, slurm.partitions = {"PreemptType": kind}, {"low": LOW, "other": OTHER}
    file = write_config(tmp_path, job=job)
    assert submit.submit(str(file), ["job.storage_bytes_per_second=2000.0"]) == 0
    assert ("a preempted job is left" in capsys.readouterr().err) == warned


def test_a_run_that_is_never_saved_is_warned_of(tmp_path, slurm, capsys):
    assert submit.submit(str(write_config(tmp_path)), ["checkpoint.every=0"]) == 0
    assert "warning: checkpoint.every is 0" in capsys.readouterr().err


def test_the_size_of_a_checkpoint_is_that_of_values_and_moments(tmp_path):
    from titans_pretrain.plan import parameters

    config = run_config.load(write_config(tmp_path))
    assert checks.checkpoint_bytes(config) == 12 * parameters.count(config.model)
