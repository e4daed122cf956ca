import json
import socket

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


def test_a_rollback_removes_the_rows_it_undoes_and_is_found_again_while_they_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path, step=0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1.0})
    for position in (60, 80):
        log.undo(2, {"step": 2, "event": "rollback", "position": position})
        log.write({"step": 3, "loss": 0.5})
    assert [row["step"] for row in rows(path)] == [1, 2, 2, 2, 3]
    assert metrics.last_rollback(path, 2)["position"] == 80
    assert metrics.last_rollback(path, 3) is None
    metrics.MetricsLog(path, step=1)
    assert metrics.last_rollback(path, 2) is None
    assert metrics.last_rollback(tmp_path / "none", 2) is None


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
