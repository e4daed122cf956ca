"""Several tasks: finished cells are kept, taken by the same command, and reported."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate import loaded, report_figure, suite

CODE = "0" * 64


class Task:
    """Counts its runs; cell ``bad`` fails."""

    def __init__(self, name="apple", cells=("2048", "4096"), **identity):
        self.name, self._cells, self._identity = name, list(cells), identity
        self.ran = []

    def identity(self):
        return {"samples": 3, "max_length": 64, **self._identity}

    def cells(self):
        return self._cells

    def check(self, longest):
        pass

    def run(self, model, cell, tell):
        if cell == "bad":
            raise TitansError("the loss is nan", where="here", fix="another")
        tell("half")
        self.ran.append(cell)
        return {"accuracy": 0.5, "samples": 3}


class Network:
    dtype = "float32"
    device = "cuda:0"


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded, without loading any or drawing."""
    found = []

    def load(directory, **options):
        found.append((directory, options))
        return Network()

    monkeypatch.setattr(loaded, "load", load)
    monkeypatch.setattr(loaded, "code", lambda _: CODE)
    monkeypatch.setattr(loaded, "parameters", lambda _: 1000)
    monkeypatch.setattr(report_figure, "draw", lambda _, path: path.touch())
    return found


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def kept(out):
    """Names of the cells, and that each has a hash in its file's."""
    names = sorted(path.name for path in (out / suite.CELLS).iterdir())
    assert all(re.fullmatch(r"[\w-]+\.[0-9a-f]{8}\.json", name) for name in names)
    return [name.split(".")[0] for name in names]


def cell(out, name):
    (path,) = (out / suite.CELLS).glob(f"{name}.*")
    return path


def test_cells_and_report_are_written(model, tmp_path, loads, capsys):
    out = tmp_path / "out"
    found = suite.evaluate(model, out, [Task(), Task("pear", [""])], device="cpu")
    assert kept(out) == ["apple-2048", "apple-4096", "pear"]
    assert [(row["task"], row["cell"]) for row in found["results"]] == [
        ("apple", "2048"),
        ("apple", "4096"),
        ("pear", ""),
    ]
    assert {path.name for path in out.iterdir()} == {
        "cells",
        "report.json",
        "report.md",
        "report.png",
    }
    assert len(loads) == 1
    assert "[3/3] pear  half" in capsys.readouterr().err


def test_the_same_command_runs_nothing_and_loads_nothing(model, tmp_path, loads, capsys):
    first = suite.evaluate(model, tmp_path, [Task()])
    again = Task()
    assert suite.evaluate(model, tmp_path, [again]) == first
    assert again.ran == []
    assert len(loads) == 1
    assert "apple-2048: there already" in capsys.readouterr().err


def test_a_failed_cell_is_told_and_the_rest_goes_on(model, tmp_path, loads, capsys):
    class Worse(Task):
        def run(self, model, cell, tell):
            raise UserError("too long", where="--lengths", fix="less")

    tasks = [Task(cells=["1", "bad", "2"]), Worse("pear", [""]), Task("plum", [""])]
    with pytest.raises(TitansError, match="apple-bad: the loss is nan") as caught:
        suite.evaluate(model, tmp_path, tasks)
    assert (caught.value.where, caught.value.exit_code) == ("here", 1)
    assert kept(tmp_path) == ["apple-1", "apple-2", "plum"]
    assert "not done: pear: too long" in capsys.readouterr().err
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["failed"] == ["apple-bad: the loss is nan", "pear: too long"]
    assert len(found["results"]) == 3
    page = (tmp_path / "report.md").read_text()
    assert "- apple-bad: the loss is nan\n- pear: too long\n" in page
    rest = Task(cells=["1", "2"])
    suite.evaluate(model, tmp_path, [rest])
    assert rest.ran == []
    assert "Not done" not in (tmp_path / "report.md").read_text()


def test_an_interrupted_call_leaves_a_report_of_what_is_done(model, tmp_path, loads):
    class Interrupted(Task):
        def run(self, model, cell, tell):
            if cell == "2":
                raise KeyboardInterrupt
            return super().run(model, cell, tell)

    with pytest.raises(KeyboardInterrupt):
        suite.evaluate(model, tmp_path, [Interrupted(cells=["1", "2"])])
    assert "| apple 1 | accuracy" in (tmp_path / "report.md").read_text()


def test_what_a_model_cannot_do_is_refused_before_anything_is_done(model, tmp_path, loads):
    class Long(Task):
        def check(self, longest):
            raise UserError(f"more than {longest}", where="--lengths", fix="less")

    (model / "config.json").write_text('{"n_positions": 1024}')
    out = tmp_path / "out"
    with pytest.raises(UserError, match="more than 1024"):
        suite.evaluate(model, out, [Task(), Long("pear")])
    assert (loads, out.exists()) == ([], False)


