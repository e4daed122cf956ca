import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import rows, sentences, write_jsonl

from data_prep import inputs, manifest, shard, sources, tokenizer, verify
from data_prep.manifest import Settings
from titans_pretrain.errors import TitansError, UserError


def content(directory):
    """Every final file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def texts(output, model):
    """All documents, decoded, in the stream's order."""
    done = manifest.load(output / "manifest.json")
    found = []
    for entry in done["shards"]:
        stream = verify.open_stream(output, done, entry)
        ids = stream.read(0, stream.tokens)
        ends = np.flatnonzero(ids == model.eos_id)
        found += [model.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]
    return found


def test_every_document_comes_once_in_an_order_that_is_not_the_inputs(prepare, corpus, model):
    output, done = prepare(corpus)
    given = [row["text"] for row in rows(2500, 1) + rows(40, 2)]
    found = texts(output, model)
    assert sorted(found) == sorted(given)
    assert found != given
    assert len(done["shards"]) > 1
    assert done["documents"] == {"read": 2540, "kept": 2540, "empty": 0, "score": 0, "language": 0}
    assert done["tokens"] == sum(s["tokens"] for s in done["shards"])


def test_provenance_names_every_document_of_a_shard(prepare, corpus, model):
    output, done = prepare(corpus)
    by_id = {row["id"]: row for row in rows(2500, 1) + rows(40, 2)}
    entry = done["shards"][1]
    stream = verify.open_stream(output, done, entry)
    for origin in pq.read_table(output / entry["provenance"]["name"]).to_pylist():
        ids = stream.read(origin["offset"], origin["tokens"])
        assert model.decode(ids[:-1]) == by_id[origin["id"]]["text"]
        assert origin["url"] == by_id[origin["id"]]["url"]


def test_bytes_are_a_function_of_inputs_and_settings(prepare, corpus):
    first, _ = prepare(corpus, "one")
    second, _ = prepare(corpus, "two")
    assert content(first) == content(second)
    third, _ = prepare(corpus, "three", seed=1)
    assert content(third)["00000-00000.tar"] != content(first)["00000-00000.tar"]


def test_tar_headers_carry_no_clock_and_no_owner(prepare, corpus):
    output, _ = prepare(corpus)
    with tarfile.open(output / "00000-00000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_tasks_in_any_order_leave_what_their_number_determines(prepare, corpus, model):
    for task in (2, 0, 1):
        output, done = prepare(corpus, "scattered", task=task, tasks=3)
        assert (done is None) == (task != 1)
    for task in range(3):
        other, _ = prepare(corpus, "ordered", task=task, tasks=3)
    assert content(output) == content(other)
    assert len(texts(output, model)) == 2540


def test_a_finished_task_is_skipped_and_a_damaged_one_done_again(prepare, corpus, capfd):
    output, _ = prepare(corpus)
    before = content(output)
    prepare(corpus)
    assert "finished and intact: skipped" in capfd.readouterr().err
    tar = output / "00000-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    prepare(corpus)
    assert "skipped" not in capfd.readouterr().err
    assert content(output) == before


def test_merge_refuses_gaps_and_names_the_command(prepare, corpus):
    output, _ = prepare(corpus, task=0, tasks=3)
    with pytest.raises(UserError, match="2 of 3 tasks are not finished: 1, 2") as caught:
        manifest.merge(output)
    assert "--task 1 --tasks 3" in caught.value.fix
    assert not (output / "manifest.json").exists()


def test_merge_refuses_a_shard_that_is_gone_or_cut(prepare, corpus):
    output, _ = prepare(corpus)
    tar = output / "00000-00000.tar"
    os.truncate(tar, 1000)
    with pytest.raises(UserError, match=r"00000-00000.tar has 1000 bytes"):
        manifest.merge(output)
    tar.unlink()
    with pytest.raises(UserError, match="missing"):
        manifest.merge(output)


def test_merge_refuses_tasks_of_different_plans_and_damaged_counts(prepare, corpus):
    output, _ = prepare(corpus)
    counts = output / "task-00000.unigrams.npy"
    whole = counts.read_bytes()
    counts.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(UserError, match=r"unigrams.npy is missing or damaged"):
        manifest.merge(output)
    counts.write_bytes(whole)
    task = json.loads((output / "task-00000.json").read_text())
    (output / "task-00000.json").write_text(json.dumps(task | {"plan": "other"}))
    with pytest.raises(UserError, match="another plan"):
        manifest.merge(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": 2}, "it has 1 tasks, now 2"),
        ({"seed": 7}, "it has seed 0, now 7"),
        ({"min_score": 3.5}, "it has min_score None, now 3.5"),
    ],
)
def test_another_plan_on_the_same_output_is_refused(prepare, corpus, change, message):
    prepare(corpus)
    with pytest.raises(UserError, match=message):
        prepare(corpus, **change)


def test_other_inputs_or_another_tokenizer_on_the_same_output_are_refused(
    prepare, corpus, tmp_path
):
    prepare(corpus)
    write_jsonl(tmp_path / "raw/c.jsonl", rows(3))
    with pytest.raises(UserError, match=r"the input c.jsonl is new"):
        prepare(corpus)
    (tmp_path / "raw/c.jsonl").unlink()
    other = tokenizer.train(sentences(300), 320, tmp_path / "other.model")
    with pytest.raises(UserError, match="its tokenizer has sha256"):
        prepare(corpus, tokenizer=other)
    write_jsonl(tmp_path / "raw/b.jsonl", rows(41, 2))
    with pytest.raises(UserError, match=r"its input b.jsonl has"):
        prepare(corpus)
    (tmp_path / "raw/b.jsonl").unlink()
    with pytest.raises(UserError, match=r"its input b.jsonl is not given"):
        prepare(corpus)


