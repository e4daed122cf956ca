"""``titans doctor``: what it looks at on a login node, and what it says of it."""

import json
import os

import pytest
from submit_cases import FakeSlurm, write_config

from launchers import doctor, slurm_utils
from titans_pretrain import cli
from titans_pretrain.errors import TitansError

PARTITION = {
    "Default": "YES",
    "MaxTime": "1-00:00:00",
    "GraceTime": "30",
    "PreemptMode": "REQUEUE",
    "TotalNodes": "4",
    "State": "UP",
}
SETTINGS = {"ClusterName": "big", "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A healthy site: its partitions, settings, GPUs and interpreter, to be spoiled."""
    fake = FakeSlurm()
    fake.install(monkeypatch)
    fake.partitions = {"main": dict(PARTITION)}
    fake.settings, fake.found = dict(SETTINGS), "main|gpu:h100:8(S:0-1)"
    fake.packages = {"python": "3.11.7", "torch": "2.9.0"}
    fake.python = tmp_path / "python3"
    fake.python.write_text(f'#!/bin/sh\necho noise\ncat "{tmp_path}/packages.json"\n')
    fake.python.chmod(0o755)
    monkeypatch.setattr(slurm_utils, "version", lambda: (23, 11))
    monkeypatch.setattr(doctor, "call", lambda command, **more: fake.found)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def diagnosis(site, tmp_path, capsys):
    """``diagnosis(override…, section={…})``: exit code and lines, as (level, what, fix)."""

    def look(*overrides, config=True, **sections):
        (tmp_path / "packages.json").write_text("\n" + json.dumps(site.packages))
        job = {"python": str(site.python)} | sections.pop("job", {})
        words = [str(write_config(tmp_path, job=job, **sections)), *overrides] if config else []
        code = cli.main(["doctor", *words])
        return code, capsys.readouterr().out

    return look


def test_a_healthy_site_is_fit(diagnosis):
    code, told = diagnosis("job.gpus_per_node=8", "job.partition=main")
    assert code == 0
    assert "\nok    job: fits partition main\n" in told
    assert "\nok    job: SLURM would run it\n" in told
    assert "ok    torch: 2.9.0" in told
    assert (
        "ok    partition main (default): 4 nodes, time at most 1-00:00:00, grace 30 s, "
        "preempted jobs: requeue, up, 8 GPUs a node (h100)" in told
    )
    assert " 0 fail" in told.splitlines()[-1]


def test_without_a_configuration_it_looks_at_the_site_alone(diagnosis, site, monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", str(site.python))
    code, told = diagnosis(config=False)
    assert code == 0
    assert "run.directory" not in told


def test_a_host_without_slurm(diagnosis, site, monkeypatch):
    monkeypatch.setattr(slurm_utils, "available", lambda: False)
    code, told = diagnosis()
    assert code == 1
    assert "fail  SLURM: no sbatch and scontrol on PATH" in told


def test_a_controller_that_does_not_answer(diagnosis, monkeypatch):
    def silent():
        raise TitansError("SLURM does not answer", fix="see scontrol ping")

    monkeypatch.setattr(slurm_utils, "settings", silent)
    code, told = diagnosis()
    assert code == 1
    assert "fail  SLURM: SLURM does not answer\n      fix: see scontrol ping" in told


def test_one_partition_of_several_that_fits_will_do(diagnosis, site):
    site.partitions["debug"] = PARTITION | {"MaxTime": "00:30:00"}
    site.found = "main|gpu:h100:8\ndebug|gpu:h100:8"
    code, told = diagnosis("job.partition=main,debug")
    assert code == 0
    assert "warn  job.time: 1:00:00 exceeds 00:30:00 of debug" in told
    assert diagnosis("job.partition=debug")[0] == 1


def test_a_quality_of_service_may_lift_the_partition_s_time(diagnosis):
    code, told = diagnosis("job.time=2-0", "job.qos=long")
    assert code == 0
    assert "warn  job.time: 2-0 exceeds 1-00:00:00 of main" in told


def test_why_the_job_may_wait_is_told(diagnosis, site):
    site.waits = ["2 nodes are down"]
    code, told = diagnosis()
    assert code == 0
    assert "warn  train: 2 nodes are down" in told
    assert "SLURM would run it" not in told


def test_an_old_slurm_is_warned_of(diagnosis, monkeypatch):
    monkeypatch.setattr(slurm_utils, "version", lambda: (19, 5))
    assert "warn  SLURM: 19.05" in diagnosis()[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"PreemptType": "preempt/none"}, "ok    preemption: none"),
        ({"PreemptMode": "CANCEL"}, "warn  preemption: preempt/partition_prio, mode CANCEL"),
        ({"SlurmctldParameters": "a,preempt_send_user_signal"}, "sends the job's own signal"),
        ({}, "sends SIGTERM to the ranks"),
    ],
)
def test_how_the_site_preempts(settings, told, diagnosis, site):
    site.settings |= settings
    assert told in diagnosis()[1]


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["job.partition=mian"], "job.partition: no 'mian'", "did you mean 'main'?"),
        (["job.nodes=5"], "job.nodes: 5, main has 4", "use job.nodes=4 or fewer"),
        (["job.time=2-0"], "job.time: 2-0 exceeds 1-00:00:00 of main", "use job.time=1-00:00:00"),
        (["job.gpus_per_node=9"], "a node of main has 8 h100", "ask for those"),
        (["job.gpus_per_node=1", "job.gpu_type=a100"], "job.gpus_per_node: 1 a100", "ask for"),
    ],
)
def test_what_does_not_fit_the_partition(overrides, what, fix, diagnosis):
    code, told = diagnosis(*overrides, train={"global_batch_size": 60})
    assert code == 1
    assert f"fail  {what}" in told or what in told
    assert fix in told


