"""A run that the cluster disturbs again and again ends with the bits of one left alone."""

import signal

import pytest
import torch
from disturbed_run import Run, prepare
from slurm_cluster import Cluster, until
from slurm_daemons import send, tasks

EVERY = 5
MOST_LOST = EVERY + 1  # training goes on while a checkpoint is written
PACE = 0.5
STEPS = 250
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"


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
    slurm.reconfigure(USER_SIGNAL)
    preemption(run, slurm)
    slurm.reconfigure("")


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


DISTURBANCES = [
    (preemption, "stopped"),
    (requeue, "stopped"),
    (told_crash, "failed killed"),
    (controller_restart, ""),
    (frozen_rank, "hang"),
    (preemption_by_user_signal, "stopped"),
    (frozen_node_that_thaws, "killed"),
    (time_limit, "stopped"),
    (killed_rank, "failed"),
    (untold_crash, "failed killed"),
    (signal_to_one_rank, "stopped"),
]
"""What happens, and how the attempt may end that it happens to; the controller ends none."""


def moves(run: Run) -> None:
    """Waits until the newest attempt has saved a checkpoint of its own and gone beyond it."""
    number = len(run.attempts)
    goal = run.attempts[-1].step_from + EVERY + 1 if number else EVERY + 1
    until(lambda: run.step >= goal, 240, f"step {goal} of attempt {number}")


def begins(run: Run, number: int) -> None:
    """Waits for the beginning of an attempt."""
    until(lambda: len(run.attempts) >= number, 240, f"attempt {number}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_disturbed_run_ends_with_the_bits_of_one_left_alone(slurm, tmp_path):
    manifest = prepare(tmp_path)
    runs = [
        Run(slurm, tmp_path / name, manifest, steps=STEPS, every=EVERY, nodes=2, partition="low",
            signal_seconds=30)
        for name in ("straight", "broken")
    ]  # fmt: skip
    straight, broken = runs
    straight.submit()
    straight.finish()
    assert len(straight.attempts) == 1

    broken.pace(PACE)
    broken.submit()
    begins(broken, 1)
    for disturb, verdicts in DISTURBANCES:
        broken.pace(PACE)
        moves(broken)
        number, step = len(broken.attempts), broken.step
        print(f"step {step}, attempt {number}: {disturb.__name__}", flush=True)
        disturb(broken, slurm)
        if verdicts:
            begins(broken, number + 1)
            ended, after = broken.attempts[number - 1 : number + 1]
            print(f"  {ended.line()}", flush=True)
            assert ended.verdict in verdicts.split()
            assert step - after.step_from <= MOST_LOST
    broken.pace(0)
    broken.finish()

    for attempt in broken.attempts:
        print(attempt.line())
        assert attempt.lost_steps <= MOST_LOST
    assert broken.rows() == straight.rows()
    assert [row["step"] for row in straight.rows()][-1] == STEPS
    expected, found = straight.tensors(), broken.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
