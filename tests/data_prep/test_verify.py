import json
import os
import shlex

import numpy as np
import pytest
from made_up import rows, write_jsonl

from data_prep import manifest, verify
from titans_pretrain import cli
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file


@pytest.fixture
def output(prepare, corpus):
    return prepare(corpus)[0]


def refit(output, **change):
    """Change the first shard's entry, with a fingerprint that fits."""
    path = output / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0] |= change
    path.write_text(json.dumps(content | {"fingerprint": manifest.fingerprint(content)}))


def rewrite(output, edit):
    """Edit the first tar's bytes and make its checksum fit."""
    tar = output / "00000-00000.tar"
    held = bytearray(tar.read_bytes())
    edit(held)
    tar.write_bytes(held)
    refit(output, sha256=sha256_file(tar), bytes=len(held))


def problems(output, capsys):
    with pytest.raises(UserError) as caught:
        verify.verify(output)
    assert caught.value.exit_code == 2
    return capsys.readouterr().out, caught.value.fix


def test_a_whole_directory_is_good(output):
    assert verify.verify(output)["tokens"] > 0


def flip(path, place=3000):
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(held)


def test_a_flipped_byte_is_found_and_the_command_that_redoes_it_named(output, capsys):
    flip(output / "00000-00001.tar")
    out, fix = problems(output, capsys)
    command = f"run `titans data prepare --output {output} --task 0`"
    assert out == f"00000-00001.tar does not have its checksum\n\nto mend it:\n  {command}\n"
    assert fix == command


def test_the_named_commands_redo_just_what_is_damaged(prepare, corpus, tmp_path, capsys):
    for task in range(3):
        output, _ = prepare(corpus, "of 3", task=task, tasks=3, held_out=0.2)
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in output.iterdir()}
    damaged = ["00000-00000.tar", "held-out-00002-00000.index.npy", "00002-00000.documents.parquet"]
    flip(output / damaged[0])
    os.truncate(output / damaged[1], 100)
    (output / damaged[2]).unlink()
    out, fix = problems(output, capsys)
    told, commands = out.split("\n\nto mend it:\n")
    assert len(told.splitlines()) == 3
    assert all(name in told for name in damaged)
    assert "and 1 more" in fix
    for command in commands.splitlines():
        words = shlex.split(command.split("`")[1])
        assert words[:3] == ["titans", "data", "prepare"]
        assert cli.main(words[1:]) == 0
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in output.iterdir()}
    assert {name: held for name, (held, _) in after.items()} == {
        name: held for name, (held, _) in before.items()
    }
    windows = ("00000-00000", "00002-00000", "held-out-00000-00000", "held-out-00002-00000")
    for name in before:
        if name.endswith((".tar", ".parquet")) and not name.startswith(windows):
            assert after[name] == before[name]
    verify.verify(output)


@pytest.mark.parametrize("held", [None, "{"])
def test_a_record_that_is_gone_or_damaged_is_a_problem_though_there_is_a_manifest(
    prepare, corpus, capsys, held
):
    prepare(corpus, "two", task=0, tasks=2)
    output, _ = prepare(corpus, "two", task=1, tasks=2)
    path = output / "task-00001.json"
    whole = path.read_bytes()
    path.unlink()
    if held:
        path.write_text(held)
    out, fix = problems(output, capsys)
    assert "task-00001.json is missing or damaged" in out
    assert fix == f"run `titans data prepare --output {output} --task 1`"
    assert cli.main(["data", "prepare", "--output", str(output), "--task", "1"]) == 0
    assert path.read_bytes() == whole
    verify.verify(output)


def test_when_all_tasks_are_finished_only_the_merge_is_missing(output, capsys):
    (output / "manifest.json").unlink()
    out, fix = problems(output, capsys)
    assert "all tasks are finished, but manifest.json is missing" in out
    assert fix == f"run `titans data merge --output {output}`"


def test_a_record_of_another_plan_is_a_problem(prepare, freeze, corpus, capsys):
    prepare(corpus, "two", task=0, tasks=2)
    output, _ = prepare(corpus, "two", task=1, tasks=2)
    (output / "plan.json").unlink()
    freeze(corpus, "two", tasks=2, seed=1)
    out, fix = problems(output, capsys)
    assert "task 0 was prepared under another plan" in out
    assert "task 1 was prepared under another plan" in out
    assert fix.startswith(f"run `titans data prepare --output {output} --task 0`")