def test_filters_count_what_they_drop(prepare, tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"text": "good", "score": 4.0, "language": "en"},
            {"text": "bad", "score": 2.9, "language": "en"},
            {"text": "none", "score": None, "language": "en"},
            {"text": "gut", "score": 4.0, "language": "de"},
            {"text": " \n", "score": 4.0, "language": "en"},
            {"text": None, "score": 4.0, "language": "en"},
            {"text": "nan", "score": float("nan"), "language": "en"},
        ],
    )
    with open(path, "a") as handle:
        handle.write("\n")
    _, done = prepare(path, min_score=3.0, language="en")
    assert done["documents"] == {"read": 8, "kept": 1, "empty": 3, "score": 3, "language": 1}


def test_nothing_left_is_an_error(prepare, corpus):
    with pytest.raises(UserError, match="no document is left"):
        prepare(corpus, min_score=9.0)


def test_a_prompt_is_masked_and_the_answer_and_eos_are_not(prepare, tmp_path, model):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "what surprises it ", "text": "memory"}] * 30
    )
    output, done = prepare(path, prompt_column="prompt", member_tokens=64)
    assert done["masks"]
    stream = verify.open_stream(output, done, done["shards"][0])
    ids, mask = stream.read(0, stream.tokens), stream.read_mask(0, stream.tokens)
    assert model.decode(ids[: np.flatnonzero(ids == 2)[0]]) == "what surprises it memory"
    assert mask[ids == 2].all()
    assert model.decode(ids[mask & (ids != 2)]).split() == ["memory"] * 30
    verify.verify(output)


def test_a_vocabulary_over_65535_is_stored_in_four_bytes():
    assert [manifest.token_type(size) for size in (65_535, 65_536)] == ["uint16", "uint32"]


def test_a_bad_task_number_is_refused(prepare, corpus):
    with pytest.raises(UserError, match="task 3 of 3"):
        prepare(corpus, task=3, tasks=3)


def test_memory_holds_one_shard_whatever_the_unit(model, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows(5000)), tmp_path / "a.parquet", row_group_size=5000)
    items = inputs.find([f"{tmp_path}/a.parquet"])
    done = shard.prepare(items, model, tmp_path / "out", Settings(shard_bytes=1))
    assert [entry["documents"] for entry in done["shards"]] == [1000] * 5


def test_memory_holds_one_window_of_ids_and_one_batch_of_text(model, tmp_path, monkeypatch):
    import gc

    import pyarrow as pa

    values = [{"text": text, "prompt": text} for text in sentences(1500)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "LINES_PER_UNIT", 100)
    texts, documents, windows = [], [], []
    encode, write = shard._Task._encode, shard._Task._write_shard

    def measure():
        live = gc.get_objects()
        rows = [one for one in live if isinstance(one, sources.Row)]
        texts.append(sum(len(row.text) + len(row.prompt) for row in rows))
        documents.append(sum(isinstance(one, shard.Document) for one in live))

    def watched_encode(self, rows):
        measure()
        return encode(self, rows)

    def watched_write(self, window):
        windows.append(len(window))
        measure()
        write(self, window)

    monkeypatch.setattr(shard._Task, "_encode", watched_encode)
    monkeypatch.setattr(shard._Task, "_write_shard", watched_write)
    items = inputs.find([f"{tmp_path}/a.parquet"])
    settings = Settings(shard_bytes=150_000, prompt_column="prompt")
    shard.prepare(items, model, tmp_path / "out", settings)
    assert len(windows) > 1
    assert min(windows[:-1]) >= 500
    lengths = sorted(2 * len(row["text"]) for row in values)
    # A batch of rows as it comes, and the one before it that its loop still names.
    assert max(texts) <= 2 * sum(lengths[-100:])
    assert max(documents) <= max(windows)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing_half(
    prepare, corpus, monkeypatch
):
    import errno

    real = shard.TarWriter.write

    def full(self, name, array):
        if name >= "00000-000000020.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, array)

    monkeypatch.setattr(shard.TarWriter, "write", full)
    with pytest.raises(
        TitansError, match=r"cannot write 00000-0000.\.tar: No space left"
    ) as caught:
        prepare(corpus)
    assert caught.value.exit_code == 1
    output = Path(caught.value.where)
    assert not (output / "manifest.json").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    output, _ = prepare(corpus)
    verify.verify(output)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from data_prep import manifest, shard, inputs, tokenizer
    pattern, model, output, after = sys.argv[1:]
    left = int(after)
    real = os.replace
    def replace(*names):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)
    os.replace = replace
    shard.prepare(inputs.find([pattern]), tokenizer.Tokenizer(model), Path(output),
                  manifest.Settings(shard_bytes=40_000, member_tokens=1024),
                  command=["--input", pattern])
"""


@pytest.mark.parametrize("after", [0, 2, 5])
def test_killed_anywhere_no_half_file_has_a_final_name_and_a_rerun_ends_equal(
    prepare, corpus, model, tmp_path, after
):
    whole, _ = prepare(corpus, "whole")
    output = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        corpus,
        str(model.path),
        str(output),
        str(after),
    ]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    expected = content(whole)
    for name, held in content(output).items():
        assert name.startswith(".") or held == expected[name]
    prepare(corpus, "killed")
    finals = {name: held for name, held in content(output).items() if not name.startswith(".")}
    assert finals == expected
    assert not list(output.glob(".*0000*"))


def test_nothing_of_it_loads_torch():
    command = "import sys, data_prep.shard, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


def test_a_plan_of_another_format_is_refused(prepare, corpus):
    output, _ = prepare(corpus)
    path = output / "plan.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2"):
        prepare(corpus)
