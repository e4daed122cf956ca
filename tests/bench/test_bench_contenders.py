"""Contenders are measured in turns, each in a process of its own that can fail alone."""

import itertools
import pickle
from pathlib import Path

import pytest
from stub_contenders import FILE, ONE, named

from titans_pretrain.bench import contenders, worker
from titans_pretrain.bench.contenders import WORKER, Contender, ContenderFailed, Field, Worker
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import TitansError


def test_contenders_take_turns_round_after_round(tmp_path, capsys):
    log = tmp_path / "log"
    everyone = [named(name, name=name, log=str(log)) for name in "abc"]
    jobs = [(name, "training") for name in "abc"]
    with Field.of(everyone, ONE, Tell()) as field:
        built = field.build(length=5)
        field.times(jobs, 1)
        turns = log.read_text().split()
    order = [turns[0]] + [b for a, b in itertools.pairwise(turns) if a != b]
    assert order == list("abcabc")  # the first pass of each, then a round
    assert turns[:3] == list("abc")  # the uncounted pass is one call
    assert built["a"]["seen"] == {"length": 5}


def test_a_time_is_that_of_one_call(tmp_path):
    log = tmp_path / "log"
    with Worker(named("a", name="a", log=str(log)), ONE) as worker:
        worker.build()
        found = worker.time("training", 0.05)
    calls = len(log.read_text().split())
    assert calls > 1
    assert 0 < found["seconds"] * calls < 60
    assert set(found) == {"seconds", "processor"}


def test_one_that_waits_for_its_turn_has_forgotten_what_a_pass_left():
    left = []
    subject = worker.Subject("cpu")
    subject.passes = {"training": lambda: left.append(1), "forget": left.clear}
    assert subject.time("training", 0.0)["seconds"] > 0
    assert not left


def test_what_libraries_print_is_no_answer():
    with Worker(named("a", "talks"), ONE) as worker:
        assert worker.build() == {"argv": ["cpu", "0"]}
        assert worker.time("training")["seconds"] > 0


def test_a_contender_has_its_threads_cores_and_variables_and_nobodys_modules():
    contender = Contender(
        "a", FILE, "surroundings", {"worker": str(WORKER)}, variables={"MARK": "here"}
    )
    with Worker(contender, contenders.Machine("cpu", 3, cores=1)) as worker:
        found = worker.build()
    assert found == {"threads": "3", "cores": 1, "shadowed": False, "marked": "here"}


def test_one_that_fails_is_left_out_where_it_is_not_required(capsys):
    everyone = [named("a"), named("b", "broken", required=False)]
    jobs = [("a", "training"), ("b", "training")]
    with Field.of(everyone, ONE, Tell()) as field:
        assert list(field.build()) == ["a"]
        assert list(field.times(jobs, 1)) == [("a", "training")]
    assert "b is left out: ValueError: heads do not fit" in capsys.readouterr().err


def test_one_that_fails_in_a_round_has_no_times(capsys):
    everyone = [named("a"), named("b", "fails_when_run", required=False)]
    with Field.of(everyone, ONE, Tell()) as field:
        field.build()
        found = field.times([("a", "training"), ("b", "training")], 2)
    assert {job: len(times) for job, times in found.items()} == {("a", "training"): 2}
    assert "MemoryError: no room" in capsys.readouterr().err


def test_one_that_is_required_fails_the_run():
    with (
        Field.of([named("b", "broken")], ONE, Tell()) as field,
        pytest.raises(ContenderFailed, match="heads do not fit") as caught,
    ):
        field.build()
    assert (caught.value.where, caught.value.kind) == ("b", "ValueError")
    assert isinstance(caught.value, TitansError)
    assert pickle.loads(pickle.dumps(caught.value)).kind == "ValueError"


def test_a_process_that_is_killed_is_told():
    with Worker(named("a", "dies"), ONE) as worker:
        worker.build()
        for _ in range(2):  # the second time nobody reads what is asked
            with pytest.raises(ContenderFailed, match="killed by signal 9"):
                worker.time("training")


def test_a_process_that_exits_is_told_with_its_last_lines():
    with (
        Worker(named("a", "exits"), ONE) as worker,
        pytest.raises(ContenderFailed, match="exit code 3\nthe reason"),
    ):
        worker.build()


def test_an_interpreter_that_is_none_is_told():
    contender = Contender("a", FILE, "quick", python=Path("/no/such/python"))
    with pytest.raises(ContenderFailed, match="cannot be started") as caught:
        Worker(contender, ONE)
    assert caught.value.kind == "FileNotFoundError"


def test_peak_memory_is_that_of_a_pass_with_nothing_left_of_one_before():
    size = 200_000_000
    found = contenders.peak(named("a", "allocates"), ONE, "training", length=size)
    assert size * 0.9 < found < size * 1.5


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_the_allocators():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from titans_pretrain.bench import machine

    place = contenders.Machine("cuda", 1)
    with Worker(machine.contender(place, "bf16"), place) as worker:
        facts = worker.build(size=256, bytes=2**20)
        assert worker.time("product")["seconds"] > 0
        assert worker.peak("copy") < facts["bytes"]


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys):
    tell = Tell()
    tell.progress("one")
    tell.progress("two")
    tell.notice("three")
    assert capsys.readouterr().err == "one\nthree\n"


def test_progress_on_a_terminal_is_written_over_itself(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    tell = Tell()
    tell.progress("a long one")
    tell.progress("short")
    tell.notice("kept")
    told = capsys.readouterr().err
    assert told.startswith("\ra long one\rshort     ")
    assert told.endswith("\r     \rkept\n")
