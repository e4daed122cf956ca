"""A run that the cluster disturbs again and again ends with the bits of one left alone."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from disturbed_run import Run
from slurm_cluster import Cluster, until
from slurm_daemons import send, tasks
from tiny import prepare

EVERY = 5
PACE = 0.5
SETTINGS = """\
PartitionName=patient Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60
UnkillableStepTimeout=300
"""
"""Preempted jobs have the time that ranks need on a busy machine; and a node whose neighbour is
frozen is not drained after a minute."""
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"

Disturbance = Callable[[Run, Cluster], None]


def preemption(run: Run, slurm: Cluster) -> None:
    """A job of a higher partition takes the run's nodes."""
    nodes = ",".join(run.nodes)
    urgent = slurm.submit(
        "-p", "high", f"-N{len(run.nodes)}", "-w", nodes, "--exclusive", "-o", "/dev/null",
        "--wrap", "true",
    )  # fmt: skip
    assert slurm.wait(urgent) == {"COMPLETED"}


def preemption_by_user_signal(run: Run, slurm: Cluster) -> None:
    """The same on a site that sends --signal to the batch script and the ranks nothing."""
    slurm.reconfigure(f"{SETTINGS}{USER_SIGNAL}")
    preemption(run, slurm)
    slurm.reconfigure(SETTINGS)


def time_limit(run: Run, slurm: Cluster) -> None:
    """The end of the job's time comes near; --signal=B:USR1@30 goes out half a minute before."""
    run.pace(3 * PACE)
    slurm.run("scontrol", "update", f"jobid={run.job}", "EndTime=now+75")


def requeue(run: Run, slurm: Cluster) -> None:
    slurm.run("scontrol", "requeue", run.job)


def told_crash(run: Run, slurm: Cluster) -> None:
    """The last node loses its power, and the controller is told."""
    node = run.nodes[-1]
    slurm.node_fail(node)
    slurm.node_boot(node)


def untold_crash(run: Run, slurm: Cluster) -> None:
    """The batch host loses its power; SLURM has to notice by itself."""
    node, job = run.nodes[0], run.job
    restarts = slurm.restarts(job)
    slurm.node_crash(node)
    until(lambda: slurm.restarts(job) > restarts, 120, "SLURM to notice the crash")
    slurm.node_boot(node)


def controller_restart(run: Run, slurm: Cluster) -> None:
    """The controller dies and comes back; the attempt goes on as if nothing had been."""
    slurm.controller_crash()
    before = run.step
    until(lambda: run.step > before, 60, "steps without a controller")
    slurm.controller_boot()


def frozen_rank(run: Run, slurm: Cluster) -> None:
    """A rank stands still; the others' watch finds it."""
    pids = run.rank_processes(1)
    assert pids
    send(pids, signal.SIGSTOP)


def killed_rank(run: Run, slurm: Cluster) -> None:
    pids = run.rank_processes(1)
    assert pids
    send(pids, signal.SIGKILL)


def signal_to_one_rank(run: Run, slurm: Cluster) -> None:
    """One rank alone gets SIGUSR2; all agree to stop."""
    send(run.rank_processes(1)[:1], signal.SIGUSR2)


def frozen_node_that_thaws(run: Run, slurm: Cluster) -> None:
    """The batch host with rank 0 hangs, is given up, and writes late, into its successor's run."""
    node, number = run.nodes[0], len(run.attempts)
    slurm.node_hang(node)
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=frozen by a test")
    begins(run, number + 1)
    moves(run)
    slurm.node_thaw(node)
    slurm.node_boot(node)
    until(lambda: not tasks(slurm.conf, node), 120, "the late processes to end")
    before = run.step
    until(lambda: run.step > before + 1, 240, "the successor to go on")


