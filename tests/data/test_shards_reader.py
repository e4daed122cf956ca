import json
import os
import shutil

import fsspec
import numpy as np
import pytest
import webdataset
from made_shards import documents_of, masks_of, written

from data_prep import manifest as manifests
from titans_pretrain.data import mapping
from titans_pretrain.data.shards import TokenShards, split
from titans_pretrain.errors import TitansError, UserError


def from_webdataset(manifest, key):
    """The stream of all training shards as stock webdataset reads it."""
    names = [shard["name"] for shard in json.loads(manifest.read_text())["shards"]]
    urls = [str(manifest.parent / name) for name in names]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return np.concatenate([sample[key] for sample in samples])


def whole(stream):
    return stream.read(0, stream.tokens)


def test_tokens_are_those_that_stock_webdataset_reads(manifest, shards):
    stream = from_webdataset(manifest, "npy")
    assert len(shards.training.shards) > 2
    assert np.array_equal(whole(shards.training), stream)
    assert stream[-1] == shards.eos_id


def test_masks_are_those_that_stock_webdataset_reads(masked_manifest):
    training = TokenShards.open(masked_manifest).training
    masks = from_webdataset(masked_manifest, "mask.npy")
    assert np.array_equal(masks_of(training), masks.astype(bool))
    assert 0 < masks.mean() < 1


def test_what_the_trainer_needs_to_know(shards, model, manifest):
    assert (shards.vocab_size, shards.eos_id) == (300, 2)
    assert shards.tokenizer.read_bytes() == model.content
    assert shards.fingerprint == json.loads(manifest.read_text())["fingerprint"]