def test_a_site_without_a_default_partition(diagnosis, site):
    site.partitions["main"]["Default"] = "NO"
    code, told = diagnosis()
    assert code == 1
    assert "job.partition: none given, and the site has no default" in told


def test_a_package_that_does_not_import(diagnosis, site):
    site.packages["deepspeed"] = "! ImportError: libaio"
    code, told = diagnosis()
    assert code == 1
    assert "fail  deepspeed: ImportError: libaio" in told
    assert f"fix: install it for {site.python}" in told


@pytest.mark.parametrize("text", ["exit 3", "echo nothing", "echo", "echo '[1]'", "echo {}"])
def test_an_interpreter_that_gives_no_answer(text, diagnosis, site):
    site.python.write_text(f"#!/bin/sh\n{text}\n")
    code, told = diagnosis()
    assert code == 1
    assert f"fail  {site.python}: cannot be asked" in told


def test_the_real_question_is_answered_by_a_real_interpreter(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("json", "no_such_package"))
    found = list(doctor._python(doctor.JobSection()))
    assert [one.level for one in found] == ["ok", "ok", "fail"]
    assert "ModuleNotFoundError" in found[-1].what


def test_a_key_of_wandb_is_told_of_and_never_shown(diagnosis, monkeypatch, tmp_path):
    run = {"run": {"wandb_project": "p"}}
    assert "warn  wandb: no key, the run logs offline" in diagnosis(**run)[1]
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    told = diagnosis(**run)[1]
    assert "ok    wandb: a key is set" in told
    assert "s3cret" not in told
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    told = diagnosis(**run)[1]
    assert "ok    wandb: a key is set" in told
    assert "s3cret" not in told


@pytest.mark.parametrize(
    ("mounts", "level"),
    [("/dev/a / ext4 rw 0 0\n", "warn"), ("/dev/a / ext4 rw 0 0\nfs / lustre rw 0 0\n", "ok")],
)
def test_a_disk_of_this_host_is_warned_of(mounts, level, diagnosis, tmp_path, monkeypatch):
    place = tmp_path / "mounts"
    place.write_text(mounts)
    monkeypatch.setattr(doctor, "MOUNTS", place)
    assert f"\n{level:4}  run.directory: " in diagnosis()[1]


def test_a_directory_that_is_a_file(diagnosis, tmp_path):
    (tmp_path / "file").touch()
    code, told = diagnosis(run={"directory": str(tmp_path / "file" / "run")})
    assert code == 1
    assert "file cannot be written" in told


@pytest.mark.parametrize(
    ("runtime", "found", "told"),
    [
        ("pyxis", "  --container-image=x", "ok    container: srun knows pyxis"),
        ("pyxis", "nothing", "fail  container: srun has no --container-image"),
        ("apptainer", "", "warn  container: no apptainer on this host"),
    ],
)
def test_the_runtime_of_the_container(runtime, found, told, diagnosis, site, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    answers = {"srun": found, "sinfo": site.found}
    monkeypatch.setattr(doctor, "call", lambda command, **more: answers[command[0]])
    container = {"runtime": runtime, "image": "image"}
    assert told in diagnosis(job={"container": container})[1]


def test_ports_that_outgoing_connections_take_are_warned_of(diagnosis, tmp_path, monkeypatch):
    place = tmp_path / "range"
    place.write_text("20000 60999\n")
    monkeypatch.setattr(doctor, "PORT_RANGE", place)
    assert "outgoing begin at 20000: a start may find its port taken" in diagnosis()[1]


def test_a_bad_configuration_is_the_users_mistake(diagnosis, capsys):
    assert diagnosis("job.nodse=2")[0] == 2


def test_what_submit_refuses_the_doctor_tells(diagnosis):
    code, told = diagnosis("job.nodes=3")
    assert code == 1
    assert "fail  train.global_batch_size: 4 is no multiple" in told


def test_the_environment_is_left_as_it_was(diagnosis):
    before = dict(os.environ)
    diagnosis()
    assert dict(os.environ) == before
