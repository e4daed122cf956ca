"""The instruments of prepare_data.py: what they measure, make and read back."""

import json
import sys

import contender_ids
import corpus
import numpy as np
import peers
import pyarrow.parquet
import pytest
from prepare_runs import Contender, Trial
from prepare_tables import Row, memory_verdicts, verdicts

from titans_pretrain.errors import TitansError

TEXTS = [f"document {number}\nof {number % 7} lines\n" * (1 + number % 5) for number in range(40)]


def made(tmp_path, **options):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {"characters": 10**9, "downloads": tmp_path, "own": [own]} | options
    return corpus.make(tmp_path / "text", **options)


def texts(found):
    return [
        text
        for file in found.files
        for text in pyarrow.parquet.read_table(file).column("text").to_pylist()
    ]


def test_a_measured_command_counts_its_children():
    child = "x = b'1' * 80_000_000\nfor _ in range(3_000_000): pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = peers.measure([sys.executable, "-c", code + "; print('{\"cpu\": 1}')"], cores=1)
    alone = peers.measure([sys.executable, "-c", "pass"], cores=1)
    assert done.result() == {"cpu": 1}
    assert done.child_peak > 80_000_000 > done.main_peak > 0
    assert done.cpu > alone.cpu
    assert done.wall > 0
    assert alone.child_peak == 0


def test_a_measured_command_may_use_only_its_cores():
    done = peers.measure(
        [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"], cores=1
    )
    assert done.result() == 1


def test_a_command_that_fails_is_told_with_its_last_lines():
    with pytest.raises(TitansError, match="exit code 3\nno such thing"):
        peers.measure(
            [
                sys.executable,
                "-c",
                "import sys; print('no such thing', file=sys.stderr); sys.exit(3)",
            ]
        )


def test_a_corpus_holds_every_document_once_in_rows_of_fineweb_edu(tmp_path):
    found = made(tmp_path)
    assert sorted(texts(found)) == sorted(set(TEXTS))
    assert found.documents == len(set(TEXTS))
    assert found.passes == 1
    assert pyarrow.parquet.read_schema(found.files[0]).names == corpus.SCHEMA.names
    assert [json.loads(line)["text"] for line in found.jsonl().read_text().splitlines()] == texts(
        found
    )
    assert texts(found.first(tmp_path / "two", 2)) == texts(found)[:2]


def test_a_corpus_is_made_once_and_again_for_other_arguments(tmp_path):
    found = made(tmp_path)
    stamp = found.files[0].stat().st_mtime_ns
    assert made(tmp_path) == found
    assert found.files[0].stat().st_mtime_ns == stamp
    smaller = made(tmp_path, characters=100)
    assert 100 <= smaller.characters < found.characters


def test_repeated_text_changes_from_pass_to_pass(tmp_path):
    found = made(tmp_path, characters=5 * sum(map(len, set(TEXTS))), repeat=True)
    assert found.passes == 5
    assert len(set(texts(found))) > 3 * len(set(TEXTS))


def test_html_and_pod_lose_their_markup():
    page = "<head><title>t</title></head><p>One &amp;\n two<p>three <pre>a\n b</pre>"
    assert corpus._html(page) == "One & two\nthree\na\nb"
    assert corpus._pod("=head1 NAME\n\nC<tell> me\n\n=cut\n\n=over 4") == "NAME\ntell me"


def test_a_document_counts_as_equal_only_if_no_id_differs():
    reference = [np.array([5, 6]), np.array([7])]
    assert contender_ids.equal([np.array([5, 6]), np.array([8])], reference) == 1
    assert contender_ids.equal([np.array([5, 6, 2]), np.array([7])], reference) == 1
    assert [list(ids) for ids in contender_ids.with_eos(reference, 2)] == [[5, 6, 2], [7, 2]]


def row(name, work, encoder="", timed=False):
    contender = Contender(name, run=None, read=None, encoder=encoder, timed=timed)
    return Row(contender, [Trial(1 + seconds, 1 + seconds, 1, 1, 5, 0) for seconds in work])


def test_targets_are_judged_by_the_median_of_the_rounds_ratios():
    rows = [
        row("sentencepiece alone", (10, 20, 10), timed=True),
        row("gigatoken alone", (1, 2, 1), timed=True),
        row("datatrove DocumentTokenizer", (19, 40, 20)),
        row("slow", (10, 20, 10), "sentencepiece"),
        row("quick", (1.5, 3, 1.5), "fast"),
    ]
    found = {(one["ours"], one["peer"]): one for one in verdicts(rows, 100)}
    assert found["slow", "datatrove DocumentTokenizer"]["ratio"] == 2
    assert found["slow", "datatrove DocumentTokenizer"]["least"] == 1.9
    assert {key: one["pass"] for key, one in found.items()} == {
        ("slow", "datatrove DocumentTokenizer"): True,
        ("quick", "datatrove DocumentTokenizer"): True,
        ("slow", "sentencepiece alone"): True,
        ("quick", "gigatoken alone"): True,
    }
    rows[3] = row("slow", (12, 24, 12), "sentencepiece")
    assert [one["pass"] for one in verdicts(rows, 100)] == [False, True, False, True]


def test_text_too_short_to_measure_is_refused():
    with pytest.raises(TitansError, match="no longer than on one document"):
        row("ours", (1, -0.5, 1)).rates(100)


def test_a_clock_that_shows_nothing_gives_no_rate():
    found = Row(row("ours", ()).contender, [Trial(3, 3, 1, 4, 5, 0)]).found(100)
    assert (found["rate"], found["wall_rate"]) == (50, None)


def test_memory_that_grows_with_the_input_fails():
    rows = [
        {"encoder": encoder, "worker": peak}
        for encoder, peaks in (("sentencepiece", (100, 109)), ("fast", (100, 120)))
        for peak in peaks
    ]
    assert [one["pass"] for one in memory_verdicts(rows)] == [True, False]