def test_all_missing_files_are_named_at_once(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    gone = ("00000-00001.tar", "held-out-00000-00000.tar", "00000-00002.index.npy")
    for name in gone:
        (path.parent / name).unlink()
    with pytest.raises(UserError, match="are missing") as caught:
        TokenShards.open(path)
    assert all(name in caught.value.what for name in gone)
    assert caught.value.fix == manifests.redo(path.parent, 0)


def test_a_missing_tar_is_named_with_the_command_that_redoes_it(own_manifest):
    (own_manifest.parent / "00000-00001.tar").unlink()
    with pytest.raises(UserError, match=r"00000-00001.tar is missing") as caught:
        TokenShards.open(own_manifest)
    assert f"titans data prepare --output {own_manifest.parent}" in caught.value.fix


def test_indices_are_not_needed_where_nothing_is_checked(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    (path.parent / "00000-00002.index.npy").unlink()
    assert TokenShards.open(path, check=False).training.tokens == 12_345


def test_damage_in_several_tasks_points_to_verify(tmp_path):
    path = written(tmp_path, [documents_of(100), documents_of(100)])
    content = json.loads(path.read_text())
    content["shards"][1]["task"] = 1
    path.write_text(json.dumps(content | {"fingerprint": manifests.fingerprint(content)}))
    for shard in content["shards"]:
        (tmp_path / shard["name"]).unlink()
    with pytest.raises(UserError, match=r"00000-00000.tar, 00000-00001.tar are missing") as caught:
        TokenShards.open(path)
    assert f"titans data verify {tmp_path}" in caught.value.fix


def test_a_truncated_tar_is_named_before_the_first_read(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    os.truncate(path.parent / "00000-00002.tar", 512)
    with pytest.raises(UserError, match=r"00000-00002.tar has 512 bytes instead of"):
        TokenShards.open(path)


def test_another_tokenizer_is_refused(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    (path.parent / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the one that the data was prepared with"):
        TokenShards.open(path)
    (path.parent / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="the tokenizer is missing"):
        TokenShards.open(path)


def test_a_tokenizer_that_cannot_be_read_is_not_called_missing(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    (path.parent / "tokenizer.model").unlink()
    (path.parent / "tokenizer.model").mkdir()
    with pytest.raises(UserError, match=r"cannot read tokenizer.model: Is a directory"):
        TokenShards.open(path)


def test_sizes_may_be_left_to_another_rank(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    os.truncate(path.parent / "00000-00002.tar", 512)
    (path.parent / "00000-00001.tar").unlink()
    training = TokenShards.open(path, sizes=False).training
    assert len(training.read(0, 5000)) == 5000
    with pytest.raises(UserError, match=r"00000-00001.tar: No such file"):
        training.read(5000, 5001)
    with pytest.raises(UserError, match=r"00000-00002.tar ends at byte 512"):
        training.read(12_000, 12_001)


def test_provenance_is_not_needed_to_train(made, tmp_path):
    path = shutil.copytree(made.parent, tmp_path / "copy") / "manifest.json"
    (path.parent / "00000-00001.documents.parquet").unlink()
    assert TokenShards.open(path).training.tokens == 12_345


@pytest.mark.parametrize(
    ("manifest", "place", "name"),
    [
        ("manifest.json", ".", "manifest.json"),
        ("/manifest.json", "/", "manifest.json"),
        ("a/b.json", "a", "b.json"),
        ("s3://bucket/manifest.json", "s3://bucket", "manifest.json"),
    ],
)
def test_a_manifest_lies_in_its_directory(manifest, place, name):
    assert split(manifest) == (place, name)


def test_errors_tell_no_password_of_a_url(made, tmp_path):
    remote = fsspec.filesystem("memory")
    for path in made.parent.iterdir():
        remote.pipe_file(f"/me:secret@host/{path.name}", path.read_bytes())
    remote.rm("/me:secret@host/00000-00001.tar")
    with pytest.raises(UserError, match=r"00000-00001.tar is missing") as caught:
        TokenShards.open("memory://me:secret@host/manifest.json", cache=tmp_path)
    assert caught.value.where == "memory://host"


def test_a_directory_or_a_missing_manifest_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="a directory") as caught:
        TokenShards.open(made.parent)
    assert caught.value.fix == f"give {made}"
    with pytest.raises(UserError, match=r"cannot read manifest.json"):
        TokenShards.open(tmp_path / "manifest.json")


def test_a_manifest_of_an_older_format_is_refused(made, tmp_path):
    old = tmp_path / "manifest.json"
    old.write_text(json.dumps(json.loads(made.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match=r"has format 1, this version reads 2") as caught:
        TokenShards.open(old)
    assert "prepare the data with this version" in caught.value.fix


def flipped(folder, name, at):
    held = bytearray((folder / name).read_bytes())
    held[at] ^= 1
    (folder / name).write_bytes(held)


def test_a_flipped_byte_is_named_with_shard_place_and_remedy(tmp_path):
    stream = documents_of(20_000)
    path = written(tmp_path, [stream], member_tokens=8192)
    at = 640 + 2 * 5000
    flipped(tmp_path, "00000-00000.tar", at)
    training = TokenShards.open(path).training
    assert np.array_equal(training.read(0, 4096), stream[:4096])  # other blocks stay good
    with pytest.raises(
        UserError, match=r"00000-00000.tar is damaged: bytes (\d+) to (\d+)"
    ) as caught:
        training.read(0, 20_000)
    words = caught.value.what.split()
    assert int(words[4]) <= at < int(words[6])
    assert caught.value.where == str(tmp_path / "00000-00000.tar")
    assert caught.value.fix == manifests.redo(tmp_path, 0)


def test_every_flipped_bit_of_tokens_or_masks_is_noticed(tmp_path):
    mask = np.ones(900, int)
    path = written(tmp_path / "data", [documents_of(900)], masks=[mask], member_tokens=500)
    tar = path.parent / "00000-00000.tar"
    good, found = tar.read_bytes(), 0
    for at in range(0, len(good) - 1024, 97):
        flipped(path.parent, tar.name, at)
        training = TokenShards.open(path).training
        unchecked = TokenShards.open(path, check=False).training
        try:
            tokens, masks = whole(training), masks_of(training)
        except UserError:
            found += 1
        else:  # a header or padding: nothing that is read
            assert np.array_equal(tokens, whole(unchecked))
            assert masks.all()
        tar.write_bytes(good)
    assert found > 20


def test_what_is_not_checked_is_read_as_it_is(tmp_path):
    stream = documents_of(1000)
    path = written(tmp_path, [stream])
    flipped(tmp_path, "00000-00000.tar", 640)
    assert whole(TokenShards.open(path, check=False).training)[0] == stream[0] ^ 1


def test_a_damaged_index_is_not_blamed_on_the_tar(tmp_path):
    path = written(tmp_path, [documents_of(1000)])
    flipped(tmp_path, "00000-00000.index.npy", 130)
    with pytest.raises(UserError, match=r"00000-00000.index.npy is damaged: .* sha256") as caught:
        TokenShards.open(path).training.read(0, 1)
    assert caught.value.fix == manifests.redo(tmp_path, 0)


def test_damage_of_an_index_stops_only_the_blocks_that_it_tells_of(tmp_path):
    stream = documents_of(10_000)
    path = written(tmp_path, [stream], member_tokens=4096)
    flipped(tmp_path, "00000-00000.index.npy", 128 + 8 + 3)
    training = TokenShards.open(path).training
    assert np.array_equal(training.read(0, 4096), stream[:4096])
    assert np.array_equal(training.read(8192, 10_000), stream[8192:])
    with pytest.raises(UserError, match=r"00000-00000.index.npy is damaged: .* sha256"):
        training.read(4096, 4097)


def test_an_index_cut_after_the_start_is_named(tmp_path):
    training = TokenShards.open(written(tmp_path, [documents_of(5000)])).training
    os.truncate(tmp_path / "00000-00000.index.npy", 136)
    with pytest.raises(UserError, match=r"00000-00000.index.npy is damaged: it has 136 bytes"):
        training.read(0, 1)


@pytest.mark.parametrize("masks", [True, False])
def test_a_tar_cut_after_the_start_is_named(tmp_path, masks):
    mask = [np.ones(5000, int)] if masks else None
    training = TokenShards.open(written(tmp_path, [documents_of(5000)], masks=mask)).training
    os.truncate(tmp_path / "00000-00000.tar", 1000)
    with pytest.raises(UserError, match=r"00000-00000.tar ends at byte 1000, before"):
        training.read(0, 1)


def test_what_is_handed_out_is_what_was_checked(tmp_path):
    stream = documents_of(5000)
    training = TokenShards.open(written(tmp_path, [stream], member_tokens=5000)).training
    part = training.shards[0].read(0, 10)
    flipped_in_place(tmp_path / "00000-00000.tar", 640)
    assert np.array_equal(part, stream[:10])


def flipped_in_place(path, at):
    with open(path, "r+b") as handle:
        handle.seek(at)
        value = handle.read(1)[0] ^ 1
        handle.seek(at)
        handle.write(bytes([value]))


@pytest.mark.parametrize("members", [100, 5000])
def test_more_shards_than_a_process_may_map_are_read(tmp_path, monkeypatch, members):
    monkeypatch.setattr(mapping, "KEPT", 6)
    streams = [documents_of(300, seed) for seed in range(20)]
    training = TokenShards.open(written(tmp_path, streams, member_tokens=members)).training
    for _ in range(2):
        assert np.array_equal(whole(training), np.concatenate(streams))
        with open("/proc/self/maps") as maps:
            assert sum(str(tmp_path) in line for line in maps) <= 6


def test_a_refused_map_is_named_with_the_limits(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"abc")
    with pytest.raises(TitansError, match="refuses a memory map") as caught:
        mapping.map_file(tmp_path / "a.tar", 2**60)
    assert caught.value.where == str(tmp_path / "a.tar")
    assert "vm.max_map_count" in caught.value.fix


class Flaky:
    """A storage whose reads are damaged until something is forgotten."""

    def __init__(self, storage):
        self._storage, self.forgotten = storage, []

    def read(self, name, start, stop):
        content = self._storage.read(name, start, stop)
        return content if self.forgotten else content ^ 1

    def forget(self, name, start, stop):
        self.forgotten.append((name, start, stop))
        return True

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_bytes_that_a_cache_damaged_are_fetched_again(tmp_path, monkeypatch):
    from titans_pretrain.data import shards

    made, stream = [], documents_of(5000)
    opened = shards.open_storage
    monkeypatch.setattr(
        shards, "open_storage", lambda *a, **k: made.append(Flaky(opened(*a, **k))) or made[0]
    )
    training = TokenShards.open(written(tmp_path, [stream], member_tokens=5000)).training
    assert np.array_equal(training.read(0, 4000), stream[:4000])
    assert made[0].forgotten == [("00000-00000.tar", 640, 640 + 2 * 4096)]


def test_the_fingerprint_covers_the_content(manifest, own_manifest, masked_manifest):
    same, other, different = (
        manifests.load(path)["fingerprint"] for path in (manifest, own_manifest, masked_manifest)
    )
    assert same == other != different
