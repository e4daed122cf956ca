"""What follows an attempt's end, as a table."""

import pytest

from launchers.history import Attempt
from launchers.policy import Outcome, decide, fruitless
from titans_pretrain.config_job import JobSection

POLICY = JobSection(restarts=3)


def attempt(number, *, progress=False, asked="", suspects=(), job="7", next_job="7"):
    return Attempt(
        number=number,
        job=job,
        restart=number - 1,
        host="a1",
        nodes=("a1", "a2"),
        begun=0.0,
        ended=1.0,
        step_from=5,
        step_to=6 if progress else 5,
        verdict="failed",
        asked=asked,
        suspects=tuple(suspects),
        next_job=next_job,
    )


FAILED = [attempt(1), attempt(2)]

TABLE = [
    # verdict, asked, progress, suspects, before, on_stop -> action, exit code
    ("done", "", True, (), [], "requeue", "finish", 0),
    ("done", "limit", True, (), FAILED, "exit", "finish", 0),
    ("refused", "", False, (), [], "requeue", "end", 2),
    ("refused", "", False, ("a2",), FAILED, "exit", "end", 2),
    ("stopped", "user", True, (), [], "requeue", "end", 75),
    ("stopped", "user", False, (), FAILED, "requeue", "end", 75),
    ("stopped", "limit", True, (), FAILED, "requeue", "requeue", 75),
    ("stopped", "limit", True, (), [], "exit", "end", 75),
    ("stopped", "limit", False, (), FAILED, "requeue", "end", 1),
    ("stopped", "preempted", True, (), [], "requeue", "requeue", 75),
    ("stopped", "preempted", True, (), [], "exit", "end", 75),
    ("stopped", "preempted", False, (), [attempt(1)], "requeue", "requeue", 75),
    ("failed", "", False, (), [], "requeue", "requeue", 75),
    ("failed", "", False, (), FAILED, "requeue", "end", 1),
    ("failed", "", True, (), FAILED, "requeue", "requeue", 75),
    ("failed", "", True, (), [], "exit", "end", 1),
    ("hang", "", False, ("a2",), [], "requeue", "resubmit", 75),
    ("hang", "", False, (), [], "requeue", "requeue", 75),
    ("hang", "", False, ("a2",), FAILED, "requeue", "end", 1),
    ("hang", "", True, ("a2",), [], "exit", "end", 75),
    ("bad node", "", False, ("a2",), [], "requeue", "resubmit", 75),
    ("bad node", "", False, ("a2",), [], "exit", "end", 1),
    ("killed", "", False, (), [], "requeue", "requeue", 75),
]


@pytest.mark.parametrize(
    ("verdict", "asked", "progress", "suspects", "before", "on_stop", "action", "code"), TABLE
)
def test_what_follows(verdict, asked, progress, suspects, before, on_stop, action, code):
    outcome = Outcome(verdict, "why", asked, progress, suspects)
    policy = JobSection(restarts=3, on_stop=on_stop)
    decision = decide(outcome, before, policy, current="7", spare=4)
    assert (decision.action, decision.exit_code) == (action, code)
    assert "why" in decision.reason


@pytest.mark.parametrize("restarts", [1, 2, 5])
def test_as_many_attempts_in_a_row_may_save_nothing_as_the_policy_says(restarts):
    before = []
    for number in range(1, restarts + 1):
        outcome = Outcome("failed", "why")
        decision = decide(outcome, before, JobSection(restarts=restarts), current="7")
        assert decision.action == ("end" if number == restarts else "requeue")
        before.append(attempt(number))
    assert f"{restarts} attempts in a row saved nothing new: why" in decision.reason


def test_at_the_cap_a_time_limit_is_told_with_what_mends_it():
    outcome = Outcome("stopped", "SIGUSR1", "limit")
    decision = decide(outcome, FAILED, POLICY, current="7")
    assert decision.exit_code == 1
    assert "the time limit came before a checkpoint was saved" in decision.reason
    for key in ("job.time", "job.signal_seconds", "checkpoint.every"):
        assert key in decision.fix
    assert "job.time" not in decide(Outcome("failed", "why"), FAILED, POLICY, current="7").fix


def test_a_preemption_neither_counts_nor_ends_the_row():
    before = [attempt(1), attempt(2, asked="preempted"), attempt(3)]
    assert fruitless(before, "7") == 2
    assert fruitless(before, "7", Outcome("stopped", "", "preempted")) == 2


def test_an_attempt_that_saved_something_begins_the_row_anew():
    before = [attempt(1), attempt(2, progress=True), attempt(3)]
    assert fruitless(before, "7") == 1
    assert fruitless(before, "7", Outcome("failed", "", progress=True)) == 0


def test_a_job_that_the_user_submits_begins_the_row_anew_one_that_an_attempt_submits_does_not():
    before = [attempt(1), attempt(2, next_job="8"), attempt(3, job="8", next_job="9")]
    assert fruitless(before, "9") == 3
    assert fruitless(before, "10") == 0


def test_all_nodes_ever_suspected_are_left_out_while_there_are_enough():
    before = [attempt(1, suspects=["a1", "a2"]), attempt(2, progress=True, suspects=["a3"])]
    outcome = Outcome("hang", "why", suspects=("a1",))
    chosen = [decide(outcome, before, POLICY, current="7", spare=n).exclude for n in range(5)]
    everything = ("a2", "a3", "a1")
    assert chosen == [(), ("a1",), ("a3", "a1"), everything, everything]


def test_without_a_node_to_spare_the_same_job_goes_on():
    outcome = Outcome("hang", "why", suspects=("a1",))
    assert decide(outcome, [], POLICY, current="7", spare=0).action == "requeue"
