"""One task: what it writes, what it keeps, what it mends."""

import gc
import json
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import rows, sentences, write_jsonl
from outputs import content, documents, stream, texts

from data_prep import batch, manifest, sources, task, verify, window
from data_prep.rows import Row
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

NONE = dict.fromkeys(batch.COUNTS, 0)


def shards(done):
    return [*done["shards"], *done["held_out"]]


def test_every_document_comes_once_in_an_order_that_is_not_the_inputs(prepare, corpus, model):
    output, done = prepare(corpus)
    given = [row["text"] for row in rows(2500, 1) + rows(40, 2)]
    found = texts(output, model)
    assert sorted(found) == sorted(given)
    assert found != given
    assert len(done["shards"]) > 1
    assert done["documents"] == NONE | {"read": 2540, "kept": 2540}
    assert done["tokens"] == sum(s["tokens"] for s in done["shards"])


def test_provenance_names_every_document_of_a_shard(prepare, corpus, model):
    output, done = prepare(corpus, held_out=0.2)
    by_id = {row["id"]: row for row in rows(2500, 1) + rows(40, 2)}
    named = []
    for entry in shards(done):
        tokens = stream(output, done, entry)
        for origin in pq.read_table(output / entry["provenance"]["name"]).to_pylist():
            ids = tokens.read(origin["offset"], origin["tokens"])
            assert model.decode(ids[:-1]) == by_id[origin["id"]]["text"]
            assert origin["url"] == by_id[origin["id"]]["url"]
            named.append(origin["id"])
    assert sorted(named) == sorted(by_id)


def test_bytes_are_a_function_of_inputs_and_settings(prepare, corpus):
    first, _ = prepare(corpus, "one")
    second, _ = prepare(corpus, "two")
    assert content(first) == content(second)
    third, _ = prepare(corpus, "three", seed=1)
    assert content(third)["00000-00000.tar"] != content(first)["00000-00000.tar"]


def test_nothing_else_stays_in_the_directory(prepare, corpus):
    output, done = prepare(corpus, held_out=0.2)
    named = {entry["name"] for shard in shards(done) for entry in manifest.files(shard)}
    own = {"plan.json", "manifest.json", "tokenizer.model"}
    own |= {"task-00000.json", "task-00000.unigrams.npy"}
    assert {path.name for path in output.iterdir()} == named | own


def test_tar_headers_carry_no_clock_and_no_owner(prepare, corpus):
    output, _ = prepare(corpus)
    with tarfile.open(output / "00000-00000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


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
            {"text": "x", "score": 4.0, "language": "en"},
            {"text": "far too long", "score": 4.0, "language": "en"},
            {"text": "h\ud800", "score": 4.0, "language": "en"},
        ],
    )
    with open(path, "a") as handle:
        handle.write("\n[broken")
    filters = {"min_score": 3.0, "language": "en", "min_characters": 2, "max_characters": 9}
    _, done = prepare(path, bad_rows="skip", **filters)
    dropped = {"empty": 3, "score": 3, "language": 1, "short": 1, "long": 1, "bad": 1}
    assert done["documents"] == NONE | {"read": 12, "kept": 2, "repaired": 1} | dropped


def test_nothing_left_is_an_error(prepare, corpus):
    with pytest.raises(UserError, match="no document is left"):
        prepare(corpus, min_score=9.0)


def test_rows_after_the_last_window_are_counted_too(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 1500)
    values = [{"text": "kept " * 200}] * 200 + [{"text": ""}] * 5
    write_jsonl(tmp_path / "b.jsonl", values)
    output, done = prepare(f"{tmp_path}/*.jsonl", shard_bytes=1)
    assert done["documents"] == NONE | {"read": 1705, "kept": 200, "empty": 1505}
    assert [shard["documents"] for shard in done["shards"]] == [200]
    verify.verify(output)