EXPECTED: dict[Disturbance, str] = {
    frozen_node_that_thaws: "killed",
    time_limit: "stopped",
    killed_rank: "failed",
    untold_crash: "failed killed",
    signal_to_one_rank: "stopped",
    preemption: "stopped",
    requeue: "stopped",
    told_crash: "failed killed",
    controller_restart: "",
    frozen_rank: "hang",
    preemption_by_user_signal: "stopped",
}
"""How the attempt may end that a disturbance happens to; the controller's restart ends none."""


def moves(run: Run, beyond: int = 1) -> None:
    """Waits until the newest attempt is so many steps beyond a checkpoint of its own."""
    begun = run.attempts[-1].step_from
    goal = begun + EVERY - begun % EVERY + beyond
    until(lambda: run.step >= goal and run.step % EVERY == beyond, 240, f"step {goal}")


def begins(run: Run, number: int) -> None:
    """Waits for the beginning of an attempt."""
    until(lambda: len(run.attempts) >= number, 240, f"attempt {number}")


def disturbed(
    run: Run, slurm: Cluster, disturb: Disturbance, *, beyond: int, most_lost: int
) -> str:
    """Disturbs a run so many steps beyond a checkpoint; what that cost, in words."""
    run.pace(PACE)
    moves(run, beyond)
    number, begun = len(run.attempts), time.monotonic()
    print(f"step {run.step}, attempt {number}, {disturb.__name__}", end=": ", flush=True)
    disturb(run, slurm)
    if not EXPECTED[disturb]:
        assert len(run.attempts) == number
        return "the attempt goes on"
    begins(run, number + 1)
    ended = run.attempts[number - 1]
    assert ended.verdict in EXPECTED[disturb].split(), ended.line()
    assert ended.lost_steps <= most_lost, ended.line()
    after = f"the next attempt began within {time.monotonic() - begun:.0f} s"
    return f"{ended.verdict}, {ended.lost_steps} steps lost, {after}"


def compare(
    slurm: Cluster,
    place: Path,
    disturbances: Sequence[Disturbance],
    *,
    steps: int,
    most_lost: int,
    **settings: object,
) -> None:
    """Trains one run in peace and one with disturbances, and compares what they leave."""
    slurm.reconfigure(SETTINGS)
    manifest = prepare(place)
    settings |= {"nodes": 2, "partition": "patient", "signal_seconds": 30}
    straight, broken = (
        Run(slurm, place / name, manifest, steps=steps, every=EVERY, **settings)
        for name in ("straight", "broken")
    )
    with straight.left_alone() as ended:
        broken.pace(PACE)
        broken.submit()
        begins(broken, 1)
        for number, disturb in enumerate(disturbances):
            beyond = 1 + number % (EVERY - 1)  # not while it saves: that may take half an hour
            print(disturbed(broken, slurm, disturb, beyond=beyond, most_lost=most_lost), flush=True)
        broken.pace(0)
        broken.finish()
        assert ended() == 0
    assert len(broken.attempts) == 1 + sum(bool(EXPECTED[disturb]) for disturb in disturbances)
    assert broken.rows() == straight.rows()
    assert straight.steps_done == list(range(1, steps + 1))
    expected, found = straight.tensors(), broken.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preempted_run_that_loses_a_node_ends_with_the_bits_of_one_left_alone(slurm, tmp_path):
    most_lost = 2 * EVERY  # a save that goes on beside the training is whole before the next one
    compare(slurm, tmp_path, [preemption, told_crash], steps=20, most_lost=most_lost)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_disturbance_costs_the_steps_since_the_last_save_at_most(slurm, tmp_path):
    settings = {"asynchronous": False}  # so that the last save is whole when training goes on
    compare(slurm, tmp_path, list(EXPECTED), steps=200, most_lost=EVERY, **settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_of_several_ranks_end_with_the_same_bits(slurm, tmp_path):
    disturbances = [told_crash, frozen_rank, preemption_by_user_signal]
    settings = {"ranks_per_node": 2}
    compare(slurm, tmp_path, disturbances, steps=60, most_lost=2 * EVERY, **settings)
