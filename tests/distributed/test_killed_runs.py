"""A rank of ``titans train`` is killed at a random moment, again and again; nothing is lost."""

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import yaml
from resume_cases import sections, tensors, timeless_rows
from tiny import prepare

from titans_pretrain.checkpoint.format import newest_good, read_state

STEPS_A_KILL = 5
MOST_NEW_STEPS = 3
START_SECONDS = 2.0
PATIENCE = 600
PLACE = re.compile(r"^(?:starting at step 0|resuming from \S+/step-(\d+))$", re.MULTILINE)


class Command:
    """``titans train --resume`` on a run, and what it leaves.

    Args:
        directory: holds the run's file, its directory and what the command printed.
        content: the sections of the run's file.
        ranks: to start.
    """

    def __init__(self, directory, content, ranks):
        self.run = directory / "run"
        self._printed, file = directory / "printed", directory / "run.yaml"
        file.write_text(yaml.safe_dump(content | {"run": {"directory": str(self.run)}}))
        train = ["-m", "titans_pretrain.cli", "train", str(file), "--ranks", str(ranks)]
        self._command = [sys.executable, *train, "--resume"]

    @contextlib.contextmanager
    def started(self):
        """The process; whatever happens, it has ended afterwards."""
        with open(self._printed, "w") as printed:
            process = subprocess.Popen(
                self._command,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def finish(self):
        with self.started() as process:
            assert process.wait(PATIENCE) == 0, self.printed()

    def printed(self):
        return self._printed.read_text()

    def began(self):
        """The step that it said it goes on from."""
        return int(PLACE.search(self.printed())[1] or 0)

    def pid(self, rank):
        return json.loads((self.run / "ranks.json").read_text())[str(rank)]["pid"]

    def metrics(self):
        """Which file metrics.jsonl is, and the last whole step in it."""
        try:
            with open(self.run / "metrics.jsonl") as file:
                steps = re.findall(r'"step": (\d+),.*\}\n', file.read())
                return os.fstat(file.fileno()).st_ino, int(steps[-1]) if steps else 0
        except FileNotFoundError:
            return None, 0

    def step_seconds(self):
        with open(self.run / "metrics.jsonl") as file:
            rows = [json.loads(line) for line in file]
        return [row["seconds"] for row in rows if "seconds" in row]

    def newest(self):
        """The step that a resume goes on from."""
        path, skipped = newest_good(self.run / "checkpoints")
        assert not skipped
        return int(path.name.removeprefix("step-")) if path else 0

    def is_writing(self):
        """Whether a rank has begun its file of the newest step's checkpoint, which has no name."""
        return any(self.run.glob(f"checkpoints/.step-{self.metrics()[1]}.*tmp/rank-*"))

    def remains(self):
        """What saves left that did not come to their end: names and times."""
        found = set()
        for path in self.run.glob("checkpoints/.*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found


def wait_for(process, command, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"ended before the kill:\n{command.printed()}"
        assert time.monotonic() < deadline, f"nothing happens:\n{command.printed()}"
        time.sleep(0.01)


def kill_once(command, dice, ranks, step_seconds, into_save):
    """Start, and kill a random rank after a few new steps and a part of one, or in a save.

    With no new step it dies while it builds the model, loads or makes its first step. Returns the
    names of what a save under way left.
    """
    before, _ = command.metrics()
    begins, old = command.newest(), command.remains()
    new_steps, rank = dice.randint(into_save, MOST_NEW_STEPS), dice.randrange(ranks)

    def reached():
        file, step = command.metrics()
        return file != before and step >= begins + new_steps

    with command.started() as process:
        wait_for(process, command, lambda: PLACE.search(command.printed()))
        assert command.began() == begins
        if new_steps:
            wait_for(process, command, reached)
        if into_save:
            wait_for(process, command, command.is_writing)
        else:
            time.sleep(dice.uniform(0, step_seconds if new_steps else START_SECONDS))
        writing = command.is_writing()
        os.kill(command.pid(rank), signal.SIGKILL)
        assert process.wait(60) == 1
    assert f"\nerror: rank {rank} was killed by SIGKILL\n" in command.printed()
    remains = [name for name, _ in command.remains() - old]
    print(
        f"rank {rank} killed {new_steps} steps after step {begins}, writing {writing}: "
        f"row {command.metrics()[1]}, step-{command.newest()}, {remains}"
    )
    return remains


@pytest.mark.parametrize(
    ("variant", "sizes", "kills"),
    [
        pytest.param("lmm", (1, 1, 2), 3, marks=pytest.mark.timeout(900)),
        pytest.param("mac", (1, 2, 2), 20, marks=[pytest.mark.slow, pytest.mark.timeout(2400)]),
    ],
)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_never_stopped(
    tmp_path, variant, sizes, kills
):
    manifest = prepare(tmp_path)
    content = sections(manifest, "", variant, sizes, steps=STEPS_A_KILL * kills, rows=4)
    content["train"] |= {"validation_every": 0}
    content["checkpoint"] |= {"keep": 3}
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    ranks = sizes[0] * sizes[1] * sizes[2]
    straight, broken = (Command(tmp_path / name, content, ranks) for name in ("straight", "broken"))
    straight.finish()
    step_seconds = statistics.median(straight.step_seconds())

    seed = int(os.environ.get("KILL_SEED", time.time_ns()))
    print(f"KILL_SEED={seed}; {step_seconds:.3f} s a step")
    dice, remains = random.Random(seed), []
    for _ in range(kills):
        remains.append(kill_once(broken, dice, ranks, step_seconds, into_save=not any(remains)))
    print(f"{sum(map(bool, remains))} of {kills} kills left a save half done")
    assert any(remains)
    begins = broken.newest()
    broken.finish()
    assert broken.began() == begins
    log = (broken.run / "logs" / "rank-0.log").read_text()
    told = re.findall(r"removed the remains of an interrupted save: \S+/(\S+)", log)
    assert set(told) == {name for names in remains for name in names}
    assert not broken.remains()

    assert timeless_rows(broken.run) == timeless_rows(straight.run)
    last = STEPS_A_KILL * kills
    assert broken.newest() == straight.newest() == last
    expected, found = tensors(straight.run, last), tensors(broken.run, last)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [read_state(run.run / "checkpoints" / f"step-{last}") for run in (straight, broken)]
    assert states[0] == states[1]