def test_the_held_out_split_is_the_same_documents_whatever_the_order(prepare, corpus, model):
    one, first = prepare(corpus, "one", held_out=0.2)
    two, _ = prepare(corpus, "two", held_out=0.2, seed=5)
    held_out = sorted(texts(one, model, "held_out"))
    assert held_out == sorted(texts(two, model, "held_out"))
    assert 300 < len(held_out) < 700
    assert first["documents"]["held_out"] == len(held_out)
    assert sorted(held_out + texts(one, model)) == sorted(
        row["text"] for row in rows(2500, 1) + rows(40, 2)
    )
    assert first["held_out_tokens"] == sum(shard["tokens"] for shard in first["held_out"])


def test_prompts_are_not_for_the_fast_encoder(prepare, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "what", "text": "memory"}])
    with pytest.raises(UserError, match="--encoder fast gives no places of pieces") as caught:
        prepare(path, prompt_column="prompt", encoder="fast")
    assert caught.value.fix == "use --encoder sentencepiece"


def test_equal_answers_to_different_prompts_fall_on_both_sides_of_the_split(prepare, tmp_path):
    asked = [{"prompt": f"is {number} even?", "text": "yes"} for number in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", asked)
    _, done = prepare(path, prompt_column="prompt", held_out=0.5)
    assert 30 < done["documents"]["held_out"] < 70


def test_a_window_of_held_out_documents_alone_has_no_training_shard(prepare, tmp_path):
    from data_prep.filters import is_held_out

    held_out = [text for text in sentences(100) if is_held_out(text, 0.5)]
    trained = [text for text in sentences(100) if not is_held_out(text, 0.5)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in held_out])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in trained])
    output, done = prepare(f"{tmp_path}/*.jsonl", held_out=0.5, shard_bytes=1)
    windows = manifest.read_task(output, 0)["windows"]
    assert [entry["shard"] is None for entry in windows].count(True) == 1
    assert [entry["held_out"] is None for entry in windows].count(True) == 1
    assert done["documents"]["held_out"] == len(held_out)
    verify.verify(output)


def test_bos_begins_every_document_where_asked_for(prepare, corpus, model):
    plain, _ = prepare(corpus, "plain")
    output, done = prepare(corpus, "begun", bos=True, shard_bytes=10**9)
    assert done["bos"]
    for ids in documents(output):
        assert ids[0] == model.bos_id
        assert model.bos_id not in ids[1:]
    assert sorted(ids[1:] for ids in documents(output)) == sorted(documents(plain))
    verify.verify(output)


def test_a_prompt_is_masked_and_the_answer_and_eos_are_not(prepare, tmp_path, model):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "what surprises it ", "text": "memory"}] * 30
    )
    output, done = prepare(path, prompt_column="prompt", member_tokens=64, bos=True)
    assert done["masks"]
    tokens = stream(output, done, done["shards"][0])
    ids, mask = tokens.read(0, tokens.tokens), tokens.read_mask(0, tokens.tokens)
    first = ids[: np.flatnonzero(ids == 2)[0]]
    assert model.decode(first[1:]) == "what surprises it memory"
    assert mask[ids == 2].all()
    assert not mask[ids == 1].any()
    assert model.decode(ids[mask & (ids != 2)]).split() == ["memory"] * 30
    verify.verify(output)


def test_all_but_the_first_of_equal_documents_are_dropped_where_asked_for(prepare, tmp_path, model):
    values = rows(30)
    write_jsonl(tmp_path / "a.jsonl", values)
    write_jsonl(tmp_path / "b.jsonl", [row | {"id": "again"} for row in values[::2]])
    output, done = prepare(f"{tmp_path}/*.jsonl", drop_duplicates=True)
    assert sorted(texts(output, model)) == sorted(row["text"] for row in values)
    assert done["documents"]["duplicate"] == 15
    table = pq.read_table(output / done["shards"][0]["provenance"]["name"])
    assert "again" not in table["id"].to_pylist()


def test_a_vocabulary_over_65535_is_stored_in_four_bytes():
    assert [manifest.token_type(size) for size in (65_535, 65_536)] == ["uint16", "uint32"]


