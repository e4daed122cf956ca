import json
import socket
import time

import pytest

from titans_pretrain import config
from titans_pretrain.train import metrics


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_cuts_later_rows_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path, step=0)
    for step in range(1, 5):
        log.write({"step": step, "loss": 1 / step})
        log.write({"step": step, "validation_loss": 2.0})
    with open(path, "a") as handle:
        handle.write('{"step": 2, "lo')
    metrics.MetricsLog(path, step=3).write({"step": 4, "loss": 9.0})
    assert [row["step"] for row in rows(path)] == [1, 1, 2, 2, 3, 3, 4]
    assert rows(path)[-1] == {"step": 4, "loss": 9.0}


def test_a_start_at_step_0_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n')
    metrics.MetricsLog(path, step=0)
    assert path.read_text() == ""


def train(log, *steps):
    for step in steps:
        log.write({"step": step, "loss": 1.0})


def roll_back(log, step, position):
    log.undo(step, {"step": step, "event": "rollback", "from_step": 9, "position": position})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_rollback_removes_the_rows_it_undoes_and_its_newest_is_found_again(path):
    assert metrics.last_rollback(path, 2) is None
    log = metrics.MetricsLog(path, step=None)
    train(log, 1, 2, 3, 4, 5)
    for position in (60, 80):
        roll_back(log, 2, position)
        train(log, 3)
    assert [(row["step"], row.get("event")) for row in rows(path)] == [
        (1, None), (2, None), (2, "rollback"), (2, "rollback"), (3, None),
    ]  # fmt: skip
    assert metrics.last_rollback(path, 2)["position"] == 80
    assert metrics.last_rollback(path, 3) is None


def test_a_rollback_counts_no_more_once_the_state_it_went_back_to_is_made_again(path):
    log = metrics.MetricsLog(path, step=None)
    train(log, *range(1, 9))
    roll_back(log, 6, 60)
    train(log, 7, 8)
    roll_back(log, 4, 80)
    train(log, 5, 6)  # step 6 is another one now
    assert metrics.last_rollback(path, 6) is None
    assert metrics.last_rollback(path, 4)["position"] == 80

    metrics.MetricsLog(path, step=2)  # as step 4 was damaged
    assert metrics.last_rollback(path, 4) is None
    assert metrics.last_rollback(path, 2) is None


def test_an_older_rollback_counts_where_the_newer_one_s_state_is_lost(path):
    log = metrics.MetricsLog(path, step=None)
    train(log, *range(1, 6))
    roll_back(log, 4, 60)
    train(log, 5, 6, 7)
    roll_back(log, 6, 80)
    assert metrics.last_rollback(path, 4)["position"] == 60
    metrics.MetricsLog(path, step=4)
    assert metrics.last_rollback(path, 4)["position"] == 60


def test_every_decision_stays_and_no_row_is_later_than_the_run(path):
    log = metrics.MetricsLog(path, step=None)
    train(log, 1)
    log.write({"step": 2, "tokens": 20, "loss": 9.0, "skipped": "a spike", "where": "rank 1"})
    train(log, 3, 4)
    roll_back(log, 3, 60)
    log.write({"step": 4, "event": "stop", "from_step": 4})
    log = metrics.MetricsLog(path, step=1)
    train(log, 2)
    found = rows(path)
    assert [row["step"] for row in found] == [1, 1, 1, 1, 2]
    assert found[1] == {
        "step": 1,
        "event": "skip",
        "reason": "a spike",
        "where": "rank 1",
        "from_step": 2,
        "position": 20,
        "undone": True,
    }
    assert [row.get("event") for row in found] == [None, "skip", "rollback", "stop", None]
    assert [row["from_step"] for row in found[1:4]] == [2, 9, 4]
    assert all(row["undone"] for row in found[1:4])

    metrics.MetricsLog(path, step=2)
    assert rows(path) == found


def test_a_run_that_begins_again_keeps_decisions_but_follows_none(path):
    log = metrics.MetricsLog(path, step=None)
    train(log, 1, 2)
    roll_back(log, 0, 60)
    assert metrics.last_rollback(path, 0)["position"] == 60
    metrics.MetricsLog(path, step=None)
    assert [(row["step"], row["event"]) for row in rows(path)] == [(0, "rollback")]
    assert metrics.last_rollback(path, 0) is None