def test_a_tar_of_a_window_that_its_record_lost_is_redone_and_not_removed(output, capsys):
    path = output / "task-00000.json"
    entry = json.loads(path.read_text())
    lost = entry["windows"].pop()
    counts = lost["documents"]
    entry["documents"] = {key: entry["documents"][key] - counts[key] for key in counts}
    path.write_text(json.dumps(entry))
    content = json.loads((output / "manifest.json").read_text())
    content["shards"].pop()
    content["tokens"] -= lost["shard"]["tokens"]
    content["documents"] = entry["documents"]
    content["fingerprint"] = manifest.fingerprint(content)
    (output / "manifest.json").write_text(json.dumps(content))
    out, fix = problems(output, capsys)
    assert f"{lost['shard']['name']} is not in the manifest" in out
    assert "rm " not in out
    assert fix == f"run `titans data prepare --output {output} --task 0`"
    assert cli.main(["data", "prepare", "--output", str(output), "--task", "0"]) == 0
    verify.verify(output)


def test_a_tar_of_a_task_whose_record_is_whole_has_no_use(output, capsys):
    (output / "00000-00099.tar").write_bytes(b"")
    assert problems(output, capsys)[1] == f"run `rm {output / '00000-00099.tar'}`"


def test_before_the_merge_the_finished_tasks_are_checked(prepare, corpus, capsys):
    output, _ = prepare(corpus, task=1, tasks=3)
    assert verify.verify(output)["finished"] == [1]
    flip(output / "00001-00000.tar")
    out, fix = problems(output, capsys)
    assert "00001-00000.tar does not have its checksum" in out
    assert "--task 1" in fix


def test_with_no_task_finished_there_is_nothing_to_verify(freeze, corpus):
    output = freeze(corpus, tasks=2)
    with pytest.raises(UserError, match="no task is finished") as caught:
        verify.verify(output)
    assert "--task 0" in caught.value.fix


def test_a_copy_without_its_plan_is_verified_too(output, capsys):
    for path in (*output.glob("task-*"), output / "plan.json"):
        path.unlink()
    verify.verify(output)
    flip(output / "00000-00000.tar")
    assert "copy it back: without plan.json" in problems(output, capsys)[1]


def test_problems_come_in_the_shards_order_whatever_the_number_of_workers(output, capsys):
    for path in output.glob("0*.tar"):
        flip(path)
    told = []
    for workers in (1, 8):
        with pytest.raises(UserError, match="3 problems, first: 00000-00000"):
            verify.verify(output, workers=workers)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_progress_tells_how_much_is_left(output, capsys, monkeypatch):
    monkeypatch.setattr(verify, "LINE_SECONDS", 0.0)
    verify.verify(output)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("verified 522 KB of 522 KB")
    assert lines[-1].endswith("ETA 00:00:00")


def test_a_cut_and_a_missing_tar_are_found(output, capsys):
    os.truncate(output / "00000-00000.tar", 5000)
    (output / "00000-00001.tar").unlink()
    out, _ = problems(output, capsys)
    assert "00000-00000.tar has 5000 bytes instead of" in out
    assert "00000-00001.tar is missing" in out


def test_damage_under_a_fitting_checksum_is_found(output, capsys):
    def header(held):
        held[100] ^= 1

    rewrite(output, header)
    assert "damaged header" in problems(output, capsys)[0]


def test_a_member_gone_at_a_boundary_is_found(output, capsys):
    def cut(held):
        del held[512 * 5 : 512 * 10]  # the second member: header and 4 blocks and padding

    rewrite(output, cut)
    assert "00000-00000.tar" in problems(output, capsys)[0]


def test_an_id_beyond_the_vocabulary_is_found(output, capsys):
    def edit(held):
        held[640:642] = (60_000).to_bytes(2, "little")

    rewrite(output, edit)
    assert "00000-00000-000000.npy: id 60000 in a vocabulary of 350" in problems(output, capsys)[0]


def test_a_missing_eos_is_found(output, capsys):
    content = manifest.load(output / "manifest.json")
    stream = verify.open_stream(output, content, content["shards"][0])
    last = stream._tokens[-1]
    end = last.offset + 2 * last.length

    def edit(held):
        held[end - 2 : end] = (5).to_bytes(2, "little")

    rewrite(output, edit)
    out, _ = problems(output, capsys)
    assert "does not end with EOS" in out
    assert "documents instead of" in out


def test_wrong_counts_are_found(output, capsys):
    refit(output, tokens=5)
    out, _ = problems(output, capsys)
    assert "tokens instead of 5" in out
    assert "do not add up" in out


def test_a_manifest_that_was_edited_is_refused(output):
    path = output / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1', 1))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        verify.verify(output)


def test_a_manifest_of_another_format_is_refused(output):
    path = output / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match="has format 1, this version reads 2"):
        verify.verify(output)


