"""Which steps the guard accepts, and whom it blames for the others."""

import json
import math
import re

import pytest

from titans_pretrain.config import GuardSection
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.train.guard import ADVICE, Guard, Witness, blame

NAN, INF = float("nan"), float("inf")


def guard(**section):
    return Guard(GuardSection(**section))


def accept(judge, steps, *, first=1, loss=2.0, gradient=1.0):
    for step in range(first, first + steps):
        assert judge.judge(step, loss, gradient).action == "accept"


def test_by_default_any_finite_step_is_accepted():
    judge = guard()
    accept(judge, 100)
    accept(judge, 1, first=101, loss=1e30, gradient=1e30)


@pytest.mark.parametrize(
    ("loss", "gradient", "reason"),
    [
        (NAN, 1.0, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (1.0, NAN, "the gradient norm is not finite"),
        (1.0, INF, "the gradient norm is not finite"),
        (NAN, NAN, "the loss is nan"),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_numbers_that_are_not_finite_meet_the_policy_from_the_first_step_on(
    policy, loss, gradient, reason
):
    verdict = guard(policy=policy).judge(1, loss, gradient)
    assert (verdict.action, verdict.reason) == (policy, reason)


def test_a_spike_is_measured_against_the_median_of_the_last_accepted_steps():
    judge = guard(policy="skip", loss_spike=2.0, window=8)
    accept(judge, 8, loss=100.0)
    accept(judge, 8, first=9, loss=1.0)  # the window has forgotten the hundred
    accept(judge, 1, first=17, loss=2.0)
    verdict = judge.judge(18, 2.1, 1.0)
    assert (verdict.action, verdict.number) == ("skip", "loss")
    assert (
        verdict.reason == "the loss 2.1 exceeds 2 times 1, the median of the last 8 accepted steps"
    )


def test_a_spike_of_the_gradient_is_told_as_one():
    judge = guard(policy="rollback", gradient_spike=3.0, window=4)
    accept(judge, 4)
    verdict = judge.judge(5, 2.0, 3.5)
    assert (verdict.action, verdict.number) == ("rollback", "gradient norm")
    assert verdict.reason.startswith("the gradient norm 3.5 exceeds 3 times 1, ")


def test_a_bad_step_does_not_move_the_median():
    judge = guard(policy="skip", loss_spike=2.0, window=4, limit=100)
    accept(judge, 4)
    assert [judge.judge(step, 9.0, 1.0).action for step in range(5, 25)] == ["skip"] * 20


def test_fewer_accepted_steps_than_a_quarter_of_the_window_are_no_measure():
    judge = guard(policy="skip", loss_spike=2.0, window=16)
    accept(judge, 3)
    accept(judge, 1, first=4, loss=9.0)
    assert judge.judge(5, 9.0, 1.0).action == "skip"


def test_bad_steps_in_a_row_stop_the_run_and_a_good_one_ends_the_row():
    judge = guard(policy="skip", limit=3)
    assert [judge.judge(step, NAN, 1.0).action for step in (1, 2)] == ["skip", "skip"]
    accept(judge, 1, first=3)
    actions = [judge.judge(step, NAN, 1.0) for step in (4, 5, 6)]
    assert [verdict.action for verdict in actions] == ["skip", "skip", "stop"]
    assert actions[-1].reason == "the loss is nan, bad step 3 in a row"


def test_good_steps_that_are_trained_again_do_not_end_the_row():
    judge = guard(policy="rollback", limit=3)
    accept(judge, 4)
    early = judge.state()
    for turn in (1, 2):
        accept(judge, 5, first=5)
        assert judge.judge(10, NAN, 1.0).action == "rollback"
        assert judge.bad == turn
        row = judge.row()
        judge.restore(early)
        judge.keep_row(row)
    accept(judge, 5, first=5)
    assert judge.judge(10, NAN, 1.0).action == "stop"


def test_getting_past_the_bad_step_ends_the_row_after_a_rollback():
    judge = guard(policy="rollback", limit=2)
    assert judge.judge(10, NAN, 1.0).action == "rollback"
    judge.keep_row(judge.row())
    accept(judge, 11)
    assert judge.judge(12, NAN, 1.0).action == "rollback"


def test_a_row_lasts_until_the_run_is_past_the_furthest_bad_step_wherever_the_last_one_was():
    judge = guard(policy="rollback", limit=3)
    early = judge.state()
    for turn, step in enumerate((150, 120), start=1):
        assert judge.judge(step, NAN, 1.0).action == "rollback"
        row = json.loads(json.dumps(judge.row()))
        judge.restore(early)
        judge.keep_row(row)
        accept(judge, 30, first=100)
        assert judge.bad == turn
    assert judge.judge(140, NAN, 1.0).action == "stop"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"policy": "skip", "limit": 2}, {"policy": "rollback", "limit": 2}),
        ({"policy": "rollback", "limit": 2}, {"policy": "skip", "limit": 2}),
        ({"policy": "rollback", "limit": 2}, {"policy": "rollback", "limit": 3}),
        ({"policy": "stop"}, {"policy": "skip"}),
    ],
)
def test_after_a_stop_another_policy_or_limit_begins_the_row_anew(before, after):
    judge = guard(**before)
    accept(judge, 2)
    while judge.judge(3, NAN, 1.0).action != "stop":
        pass
    stopped = judge.state()
    same, other = guard(**before), guard(**after)
    same.restore(stopped)
    other.restore(stopped)
    assert same.judge(3, NAN, 1.0).action == "stop"
    assert other.judge(3, NAN, 1.0).action == after["policy"]
    assert other.state()["losses"] == [2.0, 2.0]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_the_advice_after_a_stop_is_another_policy_than_the_one_in_use(policy):
    advised = re.findall(r"guard\.policy=(\w+)", ADVICE[policy])
    assert advised
    assert policy not in advised
    assert ("guard.limit" in ADVICE[policy]) == (policy != "stop")


