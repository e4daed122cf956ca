"""Who is named when a run hangs."""

import pytest

from titans_pretrain.train.hang import SYNCHRONIZING, explain

RECEIVE = "/env/torch/distributed/distributed_c10d.py:2400 recv"
WORK = "/home/me/model.py:7 forward"


def record(rank, *, waits_for=None, calls=(WORK,), step=4, phase="forward", **more):
    place = {
        "phase": phase,
        "step": step,
        "micro_batch": 0,
        "layer": "",
        "waiting_on": waits_for,
    }
    told = f"{phase}, step {step}"
    if waits_for is not None:
        told += f", waits for rank {waits_for} at layers.1"
    return {
        "rank": rank,
        "host": f"gpu{rank}",
        "pid": 100 + rank,
        "place": place,
        "told": told,
        "seconds": 50.0,
        "limit": 45.0,
        "stacks": {"MainThread": list(calls)},
        **more,
    }


STARTED = {str(rank): {"host": f"gpu{rank}", "pid": 100 + rank} for rank in range(4)}


def report(*records, ranks=None):
    found = {one["rank"]: one for one in records}
    return explain(found, ranks or len(records), STARTED, "runs/x/hang")


def test_the_rank_that_waits_for_nobody_is_named_though_others_wait_for_its_neighbours():
    told = report(
        record(0, waits_for=1),
        record(1, waits_for=2),
        record(2),
        record(3, calls=(WORK, RECEIVE)),
    )
    assert told.culprit == 2
    assert told.error.exit_code == 75
    assert told.error.what == "step 4 hangs: rank 2 on gpu2 waits for no other rank"
    assert told.error.where == "rank 2 on gpu2, process 102: forward, step 4; held up for 50 s"
    assert "--resume" in told.error.fix


def test_a_silent_rank_is_named_before_all_others():
    told = report(record(0), record(2, waits_for=1), ranks=3)
    assert told.culprit == 1
    assert told.error.what == (
        "step 4 hangs: rank 1 on gpu1 is silent: its process is dead, stopped or cut off"
    )
    assert told.error.where.startswith("rank 1 on gpu1, process 101: no record")
    assert "rank 1 on gpu1, process 101: silent" in str(told)


def test_where_all_but_one_wait_for_a_message_the_one_in_a_collective_is_named():
    told = report(record(0, waits_for=1), record(1, calls=(WORK, RECEIVE)))
    assert told.culprit == 1
    assert "is in a collective call, for which others wait" in told.error.what


def test_where_every_rank_waits_the_least_advanced_one_is_named_and_called_no_more():
    told = report(
        record(0, calls=(RECEIVE,), step=5),
        record(1, calls=(RECEIVE,), step=4),
        record(2, calls=(RECEIVE,), step=5),
    )
    assert told.culprit == 1
    assert told.error.what.endswith("is the least advanced; every rank waits for another")


@pytest.mark.parametrize("phase", SYNCHRONIZING)
def test_a_rank_that_waits_for_its_device_waits_for_others(phase):
    told = report(record(0, phase=phase), record(1), record(2, phase=phase))
    assert told.culprit == 1
    assert "waits for no other rank" in told.error.what


def test_of_ranks_in_one_step_that_wait_for_none_the_one_in_the_earliest_phase_is_named():
    told = report(record(0), record(1, phase="backward"), record(2, phase="reading"))
    assert told.culprit == 2
    assert "waits for no other rank, like 2 more" in told.error.what
    told = report(record(0, phase="saving"), record(1, phase="updating"), record(2, step=5))
    assert told.culprit == 1


def test_communication_of_another_thread_is_waiting_too():
    threads = {"MainThread": [WORK], "Dummy-1": [WORK, RECEIVE]}
    told = report(record(0, stacks=threads), record(1))
    assert told.culprit == 1


def test_every_rank_s_place_host_and_stack_are_told_the_culprit_s_first_and_equal_ones_once():
    told = str(report(record(0, waits_for=2), record(1, waits_for=2), record(2, calls=("a:1 f",))))
    for rank in range(3):
        assert f"\nrank {rank} on gpu{rank}, process 10{rank}: forward, step 4" in told
    assert told.endswith(
        "stack of rank 2, innermost call first:\n  a:1 f\n"
        f"stack of rank 0, 1, innermost call first:\n  {WORK}"
    )


def test_a_hang_before_the_first_step_is_that_of_the_start():
    assert report(record(0, step=0)).error.what.startswith("the start hangs: rank 0 on gpu0")