def test_a_bad_task_number_is_refused(prepare, corpus):
    with pytest.raises(UserError, match="task 3 of 3"):
        prepare(corpus, task=3, tasks=3)


def test_webdataset_reads_the_tars(prepare, corpus):
    import webdataset

    output, done = prepare(corpus, prompt_column="id")
    entry = done["shards"][0]
    samples = list(webdataset.WebDataset(str(output / entry["name"]), shardshuffle=False).decode())
    tokens = stream(output, done, entry)
    found = np.concatenate([sample["npy"] for sample in samples])
    assert np.array_equal(found, tokens.read(0, tokens.tokens))
    masks = np.concatenate([sample["mask.npy"] for sample in samples])
    assert np.array_equal(masks, tokens.read_mask(0, tokens.tokens))


def test_a_finished_task_is_skipped(prepare, corpus, capfd):
    output, _ = prepare(corpus)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    prepare(corpus)
    assert "finished and intact: skipped" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.tar")} == before


def flip(path):
    held = path.read_bytes()
    path.write_bytes(held[:-3000] + bytes([held[-3000] ^ 1]) + held[-2999:])


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink(), lambda path: path.open("w")])
@pytest.mark.parametrize(
    "name",
    ["00000-00002.tar", "held-out-00000-00001.tar", "00000-00001.documents.parquet"],
)
def test_a_damaged_shard_alone_is_made_again(prepare, corpus, damage, name):
    output, _ = prepare(corpus, held_out=0.2)
    before = content(output)
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    damage(output / name)
    prepare(corpus, held_out=0.2)
    assert content(output) == before
    later = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    window_of = name.removeprefix("held-out-")[:11]
    assert {path.name for path in times if times[path] != later[path]} <= {
        f"{kind}{window_of}.tar" for kind in ("", "held-out-")
    }


@pytest.mark.parametrize("name", ["00000-00000.index.npy", "task-00000.unigrams.npy"])
def test_every_other_file_is_made_again_too(prepare, corpus, name):
    output, _ = prepare(corpus)
    before = content(output)
    (output / name).unlink()
    prepare(corpus)
    assert content(output) == before


def test_a_damaged_task_file_costs_the_task_but_changes_nothing(prepare, corpus):
    output, _ = prepare(corpus)
    before = content(output)
    (output / "task-00000.json").write_text("{")
    prepare(corpus)
    assert content(output) == before


def test_a_shard_that_does_not_come_out_as_recorded_is_refused(prepare, corpus):
    output, _ = prepare(corpus)
    path = output / "task-00000.json"
    entry = json.loads(path.read_text())
    entry["windows"][1]["shard"]["sha256"] = "0" * 64
    path.write_text(json.dumps(entry))
    before = content(output)
    refused = pytest.raises(UserError, match=r"00000-00001.tar, made again, is not as recorded")
    with refused as caught:
        task.prepare(output, 0)
    assert "the input or the tokenizer changed" in caught.value.what
    assert content(output) == before


def test_counts_that_do_not_come_out_as_recorded_are_refused(prepare, corpus):
    output, _ = prepare(corpus)
    path = output / "task-00000.json"
    entry = json.loads(path.read_text())
    for counts in (entry["windows"][1]["documents"], entry["documents"]):
        counts["empty"] += 1
        counts["read"] += 1
    path.write_text(json.dumps(entry))
    (output / "00000-00001.tar").unlink()
    with pytest.raises(UserError, match="made again, is not as recorded"):
        task.prepare(output, 0)


def test_provenance_that_another_pyarrow_wrote_is_taken_as_it_is_now(prepare, corpus):
    output, _ = prepare(corpus)
    before = content(output)
    path = output / "task-00000.json"
    entry = json.loads(path.read_text())
    entry["windows"][1]["shard"]["provenance"] |= {"bytes": 5, "sha256": "0" * 64}
    path.write_text(json.dumps(entry))
    task.prepare(output, 0)
    assert content(output) == before


