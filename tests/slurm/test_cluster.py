"""The test cluster itself: it runs jobs as a real one, breaks on demand, and leaves nothing."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slurm_cluster import Cluster, ClusterError, free_cluster, missing, until
from slurm_daemons import HOSTS, add_names, daemons, remove_names, tasks

needs_isolation = "nodes share this host's names and processes here"
BEAT = """i=0
while sleep 0.1; do
    i=$((i+1))
    if [ $SLURM_PROCID = 0 ]; then echo $i > "$1"; fi
done"""


def beating(slurm: Cluster, path: Path, *options: str) -> str:
    """A job that counts up in a file for ever, from the first node's task."""
    body = path.with_suffix(".sh")
    body.write_text(f"#!/bin/bash\nsrun -N1 -n1 bash -c '{BEAT}' beat \"{path}\"\n")
    return slurm.submit("-o", path.with_suffix(".log"), "--time=9", *options, body)


def count(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


def beats(path: Path) -> None:
    before = count(path)
    until(lambda: count(path) not in (0, before), 60, f"{path} to change")


def test_runs_a_job_over_nodes_with_their_own_names_and_gpus(slurm, tmp_path):
    job = slurm.submit(
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=8", "-o", tmp_path / "log",
        "--wrap", "srun bash -c 'echo $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES'",
    )  # fmt: skip
    assert slurm.wait(job) == {"COMPLETED"}
    lines = sorted(line.split() for line in slurm.log(job).splitlines())
    first, second = slurm.nodes[:2]
    assert [line[0] for line in lines] == [first, first, second, second]
    assert {line[2] for line in lines} == {"0,1,2,3,4,5,6,7"}
    if slurm.isolated:
        assert all(line[0] == line[1] for line in lines)


def test_commands_of_the_test_find_this_cluster_and_no_outer_one(slurm):
    assert Path(os.environ["SLURM_CONF"]) == slurm.conf
    assert slurm.run("sinfo", "-h", "-o", "%D").stdout.split()[0] == "4"
    assert "SLURM_JOB_ID" not in os.environ


def test_a_failed_command_says_what_slurm_said(slurm):
    with pytest.raises(ClusterError, match="invalid partition"):
        slurm.submit("-p", "nowhere", "--wrap", "true")


def test_waiting_too_long_shows_the_job_and_its_log(slurm, tmp_path):
    job = slurm.submit("-o", tmp_path / "log", "--wrap", "echo I am here; sleep 60")
    slurm.wait_running(job)
    until(lambda: "here" in slurm.log(job), 30)
    assert "I am here" in slurm.story()
    assert "I am here" not in slurm.story(before=[job])
    assert "slurmctld.log" in slurm.story(before=[job])
    with pytest.raises(ClusterError, match=f"job {job} to end") as error:
        slurm.wait(job, seconds=0.1)
    assert any("I am here" in note and "RUNNING" in note for note in error.value.__notes__)


def test_node_names_resolve_and_each_node_has_a_directory_of_its_own(slurm, tmp_path):
    if not slurm.isolated:
        pytest.skip(needs_isolation)
    assert f"{slurm.addresses[slurm.nodes[0]]} {slurm.nodes[0]}\n" in HOSTS.read_text()
    command = f"echo $SLURMD_NODENAME > {slurm.scratch}/own; sleep 0.5; cat {slurm.scratch}/*"
    job = slurm.submit("-N2", "-o", tmp_path / "log", "--wrap", f"srun bash -c '{command}'")
    assert slurm.wait(job) == {"COMPLETED"}
    assert sorted(slurm.log(job).split()) == slurm.nodes[:2]
    slurm.reset()
    assert not list(slurm.directory.glob("local/*/*"))


@pytest.mark.slow
def test_an_array_runs_its_elements_with_a_bound(slurm, tmp_path):
    job = slurm.submit(
        "--array=0-5%2", "-o", tmp_path / "%a", "--wrap", "test $SLURM_ARRAY_TASK_ID != 3"
    )
    assert slurm.wait(job) == {"COMPLETED", "FAILED"}
    assert len(list(tmp_path.iterdir())) == 6


def test_power_loss_kills_everything_on_the_node_and_requeues_the_job(slurm, tmp_path):
    job = beating(slurm, tmp_path / "beat", "-N2")
    node = slurm.wait_running(job)[1]
    beats(tmp_path / "beat")
    assert slurm.node_processes(node)
    slurm.node_fail(node)
    assert slurm.node_processes(node) == []
    until(lambda: slurm.restarts(job) == 1, 30)
    assert node not in slurm.wait_running(job)  # within 60 s, SLURM's own hold is 121 s
    beats(tmp_path / "beat")
    slurm.node_boot(node)
    assert slurm.node_states()[node] == "idle"


def test_a_hung_node_stands_still_until_it_is_thawed(slurm, tmp_path):
    job = beating(slurm, tmp_path / "beat")
    (node,) = slurm.wait_running(job)
    beats(tmp_path / "beat")
    slurm.node_hang(node)
    stopped = count(tmp_path / "beat")
    time.sleep(0.5)  # five beats
    assert count(tmp_path / "beat") == stopped
    slurm.node_thaw(node)
    beats(tmp_path / "beat")


@pytest.mark.slow
def test_jobs_live_on_while_the_controller_is_dead(slurm, tmp_path):
    job = beating(slurm, tmp_path / "beat")
    slurm.wait_running(job)
    beats(tmp_path / "beat")
    slurm.controller_crash()
    assert slurm.run("squeue", check=False).returncode != 0
    beats(tmp_path / "beat")
    slurm.controller_boot()
    assert slurm.states(job) == {"RUNNING"}


TRAPS = """#!/bin/bash
trap 'echo batch USR1' USR1
srun --export=ALL bash -c 'trap "echo task TERM" TERM; for i in {1..300}; do sleep 0.1; done' &
while kill -0 %1 2>/dev/null; do wait; done
"""


@pytest.mark.slow
@pytest.mark.parametrize("user_signal", [False, True])
def test_preemption_tells_the_tasks_or_the_batch_shell_by_the_sites_choice(
    slurm, tmp_path, user_signal
):
    if user_signal:
        slurm.reconfigure("SlurmctldParameters=preempt_send_user_signal")
    (tmp_path / "job").write_text(TRAPS)
    low = slurm.submit(
        "-p", "low", "-N4", "--exclusive", "--signal=B:USR1@10", "--open-mode=append",
        "-o", tmp_path / "log", tmp_path / "job",
    )  # fmt: skip
    slurm.wait_running(low)
    high = slurm.submit("-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    told = "batch USR1" if user_signal else "task TERM"
    until(lambda: told in slurm.log(low), 10, told)
    if user_signal:
        assert "task TERM" not in slurm.log(low)
    assert slurm.wait(high) == {"COMPLETED"}
    until(lambda: slurm.restarts(low) == 1, 60)


def test_settings_are_back_after_a_reset(slurm):
    slurm.reconfigure("SlurmctldParameters=preempt_send_user_signal")
    assert "preempt_send_user_signal" in slurm.run("scontrol", "show", "config").stdout
    slurm.reset()
    assert "preempt_send_user_signal" not in slurm.run("scontrol", "show", "config").stdout


@pytest.mark.slow
def test_a_reset_ends_jobs_and_brings_back_nodes_and_controller(slurm, tmp_path):
    job = beating(slurm, tmp_path / "beat")
    (node,) = slurm.wait_running(job)
    slurm.node_hang(node)
    slurm.node_fail(slurm.nodes[-1])
    slurm.node_crash(slurm.nodes[-2])
    slurm.controller_crash()
    slurm.reset()
    assert set(slurm.node_states().values()) == {"idle"}
    assert slurm.states(job) == {"CANCELLED"}
    assert all(slurm.node_processes(name) for name in slurm.nodes)


@pytest.mark.slow
def test_instances_live_side_by_side_and_leave_nothing(slurm, new_cluster, tmp_path):
    other = new_cluster(nodes=2, extra="SlurmctldParameters=preempt_send_user_signal")
    assert not set(other.nodes) & set(slurm.nodes)
    jobs = [
        each.submit("-N2", "-o", tmp_path / each.prefix, "--wrap", "srun hostname")
        for each in (slurm, other)
    ]
    assert len(set(jobs)) == 2
    assert slurm.wait(jobs[0]) == other.wait(jobs[1]) == {"COMPLETED"}
    other.stop()
    assert not other.directory.exists()
    assert not daemons(other.logs)
    assert f"{other.directory} " not in HOSTS.read_text()
    assert f"{slurm.addresses[slurm.nodes[0]]} {slurm.nodes[0]}\n" in HOSTS.read_text()
    assert set(slurm.node_states().values()) == {"idle"}


@pytest.mark.slow
def test_works_without_namespaces(new_cluster, tmp_path):
    cluster = new_cluster(nodes=2, isolate=False)
    job = beating(cluster, tmp_path / "beat", "-N2")
    nodes = cluster.wait_running(job)
    beats(tmp_path / "beat")
    cluster.node_hang(nodes[0])
    stopped = count(tmp_path / "beat")
    time.sleep(0.5)
    assert count(tmp_path / "beat") == stopped
    cluster.node_thaw(nodes[0])
    beats(tmp_path / "beat")
    cluster.node_fail(nodes[0])
    assert cluster.node_processes(nodes[0]) == []
    assert cluster.node_processes(nodes[1])
    stopped = count(tmp_path / "beat")
    time.sleep(0.5)
    assert count(tmp_path / "beat") == stopped
    cluster.stop()
    assert not tasks(cluster.conf)


ORPHAN = """
import sys, time
sys.path.insert(0, {here!r})
from slurm_cluster import free_cluster
cluster = free_cluster(nodes=1, isolate={isolate})
cluster.start()
print(cluster.submit("-o", "/dev/null", "--wrap", "srun sleep 1000"), flush=True)
print(cluster.directory, cluster._guard.pid, flush=True)
time.sleep(1000)
"""


@contextmanager
def orphaned(isolate: bool | None, number: signal.Signals, *, guarded: bool) -> Iterator[Path]:
    """An instance's directory, its process just killed."""
    if reason := missing():
        pytest.skip(reason)
    code = ORPHAN.format(here=str(Path(__file__).parent), isolate=isolate)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as left:
        left.stdout.readline()
        directory, guard = left.stdout.readline().split()
        if not guarded:
            os.kill(int(guard), signal.SIGKILL)
        left.send_signal(number)
    yield Path(directory)
    assert not daemons(Path(directory, "log"))
    assert not tasks(Path(directory, "slurm.conf"))
    assert not Path(directory).exists()
    assert directory not in HOSTS.read_text()


@pytest.mark.parametrize(
    ("isolate", "number"),
    [(None, signal.SIGTERM), pytest.param(False, signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_an_instance_goes_with_the_process_that_started_it(isolate, number):
    with orphaned(isolate, number, guarded=True) as directory:
        lock = directory.with_suffix(".lock")
        until(lambda: not directory.exists() and not lock.exists(), 60, "all to be cleaned up")


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [None, False])
def test_an_instance_left_by_a_killed_test_run_is_cleaned_by_the_next(isolate):
    with orphaned(isolate, signal.SIGKILL, guarded=False) as directory:
        assert daemons(directory / "log")
        free_cluster().release()


def test_a_cluster_in_use_is_left_alone(slurm):
    twin = Cluster(slurm.directory, slurm.port, slurm.prefix)
    with pytest.raises(ClusterError, match="belongs to a running process"):
        twin.start()
    free = free_cluster()
    free.release()
    assert free.directory != slurm.directory
    assert set(slurm.node_states().values()) == {"idle"}


def test_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("slurm_commands.SYSTEM_PATH", str(tmp_path))
    assert "sbatch" in missing()
    assert "apt-get install slurm-wlm munge" in missing()


def test_says_that_root_is_needed(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in missing()


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 localhost\n")
    path.chmod(0o640)
    monkeypatch.setattr("slurm_daemons.HOSTS", path)
    monkeypatch.setattr("slurm_daemons.PLACE", tmp_path)
    return path


def test_the_hosts_file_is_whole_at_every_moment(hosts, monkeypatch):
    real, seen = Path.write_text, []

    def write_text(path, text):
        seen.append(hosts.read_text() if path != hosts else "written in place")
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    add_names(Path("/tmp/x"), {"node1": "127.0.1.1"})
    assert seen == ["127.0.0.1 localhost\n"]
    assert hosts.read_text().splitlines()[2] == "127.0.1.1 node1"
    assert hosts.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in hosts.parent.iterdir()] == ["hosts"]


def test_a_hosts_file_that_cannot_be_replaced_is_written_in_place(hosts, monkeypatch):
    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(Path, "replace", busy)
    add_names(Path("/tmp/x"), {"node1": "127.0.1.1"})
    assert "node1" in hosts.read_text()
    remove_names(Path("/tmp/x"))
    assert hosts.read_text() == "127.0.0.1 localhost\n"
    assert [path.name for path in hosts.parent.iterdir()] == ["hosts"]


def test_instances_and_locks_are_in_one_place_whatever_tmpdir_is(monkeypatch, tmp_path):
    if reason := missing():
        pytest.skip(reason)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cluster = free_cluster()
    cluster.release()
    assert cluster.directory.parent == Path("/tmp")


def test_a_job_that_names_no_log_leaves_none_here(slurm):
    job = slurm.submit("--wrap", "true")
    assert slurm.wait(job) == {"COMPLETED"}
    assert not Path(f"slurm-{job}.out").exists()
    assert (slurm.directory / f"slurm-{job}.out").exists()


def test_the_machines_own_slurm_conf_is_left_alone(slurm):
    own = Path("/etc/slurm/slurm.conf")
    assert not own.is_symlink() or Path(os.readlink(own)) != slurm.conf
