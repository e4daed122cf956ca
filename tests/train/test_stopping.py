"""A run is asked to stop or to save, by signals and by files, with much time left or little."""

import json
import os
import signal
import time

import pytest
from run_command import end

CALM = {"train": {"steps": 10_000, "validation_every": 0}, "checkpoint": {"every": 0}}


def wait_for(condition, process, timeout=200):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kept(run, name):
    return json.loads((run.directory / name).read_text())


def test_files_ask_for_a_checkpoint_and_for_the_end_and_are_consumed(make_run):
    run = make_run(**CALM)
    process = run.start("--ranks", "2", TITANS_ATTEMPT="5")
    run.wait_for_step(1, process)
    save, stop = (run.directory / name for name in ("save", "stop"))
    save.touch()
    wait_for(lambda: not save.exists() and run.steps_saved(), process)
    (saved,) = run.steps_saved()
    wait_for((run.directory / "last_save.json").exists, process)
    told = kept(run, "last_save.json")
    assert (told["step"], told["seconds"] > 0, told["bytes"] > 1000) == (saved, True, True)
    stop.touch()
    code, _, complaints = end(process)
    assert code == 75
    last = run.rows()[-1]["step"]
    assert complaints.startswith(f"error: stopped by the file `stop` after step {last} of 10000\n")
    assert not stop.exists()
    assert run.steps_saved() == [saved, last]
    told = kept(run, "outcome.json")
    assert {name: told[name] for name in ("attempt", "outcome", "asked_by", "step", "saved")} == {
        "attempt": 5, "outcome": "stopped", "asked_by": "file", "step": last, "saved": "now"
    }  # fmt: skip
    assert told["saved_step"] == last
    assert told["seconds"] == round(kept(run, "last_save.json")["seconds"], 3) > 0

    stop.touch()  # before the next start, which then makes no step
    code, _, complaints = run.train("--ranks", "1", "--resume", TITANS_ATTEMPT="6")
    assert (code, stop.exists()) == (75, False)
    assert complaints.startswith(f"error: stopped by the file `stop` after step {last} of 10000\n")
    assert run.rows()[-1]["step"] == last
    told = kept(run, "outcome.json")
    assert (told["attempt"], told["saved"], told["saved_step"]) == (6, "before", last)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)]
)
def test_a_save_that_does_not_fit_into_the_time_left_is_not_begun(make_run, number):
    run = make_run(**CALM)
    run.directory.mkdir()
    (run.directory / "last_save.json").write_text('{"step": 1, "seconds": 400.0, "bytes": 1}')
    limit = {"TITANS_JOB_END": str(time.time() + 500)}
    preemption = {"TITANS_PREEMPT_SECONDS": "300"}
    process = run.start(
        "--ranks", "2", **(preemption if number == signal.SIGTERM else limit), TITANS_ATTEMPT="1"
    )
    run.wait_for_step(2, process)
    os.kill(run.processes()[1], number)
    code, _, complaints = end(process)
    assert code == 75
    last = run.rows()[-1]["step"]
    first = complaints.splitlines()[0]
    assert first.startswith(
        f"error: stopped by {number.name} on rank 1 after step {last} of 10000; not saved, as that "
        "takes 400.0 s and "
    )
    assert first.endswith(f" s are left: steps 1 to {last} will be repeated")
    assert run.steps_saved() == []
    told = kept(run, "outcome.json")
    assert (told["asked_by"], told["saved"], told["saved_step"]) == ("signal", "no", None)


def test_signals_in_the_seconds_of_imports_kill_no_rank(make_run):
    run = make_run(**CALM)
    code = "from titans_pretrain import cli; import os, signal, sys\n"
    code += "from titans_pretrain.train import launch\n"
    code += "given = launch.given_ranks\n"
    code += "def late(environment):\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
    code += "    return given(environment)\n"
    code += "launch.given_ranks = late\nsys.exit(cli.main(sys.argv[1:]))\n"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 9_000)}
    code, _, complaints = run.train_by(code, **alone)
    assert code == 75
    assert complaints.startswith(
        "error: stopped by SIGUSR1 on rank 0 before the first step; there "
    )
    assert run.rows() == []
    assert kept(run, "outcome.json")["saved"] == "no"
