"""How an attempt ended, from its records and its step's end."""

from dataclasses import replace

import pytest
from attempt_parts import checkpoint

from launchers import judge, policy
from launchers.judge import Situation
from launchers.preflight_types import Problem
from launchers.steps import StepEnd
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.errors import UserError
from titans_pretrain.files import write_json

SITUATION = Situation(2, 5, 9, "limit", ["a1", "a2.site"])


def error(code, what="it broke", **more):
    return {"attempt": 2, "rank": 3, "host": "a2", "what": what, "exit_code": code} | more


def test_success_needs_the_last_checkpoint_whatever_srun_says(run):
    done = {"attempt": 2, "outcome": "done", "asked_by": "", "reason": ""}
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"
    write_json(run.outcome, done)
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"
    path = checkpoint(run, 9)
    assert judge.outcome(run, SITUATION, StepEnd(1)).verdict == "done"
    (path / layout.TENSORS).write_text("cut")
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"


def test_records_of_another_attempt_do_not_count(run):
    stop = {"attempt": 1, "outcome": "stopped", "asked_by": "file", "reason": ""}
    write_json(run.outcome, stop)
    write_json(run.error, error(2, attempt=1))
    assert judge.outcome(run, SITUATION, StepEnd(137)).verdict == "failed"


@pytest.mark.parametrize(("by", "asked"), [("file", "user"), ("signal", "limit")])
def test_a_stop_is_the_users_or_slurms(run, by, asked):
    write_json(run.outcome, {"attempt": 2, "outcome": "stopped", "asked_by": by, "reason": "so"})
    checkpoint(run, 6)
    outcome = judge.outcome(run, SITUATION, StepEnd(75))
    assert (outcome.verdict, outcome.asked, outcome.progress) == ("stopped", asked, True)


@pytest.mark.parametrize(("code", "verdict"), [(1, "failed"), (2, "refused"), (75, "hang")])
def test_an_error_of_a_rank_tells_what_it_is(run, code, verdict):
    write_json(run.error, error(code))
    outcome = judge.outcome(run, SITUATION, StepEnd(137, why="it goes on"))
    assert outcome.verdict == verdict
    assert "rank 3 on a2: it broke" in outcome.reason
    assert outcome.suspects == (("a2.site",) if code == 75 else ())


@pytest.mark.parametrize(
    ("code", "first"), [(2, ""), (143, "srun: error: a2: task 3: Exited with exit code 2")]
)
def test_ranks_that_refuse_before_their_log_is_open_are_understood(run, code, first):
    end = StepEnd(code, told=first, error="no such data")
    outcome = judge.outcome(run, SITUATION, end)
    assert (outcome.verdict, outcome.reason) == ("refused", "no such data")
    end = StepEnd(143, told="srun: error: a2: task 3: Exited with exit code 12")
    assert judge.outcome(run, SITUATION, end).verdict == "failed"


def test_a_node_that_lacks_the_program_is_suspected_and_not_the_user(run):
    end = StepEnd(2, told="srun: error: a2: tasks 2-3: Exited with exit code 2")
    outcome = judge.outcome(run, SITUATION, end)
    assert (outcome.verdict, outcome.suspects) == ("failed", ("a2.site",))


def test_a_checkpoint_that_was_there_before_makes_no_attempt_done(run):
    checkpoint(run, 9)
    assert judge.outcome(run, replace(SITUATION, step_from=9), StepEnd(1)).verdict == "failed"
    assert judge.outcome(run, SITUATION, StepEnd(1)).verdict == "done"


@pytest.mark.parametrize("kind", ["limit", "preempted"])
def test_a_failure_without_a_word_counts_as_asked_for_only_if_slurm_signalled(run, kind):
    quiet = replace(SITUATION, asked=kind)
    assert judge.outcome(run, quiet, StepEnd(143)).asked == ""
    assert judge.outcome(run, replace(quiet, signalled=True), StepEnd(143)).asked == kind
    write_json(run.error, error(1))
    assert judge.outcome(run, quiet, StepEnd(143)).asked == ""


PASSING = Problem("", "all 2 nodes: no answer", "wait", passing=True)
LASTING = Problem("", "the disk is full", "free it")


@pytest.mark.parametrize(
    ("problems", "verdict", "suspects"),
    [
        ([PASSING], "failed", ()),
        ([replace(PASSING, node="a1")], "bad node", ("a1",)),
        ([replace(PASSING, node="a1"), replace(PASSING, node="a2")], "failed", ()),
        ([replace(PASSING, node="a1"), replace(LASTING, node="a2")], "bad node", ("a2",)),
        ([PASSING, replace(LASTING, node="a2")], "bad node", ("a2",)),
    ],
)
def test_what_another_try_may_mend_is_tried_again(problems, verdict, suspects):
    outcome = judge.unfit(problems, ["a1", "a2"])
    assert (outcome.verdict, outcome.suspects, outcome.asked) == (verdict, suspects, "")
    assert {"failed": "no answer"}.get(verdict, "") in outcome.reason
    alone = judge.unfit([replace(LASTING, node="a1")], ["a1"])
    assert (alone.verdict, alone.suspects) == ("bad node", ("a1",))


@pytest.mark.parametrize(
    "problems",
    [
        [LASTING],
        [PASSING, LASTING],
        [replace(LASTING, node="a1"), LASTING],
        [replace(LASTING, node="a1"), replace(LASTING, node="a2")],
    ],
)
def test_what_no_other_node_mends_is_the_users(problems):
    with pytest.raises(UserError, match="the disk is full") as error:
        judge.unfit(problems, ["a1", "a2"])
    assert error.value.fix == "free it"


def test_hosts_are_told_by_slurms_names():
    assert judge.named(["a2", "a1.site", "b1", "a2"], ["a1", "a2.site"]) == ("a2.site", "a1")


def test_the_time_limit_is_told_from_a_preemption_by_its_nearness():
    told = {"preempted": lambda: True}
    assert judge.asked_by(1000, 1100, 120, **told) == "limit"
    assert judge.asked_by(1000, 1149, 120, **told) == "limit"  # it may come half a minute early
    assert judge.asked_by(1000, 4000, 120, **told) == "preempted"
    assert judge.asked_by(1000, None, 120, **told) == "preempted"


def test_a_signal_that_is_neither_the_limits_nor_slurms_is_nobodys_and_counts():
    assert judge.asked_by(1000, 4000, 120, preempted=lambda: False) == ""
    stopped = policy.Outcome("stopped", "SIGTERM", "")
    assert policy.fruitless([], "7", stopped) == 1