def test_another_tokenizer_is_found(output, capsys):
    (output / "tokenizer.model").write_bytes(b"other")
    assert "not the tokenizer" in problems(output, capsys)[0]
    (output / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in problems(output, capsys)[0]


def test_a_tar_that_the_manifest_lacks_is_found(output, capsys):
    (output / "extra.tar").write_bytes(b"")
    out, fix = problems(output, capsys)
    assert "extra.tar is not in the manifest" in out
    assert fix == f"run `rm {output / 'extra.tar'}`"


def test_provenance_of_other_documents_is_found(prepare, output, tmp_path, capsys):
    one = output / "00000-00000.documents.parquet"
    one.write_bytes((output / "00000-00001.documents.parquet").read_bytes())
    size = {"name": one.name, "bytes": one.stat().st_size, "sha256": sha256_file(one)}
    refit(output, provenance=size)
    assert "does not tell where the documents" in problems(output, capsys)[0]


def test_masks_beyond_one_are_found(prepare, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "what ", "text": "memory"}] * 9)
    output, content = prepare(path, prompt_column="prompt")
    stream = verify.open_stream(output, content, content["shards"][0])

    def edit(held):
        held[stream._masks[0].offset] = 7

    rewrite(output, edit)
    assert "the mask holds 7" in problems(output, capsys)[0]


def test_masks_against_the_manifest_are_found(output, prepare, tmp_path, capsys):
    path = output / "manifest.json"
    content = json.loads(path.read_text()) | {"masks": True}
    path.write_text(json.dumps(content | {"fingerprint": manifest.fingerprint(content)}))
    assert "00000-00000.tar has no masks, against the manifest" in problems(output, capsys)[0]
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "what ", "text": "memory"}] * 9)
    output, content = prepare(source, "masked", prompt_column="prompt")
    content |= {"masks": False}
    content["fingerprint"] = manifest.fingerprint(content)
    (output / "manifest.json").write_text(json.dumps(content))
    assert "00000-00000.tar has masks, against the manifest" in problems(output, capsys)[0]


@pytest.mark.parametrize("ending", ["documents.parquet", "index.npy"])
def test_a_change_beside_a_tar_is_found(output, capsys, ending):
    path = output / f"00000-00000.{ending}"
    flip(path, 9)
    assert f"{path.name} does not have its checksum\n" in problems(output, capsys)[0]


def test_block_checksums_of_another_stream_are_found(output, capsys):
    path = output / "00000-00000.index.npy"
    np.save(path, np.load(path) + np.uint64(1))
    refit(
        output, index={"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    )
    expected = "00000-00000.index.npy does not have the checksums of the blocks of 00000-00000.tar"
    assert expected in problems(output, capsys)[0]


def test_a_document_without_its_bos_is_found(prepare, corpus, capsys):
    output, _ = prepare(corpus, bos=True)
    verify.verify(output)

    def edit(held):
        held[640:642] = (9).to_bytes(2, "little")

    rewrite(output, edit)
    out, _ = problems(output, capsys)
    assert "00000-00000.tar has documents that do not begin with BOS" in out


def test_a_manifest_that_is_not_what_the_tasks_wrote_is_found(output, capsys):
    refit(output, id="other")
    out, fix = problems(output, capsys)
    assert "manifest.json is not what the tasks wrote" in out
    assert fix == f"run `titans data merge --output {output}`"
    assert cli.main(["data", "merge", "--output", str(output)]) == 0
    verify.verify(output)


def test_damaged_counts_of_a_task_are_found(output, capsys):
    flip(output / "task-00000.unigrams.npy", 200)
    out, fix = problems(output, capsys)
    assert "task-00000.unigrams.npy does not have its checksum" in out
    assert "--task 0" in fix


def test_a_record_with_a_gap_is_found(output, capsys):
    path = output / "task-00000.json"
    entry = json.loads(path.read_text())
    del entry["windows"][1]
    path.write_text(json.dumps(entry))
    assert "window 1 of task 0 leaves out units" in problems(output, capsys)[0]


def test_a_damaged_list_of_duplicates_is_found(prepare, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", rows(30) * 2)
    output, _ = prepare(tmp_path / "a.jsonl", drop_duplicates=True)
    flip(output / "duplicates.npy", 130)
    out, fix = problems(output, capsys)
    assert "duplicates.npy does not have its checksum" in out
    assert fix == f"run `titans data plan --output {output}`: it is made again"


def test_a_file_that_cannot_be_read_is_a_problem_among_others(output, capsys, monkeypatch):
    real = manifest.sha256_file

    def read(path):
        if path.name == "00000-00000.tar":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(manifest, "sha256_file", read)
    (output / "00000-00001.tar").unlink()
    out, _ = problems(output, capsys)
    assert "00000-00000.tar cannot be read: Permission denied" in out
    assert "00000-00001.tar is missing" in out
