"""Worker processes change how fast a task is, and nothing else."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from made_up import rows, write_jsonl
from outputs import content

from data_prep import manifest, plan, schema, task, workers
from data_prep.batch import Encoding, Span, Work
from data_prep.inputs import Input
from data_prep.settings import Settings
from data_prep.sources import Layout
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture
def many_units(tmp_path):
    """Twelve units of very different size."""
    (tmp_path / "many").mkdir()
    for index, count in enumerate((1500, 3, 700, 1, 40, 2500, 5, 900)):
        write_jsonl(tmp_path / f"many/{index}.jsonl", rows(count, index))
    return f"{tmp_path}/many/*.jsonl"


def work_of(output):
    frozen, tokenizer = plan.load(output)
    return Work(frozen.task_units(0), frozen.settings(), tokenizer.path, "sentencepiece")


def seen(encoding, spans):
    with encoding as open_encoding:
        return [
            (span, index, batch.ids.tolist(), batch.lengths.tolist(), batch.counts)
            for span, index, batch in open_encoding.batches(spans)
        ]


@pytest.mark.parametrize("ahead", [1, 2**24])
def test_batches_come_in_order_whatever_the_number_of_workers(
    freeze, many_units, monkeypatch, ahead
):
    monkeypatch.setattr(workers, "AHEAD_BYTES", ahead)
    work = work_of(freeze(many_units))
    spans = [Span(0, 1), *(Span(unit) for unit in range(1, len(work.units)))]
    expected = seen(Encoding(work), spans)
    assert len(expected) > 8
    assert seen(workers.Workers(work, 3), spans) == expected


def test_a_span_ends_before_the_batch_it_names(freeze, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(3500)), tmp_path / "a.parquet")
    work = work_of(freeze(tmp_path / "a.parquet"))
    spans = [Span(0, 1, 3)]
    found = seen(workers.Workers(work, 1), spans)
    assert [index for _, index, *_ in found] == [1, 2]
    assert found == seen(Encoding(work), spans)


def test_the_output_does_not_depend_on_workers(freeze, many_units):
    for count in (0, 1, 3):
        output = freeze(many_units, f"by-{count}", held_out=0.1)
        task.prepare(output, 0, workers=count)
    expected = content(output)
    for count in (0, 1):
        assert content(output.with_name(f"by-{count}")) == expected


def test_small_tasks_start_no_process(freeze, many_units, monkeypatch):
    started = []
    monkeypatch.setattr(workers.Workers, "_start", lambda self: started.append(self))
    task.prepare(freeze(many_units), 0)
    assert not started


@pytest.mark.parametrize(
    ("units", "size", "cores", "expected"),
    [(100, 2**34, 8, 8), (3, 2**34, 8, 3), (100, 2**34, 1, 0), (100, 2**26, 8, 4), (100, 9, 8, 0)],
)
def test_large_tasks_use_every_core_that_pays(monkeypatch, units, size, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    item = Input("a", "a", size)
    dealt = [(unit, item, Layout(units), unit) for unit in range(units)]
    assert workers.default_workers(Work(dealt, Settings(), "m", "sentencepiece")) == expected


def test_a_bad_row_ends_the_task_when_its_turn_comes_and_what_came_before_is_kept(
    freeze, many_units, tmp_path, monkeypatch
):
    nothing = dict.fromkeys(schema.EXPECTED, 0)
    monkeypatch.setattr(plan.estimate, "expected", lambda *_: nothing)  # it reads a sample
    path = tmp_path / "many/5.jsonl"
    path.write_text(path.read_text().rstrip("\n") + "\n[broken\n")
    journals = []
    for count in (0, 3):
        output = freeze(many_units, f"by-{count}", shard_bytes=1)
        with pytest.raises(UserError, match="invalid JSON") as caught:
            task.prepare(output, 0, workers=count)
        assert caught.value.where == f"{path}:2501"
        journals.append((output / "task-00000.partial.json").read_bytes())
    assert journals[0] == journals[1]
    assert manifest.read_partial(output, 0)["windows"]


def test_a_worker_that_is_killed_is_named_and_the_task_can_go_on(freeze, many_units, monkeypatch):
    whole = freeze(many_units, "whole", shard_bytes=1)
    task.prepare(whole, 0)
    output = freeze(many_units, shard_bytes=1)
    real = workers.Workers.batches

    def kills(self, spans):
        for number, found in enumerate(real(self, spans)):
            if number == 4:
                for process in self._processes.values():
                    process.kill()
                    process.wait()
            yield found

    monkeypatch.setattr(workers.Workers, "batches", kills)
    monkeypatch.setattr(workers, "AHEAD_BYTES", 1)  # so that there is work left then
    with pytest.raises(TitansError, match="a worker process was killed by SIGKILL") as caught:
        task.prepare(output, 0, workers=2)
    assert "fewer --workers" in caught.value.fix
    monkeypatch.undo()
    kept = len(manifest.read_partial(output, 0)["windows"])
    assert 0 < kept < len(manifest.read_task(whole, 0)["windows"])
    task.prepare(output, 0, workers=2)
    assert content(output) == content(whole)


def test_a_failure_that_nobody_foresaw_names_the_unit_and_leaves_a_trace(freeze, many_units, capfd):
    work = work_of(freeze(many_units))
    with pytest.raises(TitansError, match="a worker process failed: IndexError") as caught:
        seen(workers.Workers(work, 1), [Span(99)])
    assert "unit=99" in caught.value.where
    assert "Traceback" in capfd.readouterr().err


def test_what_keeps_a_worker_from_starting_is_told_as_it_is(freeze, many_units, tmp_path):
    work = work_of(freeze(many_units))
    with pytest.raises(UserError, match="no encoder 'quick'") as expected:
        Encoding(replace(work, encoder="quick"))
    spans = [Span(unit) for unit in range(6)]
    with pytest.raises(UserError, match="no encoder 'quick'") as caught:
        seen(workers.Workers(replace(work, encoder="quick"), 2), spans)
    assert str(caught.value) == str(expected.value)


def test_a_worker_that_cannot_start_for_an_unforeseen_reason_leaves_a_trace(
    freeze, many_units, tmp_path, capfd
):
    (tmp_path / "bad.npy").write_bytes(b"no array")
    work = replace(work_of(freeze(many_units)), duplicates=tmp_path / "bad.npy")
    with pytest.raises(TitansError, match="a worker process failed: ValueError") as caught:
        seen(workers.Workers(work, 1), [Span(0)])
    assert caught.value.where == "its start"
    assert "Traceback" in capfd.readouterr().err


def test_a_connection_that_breaks_in_a_source_is_not_taken_for_a_parent_that_is_gone():
    def encode(span):
        yield 0, "a batch"
        raise BrokenPipeError(32, "Broken pipe")

    ours, theirs = multiprocessing.Pipe()
    workers._serve(theirs, encode, Span(3))
    assert ours.recv() == (workers.BATCH, (0, "a batch"))
    kind, error = ours.recv()
    assert kind == workers.ERROR
    assert "BrokenPipeError" in error.what


def test_a_program_in_the_working_directory_is_not_imported(
    freeze, many_units, tmp_path, monkeypatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('foreign code')")
    monkeypatch.chdir(tmp_path)
    work = work_of(freeze(many_units))
    assert seen(workers.Workers(work, 1), [Span(0)])


ORPHANING = """
    import sys, time
    from pathlib import Path
    from data_prep import workers
    from data_prep.task import prepare
    real = workers.Workers.batches
    def slow(self, spans):
        for found in real(self, spans):
            print(*(process.pid for process in self._processes.values()), flush=True)
            time.sleep(60)
            yield found
    workers.Workers.batches = slow
    prepare(Path(sys.argv[1]), 0, workers=2)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(freeze, many_units, signal_number):
    output = freeze(many_units)
    command = [sys.executable, "-c", textwrap.dedent(ORPHANING), str(output)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    assert all(map(alive, children))
    parent.send_signal(signal_number)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))


PEAKS = """
    import resource, sys
    from pathlib import Path
    from data_prep.task import prepare
    prepare(Path(sys.argv[1]), 0, workers=int(sys.argv[2]))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [0, 2])
def test_peak_memory_does_not_depend_on_the_size_of_the_input(freeze, tmp_path, count):
    import pyarrow as pa
    import pyarrow.parquet as pq

    peaks = []
    for times in (3, 20):
        path = tmp_path / f"{times}.parquet"
        texts = [{"text": f"{index} " + row["text"] * 8} for index, row in enumerate(rows(1000))]
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for _ in range(times):
                writer.write_table(pa.Table.from_pylist(texts), row_group_size=1000)
        output = freeze(path, f"of-{times}", shard_bytes=1_000_000, member_tokens=2**18)
        command = [sys.executable, "-c", textwrap.dedent(PEAKS), str(output), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append([int(line) for line in done.stdout.split()])
    text = 17 * 1000 * 8 * 150 / 2**20  # MB that the larger input has more
    for small, large in zip(*peaks, strict=True):
        assert large - small < text / 2
