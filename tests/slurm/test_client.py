"""SLURM's client side against a real cluster, and every job file against its `--test-only`."""

import shlex
import sys
import threading
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until

from launchers import job, job_text, slurm_utils
from titans_pretrain import config
from titans_pretrain.errors import UserError

SECONDS = 90.0
RAW = {
    "model": {"preset": "titans-mac-170m"},
    "data": {"manifest": "/data/shards/manifest.json", "sequence_length": 4096},
    "train": {"steps": 10, "global_batch_size": 16, "learning_rate": 1e-3},
    "run": {"directory": "/runs/first"},
    "pipeline": {"data": {"input": ["/t/*.jsonl"], "tokenizer": "/t.model", "tasks": 8}},
}


@pytest.fixture
def script(tmp_path):
    """Writes a batch script of some commands."""

    def write(commands: str, *options: str, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.sbatch"
        head = [f"#SBATCH --{one}" for one in (f"job-name={name}", "time=5", *options)]
        log = f"#SBATCH --output={tmp_path}/%x-%A_%a.log --open-mode=append"
        path.write_text("\n".join(["#!/bin/bash", *head, log, commands, ""]))
        return path

    return write


def state(job_id: str) -> str:
    found = slurm_utils.job(job_id)
    return found.state if found else "none"


def reaches(job_id: str, *states: str) -> None:
    until(lambda: state(job_id) in states, SECONDS, f"{job_id} to be {' or '.join(states)}")


def whole(directory: Path = Path("/runs/first"), **section: object) -> config.RunConfig:
    raw = {**RAW, "job": section, "run": {"directory": str(directory)}}
    return config.resolve(raw, source="test")


def files(directory: Path = Path("/runs/first"), **section: object) -> dict[str, str]:
    """The texts of all jobs of a run."""
    run, frozen = whole(directory, **section), directory / "jobs" / "config.yaml"
    specs = {"train": job.training_spec(run, directory=directory, config_path=frozen)}
    for name in ("plan", "prepare", "merge", "export", "eval"):
        specs[name] = job.stage_spec(name, run, directory=directory, config_path=frozen)
    specs["sweep"] = job.sweep_spec(
        run, directory=directory, sweep_path=frozen, members=[0, 1, 4], at_once=2
    )
    return {name: job.text(spec) for name, spec in specs.items()}


def test_a_job_is_followed_from_the_queue_to_its_end(slurm: Cluster, script, tmp_path):
    submitted = slurm_utils.submit(
        script(f"until [ -e {tmp_path}/go ]; do sleep 0.1; done"), ["--hold"]
    )
    waiting = slurm_utils.job(submitted)
    assert (waiting.state, waiting.reason, waiting.name) == ("PENDING", "JobHeldUser", "mine")
    assert (waiting.nodelist, waiting.restarts, waiting.finished) == ("", 0, False)
    slurm.run("scontrol", "release", submitted)
    reaches(submitted, "RUNNING")
    running = slurm_utils.job(submitted)
    assert running.nodelist == running.batch_host
    assert running.nodelist in slurm.nodes
    assert 0 < running.seconds_left <= 300
    assert running.end_time - running.start_time == 300
    assert submitted in [one.id for one in slurm_utils.jobs()]
    (tmp_path / "go").touch()
    reaches(submitted, "COMPLETED")
    assert slurm_utils.job(submitted).finished


def test_failed_and_cancelled_jobs_are_told_apart(slurm: Cluster, script):
    failed = slurm_utils.submit(script("exit 3"))
    ended = slurm_utils.submit(script("sleep 60"))
    reaches(failed, "FAILED")
    assert slurm_utils.job(failed).reason == "NonZeroExitCode"
    slurm_utils.cancel(ended)
    reaches(ended, "CANCELLED")
    slurm_utils.cancel(ended)
    assert slurm_utils.job("999999") is None
    slurm_utils.cancel("999999")


def test_a_requeued_job_runs_again_and_counts_it(slurm: Cluster, script, tmp_path):
    told = f"echo $SLURM_RESTART_COUNT >>{tmp_path}/told; sleep 60"
    submitted = slurm_utils.submit(script(told, "requeue"))
    until(lambda: (tmp_path / "told").exists(), SECONDS, "the first run")
    slurm_utils.requeue(submitted)
    until(lambda: slurm_utils.job(submitted).restarts == 1, SECONDS, "the count")
    if slurm_utils.job(submitted).state == "PENDING":
        slurm_utils.requeue(submitted)
    until(lambda: len((tmp_path / "told").read_text().split("\n")) == 3, SECONDS, "the next run")
    assert (tmp_path / "told").read_text() == "\n1\n"
    with pytest.raises(slurm_utils.SlurmError, match="nvalid job id"):
        slurm_utils.requeue("999999")


def test_elements_of_an_array_are_jobs_of_their_own(slurm: Cluster, script, tmp_path):
    each = (
        f"{sys.executable} -P - <<'E' >{tmp_path}/$SLURM_ARRAY_TASK_ID\n"
        "import os\nfrom launchers import slurm_utils\n"
        "print(slurm_utils.allocation(os.environ).job)\nE\n"
        "[ $SLURM_ARRAY_TASK_ID != 1 ]"
    )
    submitted = slurm_utils.submit(script(each, "array=0-2"))
    for index, expected in enumerate(("COMPLETED", "FAILED", "COMPLETED")):
        reaches(f"{submitted}_{index}", expected)
        assert (tmp_path / str(index)).read_text().strip() == f"{submitted}_{index}"
    elements = slurm_utils.jobs([submitted])
    assert {one.id for one in elements} == {f"{submitted}_{index}" for index in range(3)}
    assert {one.array for one in elements} == {submitted}


@pytest.mark.slow
def test_a_waiting_array_is_listed_element_by_element(slurm: Cluster, script):
    submitted = slurm_utils.submit(script("true", "array=0-5%2"), ["--hold"])
    assert [one.id for one in slurm_utils.jobs([submitted])] == [
        f"{submitted}_{index}" for index in range(6)
    ]
    assert slurm_utils.job(f"{submitted}_4").state == "PENDING"


@pytest.mark.slow
def test_dependencies_hold_a_job_and_can_be_changed(slurm: Cluster, script):
    first = slurm_utils.submit(script("sleep 60", name="first"))
    second = slurm_utils.submit(script("sleep 60", name="second"))
    after = slurm_utils.dependency("afterok", [first])
    third = slurm_utils.submit(script("true", name="third"), [f"--dependency={after}"])
    assert first in slurm_utils.job(third).dependency
    slurm_utils.set_dependency(third, slurm_utils.dependency("afterany", [second]))
    assert second in slurm_utils.job(third).dependency
    assert first not in slurm_utils.job(third).dependency
    slurm_utils.cancel(second)
    reaches(third, "COMPLETED")
    assert state(first) == "RUNNING"


@pytest.mark.slow
def test_a_chain_behind_a_failure_ends_by_itself(slurm: Cluster, script):
    first = slurm_utils.submit(script("exit 2", name="first"))
    after = f"--dependency={slurm_utils.dependency('afterok', [first])}"
    second = slurm_utils.submit(script("true", "kill-on-invalid-dep=yes", name="second"), [after])
    reaches(second, "CANCELLED")


def test_a_signal_reaches_the_batch_script_alone_or_the_tasks(slurm: Cluster, script, tmp_path):
    wait = "while :; do sleep 0.1; done"
    body = (
        f"trap 'echo batch >>{tmp_path}/told' USR1\n"
        f"srun bash -c \"trap 'echo task >>{tmp_path}/told' USR1; touch {tmp_path}/up; {wait}\" &\n"
        f"{wait}"
    )
    submitted = slurm_utils.submit(script(body))
    until(lambda: (tmp_path / "up").exists(), SECONDS, "the step")
    told = tmp_path / "told"
    slurm_utils.cancel(submitted, signal="USR1", batch=True)
    until(told.exists, SECONDS, "the batch script to tell")
    assert told.read_text() == "batch\n"
    slurm_utils.cancel(submitted, signal="USR1")
    until(lambda: told.read_text() == "batch\ntask\n", SECONDS, "the task to tell")


@pytest.mark.slow
def test_a_controller_restart_is_waited_for(slurm: Cluster, script):
    kept = slurm_utils.submit(script("sleep 60"))
    reaches(kept, "RUNNING")
    slurm.controller_crash()
    later = threading.Timer(3.0, slurm.controller_boot)
    later.start()
    try:
        assert state(kept) == "RUNNING"
    finally:
        later.join()
    slurm.controller_crash()
    later = threading.Timer(3.0, slurm.controller_boot)
    later.start()
    try:
        new = slurm_utils.submit(script("true", name="new"))
    finally:
        later.join()
    reaches(new, "COMPLETED")
    assert len([one for one in slurm_utils.jobs() if one.name == "new"]) == 1


def test_a_job_submitted_from_a_job_inherits_nothing_of_it(slurm: Cluster, script, tmp_path):
    inner = script(f"env | grep -E '^SLURM_(ARRAY|RESTART)' >{tmp_path}/seen; touch {tmp_path}/end")
    command = (
        "import pathlib; from launchers import slurm_utils; "
        f"slurm_utils.submit(pathlib.Path({str(inner)!r}))"
    )
    body = f"{sys.executable} -P -c {shlex.quote(command)}"
    slurm_utils.submit(script(body, "array=3", name="outer"))
    until(lambda: (tmp_path / "end").exists(), SECONDS, "the inner job")
    assert (tmp_path / "seen").read_text() == ""


def test_hosts_are_scontrol_s(slurm: Cluster, tmp_path, monkeypatch):
    lists = ["gpu[003-006,9],login1", "r[1-2]n[03-04]", "a1,b[8-11]-ib", "x[098-101]"]
    by_slurm = [slurm_utils.hostnames(one) for one in lists]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert [slurm_utils.hostnames(one) for one in lists] == by_slurm


def test_the_partitions_grace_is_known(slurm: Cluster):
    assert slurm_utils.grace_seconds("low") == 5
    assert slurm_utils.grace_seconds("nowhere") is None


def test_slurm_takes_every_generated_file(slurm: Cluster, tmp_path):
    section = {
        "nodes": 2,
        "ranks_per_node": 8,
        "gpus_per_node": 8,
        "gpu_type": "h100",
        "cpus_per_rank": 12,
        "memory_per_node": "0",
        "time": "1-00:00:00",
        "partition": "main,low",
        "account": "research",
        "constraint": "h100",
        "exclude": [slurm.nodes[3]],
        "options": ["--exclusive", "--comment=it is mine"],
    }
    path = tmp_path / "x.sbatch"
    for text in files(**section).values():
        path.write_text(text)
        slurm_utils.test_only(path)


def test_slurm_takes_every_ready_file(slurm: Cluster):
    for path in job_text.READY.glob("*.sbatch"):
        slurm_utils.test_only(path, ["--nodes=2", "--ntasks-per-node=2"])


REFUSED = (
    ({"partition": "mian"}, "job.partition", "did you mean 'main'?"),
    ({"nodes": 5}, "job.nodes", "gives 4 at most"),
    ({"gpus_per_node": 8, "gpu_type": "a100"}, "job.gpu_type", "h100 x 8"),
    ({"gpus_per_node": 9}, "job.gpus_per_node", "h100 x 8"),
    ({"cpus_per_rank": 129}, "job.cpus_per_rank", "128 cores"),
    ({"memory_per_node": "9000G"}, "job.memory_per_node", "MB"),
    ({"constraint": "blue"}, "job.constraint", "Invalid feature"),
    ({"reservation": "weekend"}, "job.reservation", "weekend"),
    ({"exclude": ["nobody1"]}, "job.exclude", "nobody1"),
    ({"options": ["--never-heard-of"]}, "job.options", "never-heard-of"),
)


def test_what_slurm_would_not_run_is_refused_with_the_fix(slurm: Cluster, tmp_path):
    path = tmp_path / "x.sbatch"
    for section, where, told in REFUSED:
        path.write_text(files(**section)["train"])
        with pytest.raises(UserError) as caught:
            slurm_utils.test_only(path)
        assert caught.value.where == where
        assert told in str(caught.value)


def test_a_job_for_nodes_that_are_down_now_is_queued_with_a_word_about_it(slurm: Cluster, tmp_path):
    path = tmp_path / "x.sbatch"
    path.write_text(files(nodes=3)["train"])
    down = ",".join(slurm.nodes[:2])
    slurm.run("scontrol", "update", f"nodename={down}", "state=drain", "reason=test")
    try:
        (told,) = slurm_utils.test_only(path)
        assert told.startswith("2 nodes of partition main are down or drained now")
        assert state(slurm_utils.submit(path, ["--output=/dev/null"])) == "PENDING"
        path.write_text(files(nodes=3, gpus_per_node=9)["train"])
        with pytest.raises(UserError, match="no 3 nodes with it"):
            slurm_utils.test_only(path)
    finally:
        slurm.run("scontrol", "update", f"nodename={down}", "state=resume")


def test_a_user_s_jobs_are_listed_as_they_are_told_one_by_one(slurm: Cluster, script):
    array = slurm_utils.submit(script("true", "array=0-3%1", name="first"), ["--hold"])
    after = slurm_utils.dependency("afterok", [array])
    later = slurm_utils.submit(script("true", name="later"), [f"--dependency={after}"])
    listed = {one.id: one for one in slurm_utils.jobs()}
    found = slurm_utils.jobs([array, later])
    assert len(found) == 5
    assert [listed[one.id] for one in found] == found


@pytest.mark.slow
def test_more_time_than_the_partition_gives_is_refused(slurm: Cluster, tmp_path):
    path = tmp_path / "x.sbatch"
    path.write_text(files(partition="low", time="2:00:00")["train"])
    slurm_utils.test_only(path)
    slurm.run("scontrol", "update", "partition=low", "MaxTime=60")
    try:
        with pytest.raises(UserError, match="partition low gives 01:00:00"):
            slurm_utils.test_only(path)
    finally:
        slurm.run("scontrol", "update", "partition=low", "MaxTime=UNLIMITED")


def test_a_generated_file_runs_with_its_quoting_log_and_signal(slurm: Cluster, tmp_path):
    run = tmp_path / "my run 100% #1"
    (run / "logs").mkdir(parents=True)
    tell = tmp_path / "tell"
    tell.write_text('#!/bin/bash\necho "note=$NOTE"\nprintf "<%s>" "$@"\necho\n')
    tell.chmod(0o755)
    text = files(run, python=str(tell), environment={"NOTE": "it's $HOME `id`"})["train"]
    path = tmp_path / "train.sbatch"
    path.write_text(text)
    submitted = slurm_utils.submit(path)
    reaches(submitted, "COMPLETED")
    log = (run / "logs" / f"slurm-{submitted}.log").read_text()
    assert "note=it's $HOME `id`\n" in log
    assert f"<attempt><{run}/jobs/config.yaml>" in log


def test_a_missing_module_ends_the_job_with_the_user_s_code(slurm: Cluster, tmp_path):
    (tmp_path / "logs").mkdir()
    path = tmp_path / "train.sbatch"
    path.write_text(files(tmp_path, modules=["nowhere/1.0"])["train"])
    submitted = slurm_utils.submit(path)
    reaches(submitted, "FAILED")
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", submitted).stdout
    assert "job.modules: nowhere/1.0" in (tmp_path / f"logs/slurm-{submitted}.log").read_text()


def test_a_step_starts_its_ranks_node_by_node_with_all_gpus_in_sight(
    slurm: Cluster, script, tmp_path
):
    section = whole(
        nodes=2, ranks_per_node=2, gpus_per_node=8, gpu_type="h100", cpus_per_rank=3
    ).job
    tell = (
        "echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $SLURM_CPUS_PER_TASK $CUDA_VISIBLE_DEVICES"
    )
    words = job.step_command(section, ["bash", "-c", tell], nodes=2, tasks_per_node=2)
    asks = ("nodes=2", "ntasks-per-node=2", "cpus-per-task=3", "gpus-per-node=h100:8")
    submitted = slurm_utils.submit(script(shlex.join(words), *asks))
    reaches(submitted, "COMPLETED")
    assert sorted(slurm.log(submitted).splitlines()) == [
        f"{rank} {rank % 2} {rank // 2} 3 0,1,2,3,4,5,6,7" for rank in range(4)
    ]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_step(slurm: Cluster, script, tmp_path):
    section = whole(nodes=2).job
    tell = "[ $SLURM_PROCID = 0 ] && exit 7; exec sleep 3600"
    words = job.step_command(section, ["bash", "-c", tell], nodes=2, tasks_per_node=1)
    submitted = slurm_utils.submit(script(f"{shlex.join(words)}; echo ended $?", "nodes=2"))
    reaches(submitted, "COMPLETED")
    assert "ended 0" not in slurm.log(submitted)
    assert "ended" in slurm.log(submitted)
