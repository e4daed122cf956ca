import json
import os

import pytest
from made_up import write_jsonl

from data_prep import manifest, verify
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


def test_a_flipped_byte_is_found_and_the_command_that_redoes_it_named(output, corpus, capsys):
    tar = output / "00000-00001.tar"
    held = bytearray(tar.read_bytes())
    held[3000] ^= 1
    tar.write_bytes(held)
    out, fix = problems(output, capsys)
    assert out == "00000-00001.tar does not have its checksum\n"
    assert f"titans data prepare --input '{corpus}'" in fix


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
    assert "00000-000000000.npy: id 60000 in a vocabulary of 350" in problems(output, capsys)[0]


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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
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
    assert "remove" in fix


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


def test_changed_provenance_is_found(output, capsys):
    path = output / "00000-00000.documents.parquet"
    held = bytearray(path.read_bytes())
    held[9] ^= 1
    path.write_bytes(held)
    assert problems(output, capsys)[0] == f"{path.name} does not have its checksum\n"


def test_a_file_that_cannot_be_read_is_a_problem_among_others(output, capsys, monkeypatch):
    real = verify.sha256_file

    def read(path):
        if path.name == "00000-00000.tar":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(verify, "sha256_file", read)
    (output / "00000-00001.tar").unlink()
    out, _ = problems(output, capsys)
    assert "00000-00000.tar cannot be read: Permission denied" in out
    assert "00000-00001.tar is missing" in out


def test_inspect_prints_counts_and_documents(output, capsys):
    verify.inspect(output, 2)
    out = capsys.readouterr().out
    assert "documents         2,540 of 2,540" in out
    assert out.count("--- 00000-00000.tar") == 2


def test_inspect_refuses_another_tokenizer(output, tmp_path):
    from made_up import sentences

    from data_prep import tokenizer

    tokenizer.train(sentences(100), 320, output / "tokenizer.model")
    with pytest.raises(UserError, match="not the one that the data was prepared with"):
        verify.inspect(output, 1)
