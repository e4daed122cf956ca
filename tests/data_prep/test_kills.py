"""However tasks are interrupted, repeated and interleaved, the same bytes come out."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import rows
from outputs import content

from data_prep import task

PROGRAM = Path(__file__).with_name("killed_tasks.py")


@pytest.fixture
def frozen(freeze, tmp_path):
    """A plan of so many tasks, of 32 units and about as many windows."""
    values = [row | {"score": float(row["score"])} for row in rows(1600)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet", row_group_size=50)

    def run(tasks):
        settings = {"shard_bytes": 4000, "member_tokens": 256, "held_out": 0.1}
        return freeze(tmp_path / "a.parquet", f"of-{tasks}", tasks=tasks, **settings)

    return run


def disturbed(output, numbers, *, workers=0, at_once=2, kills, seconds, seed):
    """Do tasks while killing them; how many were killed."""
    words = [output, workers, at_once, kills, round(seconds, 4), seed, *numbers]
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def undisturbed(frozen, tasks):
    """A plan, its finished twin, and how long its longest task takes."""
    output = frozen(tasks)
    whole = Path(shutil.copytree(output, output.with_name(f"whole-{tasks}")))
    longest = 0.0
    for number in range(tasks):
        begun = time.monotonic()
        task.prepare(whole, number)
        longest = max(longest, time.monotonic() - begun)
    return output, whole, longest


def check(output, whole):
    """Equal bytes, and nothing left of those that were killed."""
    for number in range(json.loads((output / "plan.json").read_text())["tasks"]):
        task.prepare(output, number)
    assert content(output) == content(whole)
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_tasks_and_a_twin_end_equal_to_the_undisturbed_run(frozen, workers):
    output, whole, longest = undisturbed(frozen, 3)
    numbers = [1, 1, 2, 0] if workers == 0 else [0, 0]
    kills = 3 if workers == 0 else 1
    seconds = longest if workers == 0 else longest + 1.0
    killed = disturbed(output, numbers, workers=workers, kills=kills, seconds=seconds, seed=workers)
    assert killed
    check(output, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_of_every_task_and_its_twin_change_no_byte(frozen, tasks, workers):
    output, whole, longest = undisturbed(frozen, tasks)
    numbers = [*range(tasks)] * 2
    random.Random(tasks).shuffle(numbers)
    start = 1.0 if workers else 0.0
    killed = disturbed(
        output,
        numbers,
        workers=workers,
        at_once=2 if workers else 3,
        kills=10,
        seconds=start + longest / 2,
        seed=tasks,
    )
    assert killed >= 5 * len(numbers)
    check(output, whole)


def test_a_task_that_a_twin_finishes_meanwhile_stops_at_its_next_window(frozen, capfd):
    output, whole, _ = undisturbed(frozen, 1)
    real, calls = task.WindowWriter.write, []

    def beside_a_twin(self, index, *rest):
        calls.append(index)
        if index == 2:
            shutil.copytree(whole, output, dirs_exist_ok=True)
        return real(self, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.WindowWriter, "write", beside_a_twin)
        task.prepare(output, 0)
    assert len(calls) < 6
    assert "finished and intact" in capfd.readouterr().err
    check(output, whole)
