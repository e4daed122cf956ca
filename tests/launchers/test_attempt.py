"""``titans attempt`` from its first line, where nothing is left to train."""

import pytest
from attempt_parts import JOB, attempt, made, slurm_job

from launchers import attempt as attempts
from launchers import history
from titans_pretrain import config as run_config
from titans_pretrain.errors import UserError


@pytest.fixture
def begin(tmp_path, monkeypatch, asked):
    """``begin()``: ``titans attempt`` of the run in job 7."""
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(made(tmp_path, preflight=False)))
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return lambda: attempts.run(path, asked)


def test_a_twin_leaves_the_running_attempt_its_stop(run, known, begin):
    history.claim(run.path, attempt(job="5", name="x"))
    known["5"] = slurm_job(id="5", state="RUNNING", name="x")
    run.stop.touch()
    with pytest.raises(UserError, match="at work"):
        begin()
    assert run.stop.exists()


def test_the_last_attempt_gets_its_end_where_nothing_is_left_to_do(run, known, begin, capsys):
    history.claim(run.path, attempt(job="5"))
    run.stop.touch()
    assert begin() == 75
    assert history.attempts(run.path)[0].ended is not None
    assert not run.stop.exists()