def test_the_journal_is_followed_from_its_last_window(prepare, corpus, tmp_path, monkeypatch):
    whole, _ = prepare(corpus, "whole")
    real = window.WindowWriter.write

    def fails_late(self, index, *rest):
        if index == 2:
            raise RuntimeError("power cut")
        return real(self, index, *rest)

    monkeypatch.setattr(window.WindowWriter, "write", fails_late)
    with pytest.raises(RuntimeError):
        prepare(corpus, "cut")
    cut = tmp_path / "cut"
    journal = manifest.read_partial(cut, 0)
    assert len(journal["windows"]) == 2
    assert json.loads((cut / ".progress/00000.json").read_text())["state"] == "failed"
    made = []

    def counted(self, index, *rest):
        made.append(index)
        return real(self, index, *rest)

    monkeypatch.setattr(window.WindowWriter, "write", counted)
    (cut / "00000-00001.tar").unlink()
    prepare(corpus, "cut")
    total = len(manifest.read_task(whole, 0)["windows"])
    assert made == [1, *range(2, total)]
    assert content(cut) == content(whole)
    assert not (cut / ".progress").exists()


def test_a_journal_of_another_plan_is_not_followed(prepare, freeze, corpus):
    whole, _ = prepare(corpus, "whole")
    output = freeze(corpus)
    entry = json.loads((whole / "task-00000.json").read_text())
    del entry["unigrams"]
    (output / "task-00000.partial.json").write_text(json.dumps(entry | {"plan": "0" * 64}))
    task.prepare(output, 0)
    assert content(output) == content(whole)


def test_memory_holds_one_shard_whatever_the_unit(prepare, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(5000)), tmp_path / "a.parquet", row_group_size=5000)
    _, done = prepare(tmp_path / "a.parquet", shard_bytes=1)
    assert [entry["documents"] for entry in done["shards"]] == [1000] * 5


def test_memory_holds_two_windows_of_ids_and_one_batch_of_text(prepare, tmp_path, monkeypatch):
    values = [{"text": text, "prompt": text} for text in sentences(3000)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "ROWS", 100)
    characters, tokens = [], []
    encode = batch.Encoding._encode

    def watched(self, kept):
        live = gc.get_objects()
        read = [one for one in live if isinstance(one, Row)]
        characters.append(sum(len(row.text) + len(row.prompt) for row in read))
        tokens.append(sum(one.ids.nbytes for one in live if isinstance(one, batch.Batch)))
        return encode(self, kept)

    monkeypatch.setattr(batch.Encoding, "_encode", watched)
    gc.collect()
    gc.freeze()  # what other tests left is not counted
    _, done = prepare(tmp_path / "a.parquet", shard_bytes=150_000, prompt_column="prompt")
    gc.unfreeze()
    assert len(done["shards"]) > 3
    largest = 2 * max(entry["tokens"] for entry in done["shards"])
    assert 0 < max(tokens) <= 2 * largest + 50_000
    lengths = sorted(2 * len(row["text"]) for row in values)
    # A batch of rows as it comes, and the one before it that its loop still names.
    assert 0 < max(characters) <= 2 * sum(lengths[-100:])


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 400 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing_half_written_and_keeps_the_finished_windows(
    prepare, freeze, corpus, small_disk
):
    from titans_pretrain.errors import TitansError

    whole, _ = prepare(corpus, "whole")
    output = freeze(corpus, "disk/out")
    room = small_disk / "ballast"
    room.write_bytes(bytes(100_000))
    with pytest.raises(TitansError, match=r"cannot write .*: No space left") as caught:
        task.prepare(output, 0)
    assert caught.value.exit_code == 1
    assert "what is finished is kept" in caught.value.fix
    assert not [path for path in output.iterdir() if path.name.endswith(".tmp")]
    journal = manifest.read_partial(output, 0)
    assert journal["windows"]
    for entry in manifest.shards_of([journal]):
        for file in manifest.files(entry):
            assert sha256_file(output / file["name"]) == file["sha256"]
    room.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    task.prepare(output, 0)
    assert content(output) == content(whole)


def test_nothing_of_it_loads_torch():
    command = "import sys, data_prep.task, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
