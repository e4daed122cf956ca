import io
import tarfile

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tar import (
    BLOCK_TOKENS,
    MASK_SUFFIX,
    BlockSums,
    TarStream,
    TarWriter,
    data_offset,
    walk,
)
from titans_pretrain.errors import UserError

STREAM = np.arange(250, dtype=np.uint16)


def write(path, members):
    with open(path, "wb") as handle:
        writer = TarWriter(handle)
        for name, array in members:
            writer.write(name, array)
        writer.close()
    return path


@pytest.fixture
def tar(tmp_path):
    parts = [(f"0-{i}.npy", STREAM[i * 100 : i * 100 + 100]) for i in range(3)]
    return write(tmp_path / "a.tar", parts)


def test_what_is_written_is_read(tar):
    stream = TarStream.open(tar, dtype="uint16", member_tokens=100)
    assert np.array_equal(stream.read(0, 250), STREAM)
    assert stream.read_mask(0, 250).all()
    with tarfile.open(tar) as archive:
        assert np.array_equal(
            np.load(io.BytesIO(archive.extractfile("0-2.npy").read())), STREAM[200:]
        )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "without its end mark"),
        (1024, "without its end mark"),
        (700, "is cut"),
        (3072 + 512, "zeros where"),
    ],
)
def test_a_cut_archive_is_refused(tar, size, message):
    with open(tar, "r+b") as handle:
        handle.truncate(size)
    with pytest.raises(UserError, match=message):
        list(walk(tar))


def test_a_foreign_member_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"))
    with pytest.raises(UserError, match=r"notes.txt is no .npy file"):
        list(walk(tmp_path / "a.tar"))


def test_a_tar_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read a.tar: No such file") as caught:
        list(walk(tmp_path / "a.tar"))
    assert caught.value.where == str(tmp_path / "a.tar")


@pytest.mark.parametrize("content", [b"nonsense" * 20, b"\x93NUMPY\x02\x00" + bytes(120)])
def test_a_member_that_is_no_array_is_refused(tmp_path, content):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.npy")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"member 0.npy"):
        list(walk(tmp_path / "a.tar"))


def test_an_array_of_two_dimensions_is_refused(tmp_path):
    content = io.BytesIO()
    np.save(content, np.zeros((2, 3), np.uint16))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.npy")
        info.size = content.tell()
        content.seek(0)
        archive.addfile(info, content)
    with pytest.raises(UserError, match=r"shape \(2, 3\)"):
        list(walk(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "mask",
    [
        ("1.mask.npy", np.ones(250, np.uint8)),
        ("0.mask.npy", np.ones(249, np.uint8)),
        ("0.mask.npy", np.ones(250)),
    ],
)
def test_masks_of_other_tokens_are_refused(tmp_path, mask):
    path = write(tmp_path / "a.tar", [("0.npy", STREAM), mask])
    with pytest.raises(UserError, match="masks do not match"):
        TarStream.open(path, dtype="uint16", member_tokens=250)


def reference(members):
    """The same archive as the standard library and numpy write it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, array in members:
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0))
            info = tarfile.TarInfo(name)
            info.size, info.mode = content.tell(), 0o644
            content.seek(0)
            archive.addfile(info, content)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 192, 5000])
def test_the_bytes_are_those_of_tarfile_and_numpy(tmp_path, dtype, length):
    members = [(f"0-{i}.npy", np.arange(length).astype(dtype)) for i in range(3)]
    assert write(tmp_path / "a.tar", members).read_bytes() == reference(members)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 100, 192, 4096])
def test_where_a_member_lies_follows_from_its_number(tmp_path, masks, dtype, length):
    members = []
    for index in range(4):
        members.append((f"{index}.npy", np.zeros(length, dtype)))
        if masks:
            members.append((f"{index}{MASK_SUFFIX}", np.ones(length, np.uint8)))
    path = write(tmp_path / "a.tar", members)
    found = [member.offset for member in walk(path) if not member.name.endswith(MASK_SUFFIX)]
    size = np.dtype(dtype).itemsize
    assert found == [data_offset(index, length, size, masks=masks) for index in range(4)]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 3 * BLOCK_TOKENS), max_size=4))
def test_block_sums_do_not_depend_on_how_the_stream_comes(cuts):
    stream = np.arange(3 * BLOCK_TOKENS - 7, dtype=np.uint16)
    sums = BlockSums()
    for part in np.split(stream, sorted(cuts)):
        sums.add(part)
    blocks = [stream[at : at + BLOCK_TOKENS] for at in range(0, len(stream), BLOCK_TOKENS)]
    assert sums.finish().tolist() == [xxhash.xxh3_64_intdigest(block.tobytes()) for block in blocks]