def test_what_killed_writers_of_reports_left_is_removed(model, tmp_path, loads):
    left = tmp_path / f".report.md.{socket.gethostname()}-1-abcd.tmp"
    busy = tmp_path / f".report.json.{socket.gethostname()}-1-abcd.tmp"
    for path in (left, busy):
        path.touch()
    with open(busy) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        suite.evaluate(model, tmp_path, [Task()])
        assert (left.exists(), busy.exists()) == (False, True)


def test_a_users_mistake_stays_one(model, tmp_path, loads):
    class Wrong(Task):
        def run(self, model, cell, tell):
            raise UserError("too long", where="--max-length", fix="less")

    with pytest.raises(UserError, match="apple-2048: too long"):
        suite.evaluate(model, tmp_path, [Wrong()])


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "apple-1 does not fit in memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"),
            "apple-1 does not fit in memory",
        ),
        (MemoryError(), "apple-1 does not fit in memory"),
        (RuntimeError("shapes\nof tensors"), "apple-1: RuntimeError: shapes"),
        (ValueError("out of memory"), "apple-1: ValueError: out of memory"),
        (ZeroDivisionError(), "apple-1: ZeroDivisionError"),
    ],
)
def test_whatever_ends_a_cell_the_rest_goes_on(raised, told, model, tmp_path, loads, capsys):
    class Broken(Task):
        def run(self, model, cell, tell):
            raise raised

    with pytest.raises(TitansError) as caught:
        suite.evaluate(model, tmp_path, [Broken(cells=["1"]), Task("pear", [""])])
    assert caught.value.what == told
    assert kept(tmp_path) == ["pear"]
    assert f"- {caught.value.what}\n" in (tmp_path / "report.md").read_text()
    foreseen = "does not fit" in told
    assert ("--batch" in caught.value.fix) == foreseen
    assert ("Traceback" in capsys.readouterr().err) != foreseen
    if not foreseen:
        assert caught.value.fix == "report this as a bug"
        assert caught.value.where.startswith(f"{__file__}:")


def test_a_cell_that_breaks_before_its_turn_does_not_end_the_others(model, tmp_path, loads):
    class Broken(Task):
        def fit(self, model, cell):
            raise AttributeError("instances")

        def run(self, model, cell, tell):
            self.fit(model, cell)

    with pytest.raises(TitansError, match="apple-1: AttributeError: instances"):
        suite.evaluate(model, tmp_path, [Broken(cells=["1"]), Task("pear", [""])])
    assert kept(tmp_path) == ["pear"]