def test_a_guard_restored_from_json_decides_as_the_one_that_was_never_stopped():
    section = {"policy": "skip", "loss_spike": 1.5, "gradient_spike": 1.5, "window": 8, "limit": 50}
    losses = [1 + 0.1 * math.sin(step) + (step % 7 == 0) for step in range(60)]
    straight, broken = guard(**section), guard(**section)
    for step, loss in enumerate(losses):
        if step == 23:
            stored = json.loads(json.dumps(broken.state()))
            assert stored == broken.state()
            broken = guard(**section)
            broken.restore(stored)
        assert straight.judge(step, loss, 2 * loss) == broken.judge(step, loss, 2 * loss)


def test_a_checkpoint_without_a_guard_s_state_begins_anew():
    judge = guard(policy="skip")
    accept(judge, 3)
    judge.judge(4, NAN, 1.0)
    judge.restore({})
    assert judge.state() == guard(policy="skip").state()


def test_the_ranks_and_micro_batches_whose_loss_is_not_finite_are_blamed():
    seen = [
        Witness((1.0, 2.0), True),
        Witness((1.0, NAN), False),
        Witness((INF, NAN), False),
    ]
    told = "rank 1 (micro-batch 1), rank 2 (micro-batch 0, 1)"
    assert blame("loss", seen, Mesh(data=3)) == told


def test_the_rank_with_the_largest_loss_is_blamed_for_a_spike():
    seen = [Witness((1.0, 2.0), True), Witness((70.0, 2.0), True)]
    told = "rank 1 (micro-batch 0) has the largest share, 70"
    assert blame("loss", seen, Mesh(data=2)) == told


def test_the_ranks_whose_own_gradient_is_not_finite_are_blamed():
    seen = [Witness((1.0,), True), Witness((1.0,), False), Witness((1.0,), True)]
    assert blame("gradient norm", seen, Mesh(data=3)) == "rank 1"
    assert blame("gradient norm", [Witness((1.0,), True)] * 2, Mesh(data=2)) == (
        "all ranks: each one's own gradient is finite"
    )


def test_ranks_that_a_bad_number_reached_over_the_sequence_are_not_blamed_for_it():
    good, bad = Witness((1.0,), True), Witness((NAN,), False)
    mesh = Mesh(data=2, sequence=3)
    at_first_span_of_data_rank_1 = [good, bad, good, bad, good, bad]
    told = "rank 1 (micro-batch 0); from there it reached rank 3, 5"
    assert blame("loss", at_first_span_of_data_rank_1, mesh) == told
    lost = Witness((1.0,), False)
    at_second_span_of_data_rank_0 = [lost, good, lost, good, good, good]
    told = "rank 2; from there it reached rank 0"
    assert blame("gradient norm", at_second_span_of_data_rank_0, mesh) == told
