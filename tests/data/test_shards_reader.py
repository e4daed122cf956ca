import json
import os

import numpy as np
import pytest
import webdataset

from data_prep import manifest as manifests
from data_prep.tar import TarStream
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import UserError


def from_webdataset(manifest, key):
    """Every shard's stream as stock webdataset reads it."""
    for shard in json.loads(manifest.read_text())["shards"]:
        samples = webdataset.WebDataset(
            str(manifest.parent / shard["name"]), shardshuffle=False
        ).decode()
        yield np.concatenate([sample[key] for sample in samples])


def test_tokens_are_those_that_stock_webdataset_reads(manifest, shards):
    streams = list(from_webdataset(manifest, "npy"))
    assert len(streams) == len(shards.lengths) > 2
    for index, (stream, length) in enumerate(zip(streams, shards.lengths, strict=True)):
        assert np.array_equal(shards.read(index, 0, length), stream)
        assert stream[-1] == shards.eos_id
    assert sum(map(len, streams)) == shards.tokens


def test_masks_are_those_that_stock_webdataset_reads(masked_manifest):
    shards = TokenShards.open(masked_manifest)
    for index, stream in enumerate(from_webdataset(masked_manifest, "mask.npy")):
        assert np.array_equal(shards.read_mask(index, 0, len(stream)), stream.astype(bool))


@pytest.mark.parametrize(("start", "count"), [(0, 1), (499, 2), (250, 1700), (500, 500), (7, 0)])
def test_a_span_crosses_members(shards, start, count):
    whole = shards.read(1, 0, shards.lengths[1])
    assert np.array_equal(shards.read(1, start, count), whole[start : start + count])


def test_a_span_beyond_the_stream_is_refused(shards):
    with pytest.raises(IndexError):
        shards.read(0, shards.lengths[0] - 1, 2)
    with pytest.raises(IndexError):
        shards.read(0, -1, 2)


def test_what_the_trainer_needs_to_know(shards, model, manifest):
    assert (shards.vocab_size, shards.eos_id) == (300, 2)
    assert shards.tokenizer.read_bytes() == model.content
    assert shards.fingerprint == json.loads(manifest.read_text())["fingerprint"]


def test_a_missing_tar_is_named_with_the_command_that_redoes_it(own_manifest):
    (own_manifest.parent / "00000-00001.tar").unlink()
    with pytest.raises(UserError, match=r"00000-00001.tar is missing") as caught:
        TokenShards.open(own_manifest)
    assert "titans data prepare --input" in caught.value.fix
    assert str(own_manifest.parent) in caught.value.fix


def test_a_truncated_tar_is_named_before_the_first_read(own_manifest):
    os.truncate(own_manifest.parent / "00000-00002.tar", 4096)
    with pytest.raises(UserError, match=r"00000-00002.tar has 4096 bytes instead of"):
        TokenShards.open(own_manifest)


def test_another_tokenizer_is_refused(own_manifest):
    (own_manifest.parent / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UserError, match="tokenizer is missing or not the one"):
        TokenShards.open(own_manifest)


def test_a_directory_or_a_missing_manifest_is_refused(own_manifest, tmp_path):
    with pytest.raises(UserError, match="a directory") as caught:
        TokenShards.open(own_manifest.parent)
    assert caught.value.fix == f"give {own_manifest}"
    with pytest.raises(UserError, match=r"cannot read manifest.json"):
        TokenShards.open(tmp_path / "manifest.json")


def damage(manifest, edit):
    """Change the first tar without changing its size."""
    path = manifest.parent / "00000-00000.tar"
    held = bytearray(path.read_bytes())
    size = len(held)
    edit(held)
    path.write_bytes(held)
    assert len(held) == size
    return TokenShards.open(manifest)


def flip_header(held):
    held[3] ^= 1


def zero_header(held):
    step = 512 + 1536  # header, 128 + 1000 bytes of array, padded
    held[step : step + 512] = bytes(512)


def other_type(held):
    held[512:640] = bytes(held[512:640]).replace(b"<u2", b"<i2")


def other_shape(held):
    held[512:640] = bytes(held[512:640]).replace(b"(500,)", b"(501,)")


def drop_members(held):
    held[2048 * 3 :] = bytes(len(held) - 2048 * 3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip_header, "damaged header"),
        (zero_header, "zeros where a header should be"),
        (other_type, "holds int16"),
        (other_shape, "shape"),
        (drop_members, "holds 1500 tokens"),
    ],
)
def test_damage_that_keeps_the_size_is_found_at_first_use(own_manifest, edit, message):
    shards = damage(own_manifest, edit)
    with pytest.raises(UserError, match=message):
        shards.read(0, 0, 10)


def test_members_of_another_length_are_found(manifest):
    with pytest.raises(UserError, match="holds 500 tokens"):
        TarStream.open(manifest.parent / "00000-00000.tar", dtype="uint16", member_tokens=1000)


def test_the_fingerprint_covers_the_content(manifest, own_manifest, masked_manifest):
    same, other, different = (
        manifests.load(path)["fingerprint"] for path in (manifest, own_manifest, masked_manifest)
    )
    assert same == other != different


def test_a_tar_without_the_masks_that_the_manifest_tells_is_refused(own_manifest):
    content = json.loads(own_manifest.read_text()) | {"masks": True}
    content["fingerprint"] = manifests.fingerprint(content)
    own_manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="and no masks; the manifest tells"):
        TokenShards.open(own_manifest).read(0, 0, 1)