def test_a_result_that_cannot_be_written_ends_the_command(model, tmp_path, loads, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(suite, "write_json", full)
    task = Task()
    with pytest.raises(OSError, match="No space"):
        suite.evaluate(model, tmp_path, [task])
    assert task.ran == ["2048"]


@pytest.mark.parametrize("told", [False, True])
def test_a_failed_cell_holds_no_memory_while_the_others_run(told, model, tmp_path, loads):
    class Activations:
        pass

    held = []

    class Large(Task):
        def run(self, model, cell, tell):
            activations = Activations()
            activations.graph = activations  # a cycle, as autograd's
            held.append(weakref.ref(activations))
            try:
                raise RuntimeError("CUDA out of memory")
            except RuntimeError:
                if told:
                    raise TitansError("10 prompts do not fit") from None
                raise

    class Next(Task):
        def run(self, model, cell, tell):
            assert held[0]() is None
            return super().run(model, cell, tell)

    with pytest.raises(TitansError, match="fit"):
        suite.evaluate(model, tmp_path, [Large(cells=["1"]), Next("pear", [""])])
    assert kept(tmp_path) == ["pear"]


def test_where_nothing_succeeds_the_report_tells_that(model, tmp_path, loads):
    with pytest.raises(TitansError, match="apple-bad"):
        suite.evaluate(model, tmp_path, [Task(cells=["bad"])])
    assert "## Not done\n\n- apple-bad: the loss is nan" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["results"] == []


def test_another_identity_runs_again_and_takes_no_earlier_results_place(model, tmp_path, loads):
    suite.evaluate(model, tmp_path, [Task(seed=0)])
    other, again = Task(seed=1), Task(seed=0)
    found = suite.evaluate(model, tmp_path, [other])
    assert other.ran == ["2048", "4096"]
    assert [row["identity"]["seed"] for row in found["results"]] == [0, 1, 0, 1]
    found = suite.evaluate(model, tmp_path, [again])
    assert again.ran == []
    assert [row["identity"]["seed"] for row in found["results"]] == [1, 0, 1, 0]  # wanted last


def test_a_result_of_other_code_is_not_taken_over(model, tmp_path, loads, monkeypatch):
    suite.evaluate(model, tmp_path, [Task(cells=["1"])])
    monkeypatch.setattr(loaded, "code", lambda _: "f" * 64)
    again = Task(cells=["1"])
    found = suite.evaluate(model, tmp_path, [again])
    assert again.ran == ["1"]
    assert [row["identity"]["code"] for row in found["results"]] == [CODE, "f" * 64]
    assert "max length 64, code ffffffff" in (tmp_path / "report.md").read_text()


def test_a_cell_under_its_name_alone_is_taken(model, tmp_path, loads):
    suite.evaluate(model, tmp_path, [Task(cells=["1"])])
    cell(tmp_path, "apple-1").rename(tmp_path / "cells/apple-1.json")
    again = Task(cells=["1"])
    found = suite.evaluate(model, tmp_path, [again])
    assert (again.ran, len(found["results"])) == ([], 1)


def test_another_model_runs_again_and_is_reported_alone(model, tmp_path, loads):
    out = tmp_path / "out"
    suite.evaluate(model, out, [Task(), Task("pear", [""])])
    (model / "config.json").write_text('{"model_type": "other"}')
    other = Task()
    found = suite.evaluate(model, out, [other])
    assert other.ran == ["2048", "4096"]
    assert [row["task"] for row in found["results"]] == ["apple", "apple"]


@pytest.mark.parametrize("contents", ["", '{"format"', "[]", '{"format": "titans-eval-cell/1"}'])
def test_a_damaged_cell_runs_again(contents, model, tmp_path, loads):
    suite.evaluate(model, tmp_path, [Task()])
    cell(tmp_path, "apple-2048").write_text(contents)
    again = Task()
    suite.evaluate(model, tmp_path, [again])
    assert again.ran == ["2048"]


def test_earlier_tasks_of_the_model_stay_in_the_report(model, tmp_path, loads):
    suite.evaluate(model, tmp_path, [Task()])
    found = suite.evaluate(model, tmp_path, [Task("pear", [""])])
    assert {row["task"] for row in found["results"]} == {"apple", "pear"}


def test_cut_samples_are_warned_about(model, tmp_path, loads, capsys):
    class Cut(Task):
        def run(self, model, cell, tell):
            return {"accuracy": 0.5, "samples": 3, "truncated": 2}

    suite.evaluate(model, tmp_path, [Cut(cells=[""])])
    warned = "warning: apple: 2 of 3 samples were cut to 64 tokens, on the left"
    assert warned in capsys.readouterr().err


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_suite
from pathlib import Path
from titans_pretrain import files
from titans_pretrain.evaluate import loaded, suite

class Network:
    dtype = "float32"

loaded.load = lambda *_, **__: Network()
loaded.code = lambda _: test_suite.CODE
write, when = suite.write_json, sys.argv[1]

def dies(path, value):
    second = path.name.startswith("apple-2.")
    if second and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if second and when == "within":
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write(path, value)
    if second:
        os.kill(os.getpid(), signal.SIGKILL)

suite.write_json = dies
suite.evaluate(Path(sys.argv[2]), Path(sys.argv[3]), [test_suite.Task(cells=["1", "2", "3"])])
"""


@pytest.mark.parametrize(
    ("when", "left"), [("before", ["2", "3"]), ("within", ["2", "3"]), ("after", ["3"])]
)
def test_a_killed_evaluation_loses_the_unfinished_cell_only(when, left, model, tmp_path, loads):
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent))
    words = [sys.executable, "-c", code, when, str(model), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    rest = Task(cells=["1", "2", "3"])
    suite.evaluate(model, out, [rest])
    assert rest.ran == left
    assert kept(out) == ["apple-1", "apple-2", "apple-3"]
    rows = [json.loads(cell(out, f"apple-{n}").read_text()) for n in (1, 2, 3)]
    assert all(row["result"]["accuracy"] == 0.5 for row in rows)


class Fitted(Task):
    """Refuses one cell once the tokenizer is known."""

    def fit(self, model, cell):
        if cell == "4096":
            raise Misfit("an answer of 5000 tokens", where="--lengths", fix="use 5001")


def test_what_the_tokenizer_tells_is_refused_before_any_cell_is_run(model, tmp_path, loads):
    first, second = Task(), Fitted("pear")
    with pytest.raises(Misfit, match="pear-4096: an answer of 5000 tokens") as caught:
        suite.evaluate(model, tmp_path, [first, second])
    assert (caught.value.where, caught.value.fix) == ("--lengths", "use 5001")
    assert first.ran == second.ran == []
    assert not list((tmp_path / suite.CELLS).iterdir())
    fitting = Fitted("pear", ["2048"])
    suite.evaluate(model, tmp_path, [first, fitting])
    assert fitting.ran == ["2048"]


def test_a_failure_that_another_try_may_mend_is_told_before_one_that_none_does(
    model, tmp_path, loads
):
    class Wrong(Task):
        def run(self, model, cell, tell):
            raise Misfit("no document of that length", where="--lengths", fix="less")

    with pytest.raises(TitansError, match="pear-bad: the loss is nan"):
        suite.evaluate(model, tmp_path, [Wrong(), Task("pear", ["bad"])])
    with pytest.raises(Misfit, match="apple-2048: no document"):
        suite.evaluate(model, tmp_path, [Wrong()])