def test_a_validation_s_row_is_found_by_its_step(path):
    assert not metrics.has_validation(path, 2)
    log = metrics.MetricsLog(path, step=None)
    train(log, 1, 2)
    log.write({"step": 1, "validation_loss": 2.0})
    assert metrics.has_validation(path, 1)
    assert not metrics.has_validation(path, 2)


def test_losses_are_written_unrounded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.MetricsLog(path, step=0).write({"step": 1, "loss": 0.1 + 0.2})
    assert rows(path)[0]["loss"] == 0.1 + 0.2


def test_the_progress_line_tells_step_loss_norm_rate_speed_and_time_left():
    row = {"step": 3, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-3}
    line = metrics.progress_line(row | {"tokens_per_second": 12345.6}, 10, 3700)
    assert line == (
        "step 3/10  loss 2.5000  grad norm 1.250  lr 1.00e-03  12,346 tokens/s  1h01m left"
    )


def test_the_progress_line_tells_flops_and_their_share_of_the_peak_where_known():
    row = {"step": 3, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-3}
    row |= {"tokens_per_second": 12345.6, "flops_per_second": 4.123e14}
    line = metrics.progress_line(row, 10, 3700)
    assert line.endswith("  12,346 tokens/s  412 TFLOP/s a rank  1h01m left")
    line = metrics.progress_line(row | {"mfu": 0.4167}, 10, 3700)
    assert line.endswith("  12,346 tokens/s  412 TFLOP/s a rank (MFU 41.7%)  1h01m left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12s"), (450, "7m30s"), (7500, "2h05m"), (273_600, "3d04h")]
)
def test_durations_are_short(seconds, text):
    assert metrics.duration(seconds) == text


def test_progress_is_told_at_most_once_a_second_but_always_at_the_end():
    told = []
    progress = metrics.Progress(100, told.append)
    row = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens_per_second": 1.0}
    for step in range(1, 101):
        progress.show(row | {"step": step, "seconds": 0.001})
    assert [line.split()[1] for line in told] == ["1/100", "100/100"]


def run(directory, project):
    return config.resolve(
        {
            "model": {},
            "data": {"manifest": "m", "sequence_length": 8},
            "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1.0},
            "run": {"directory": str(directory), "wandb_project": project},
        },
        source="test",
    )


@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    return monkeypatch


def test_without_a_key_wandb_is_offline_under_one_run_id(tmp_path, wandb_environment):
    told = []
    for step in (1, 2):
        log = metrics.WandbLog(run(tmp_path, "titans"), tmp_path, told.append)
        log.write({"step": step, "loss": 1.0})
        log.close()
    names = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert names
    assert all(metrics.run_id(tmp_path) in name for name in names)
    assert told == []


def test_evaluations_have_an_axis_of_their_own(tmp_path, wandb_environment):
    tree = run(tmp_path, "titans").model_dump()
    tree["checkpoint"]["every"] = tree["pipeline"]["eval"]["every"] = 4
    told = []
    log = metrics.WandbLog(config.resolve(tree, source="test"), tmp_path, told.append)
    log.write({"step": 8, "loss": 1.0, "evaluation/step": 4, "evaluation/heldout/loss": 2.0})
    log.write({"evaluation/step": 8, "evaluation/heldout/loss": 1.5})  # after the last step
    log.close()
    assert told == []
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    limit = time.monotonic() + 60  # wandb's own process writes it
    while b"evaluation/*" not in path.read_bytes():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_an_unreachable_wandb_is_told_once_without_the_key_and_changes_nothing(
    tmp_path, wandb_environment
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    key = "0123456789" * 4
    wandb_environment.setenv("WANDB_BASE_URL", address)
    wandb_environment.setenv("WANDB_API_KEY", key)
    wandb_environment.setattr(metrics, "WANDB_SECONDS", 2)
    told = []
    log = metrics.WandbLog(run(tmp_path, "titans"), tmp_path, told.append)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    (sentence,) = told
    assert sentence.startswith("wandb could not start: ")
    assert sentence.endswith("going on with metrics.jsonl only")
    assert key not in sentence


def test_no_project_means_no_wandb(tmp_path):
    log = metrics.WandbLog(run(tmp_path, None), tmp_path, pytest.fail)
    log.write({"step": 1})
    log.close()
    assert not list(tmp_path.iterdir())
