"""The index leads only to files of the checkpoint that the manifest covers."""

import json
import shutil

import pytest
from checkpoint_cases import cut, make_tensors

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.checkpoint.load import load, read_tensors
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError

RANK = "rank-00000.safetensors"
NAME = "parameters/model.embed.weight"


def _sign(path, names):
    """A manifest with matching checksums, as one who forges a checkpoint writes it."""
    facts = {key: value for key, value in manifest.read(path).items() if key != "files"}
    manifest.write(path, [manifest.record_file(path, name) for name in names], facts)


@pytest.fixture
def forge(tmp_path):
    """Change the index of a good checkpoint in which every checksum still matches."""

    def forge(change):
        shards = cut(make_tensors(), 0, 1)
        path = save(tmp_path / "root", 1, shards, state={}, files={}, keep=1)
        shutil.copy(path / RANK, tmp_path / "root" / "outside.safetensors")
        shutil.copy(path / RANK, path / "uncovered.safetensors")
        index = json.loads((path / "tensors.json").read_text())
        change(index)
        (path / "tensors.json").write_text(json.dumps(index))
        _sign(path, [RANK, "state.json", "tensors.json"])
        assert manifest.problems(path) == []
        return path

    return forge


def _refused(path, message):
    (problem,) = layout.verify(path)
    assert message in problem
    assert layout.newest_good(path.parent)[0] is None
    with pytest.raises(TitansError) as loading:
        load(path, cut(make_tensors(), 0, 1, blank=True))
    with pytest.raises(TitansError) as reading:
        list(read_tensors(path, "parameters/"))
    assert message in loading.value.what
    assert message in reading.value.what


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "ABSOLUTE", "uncovered.safetensors", f"./{RANK}", "", 3]
)
def test_a_file_that_is_not_of_the_checkpoint_is_refused(name, forge, tmp_path):
    name = str(tmp_path / "root" / "outside.safetensors") if name == "ABSOLUTE" else name
    path = forge(lambda index: index.update(files=[name]))
    _refused(path, f"tensors.json names a file that manifest.json does not cover: {name!r}")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1, 0, 0, 7, 5], "has a box that is none in parameters/model.embed.weight"),
        ([0, 0, 0, 7], "has a box that is none in parameters/model.embed.weight"),
        ([-1, 0, 0, 7, 5], "has a number that is none in parameters/model.embed.weight"),
        ([0, 0, 0.5, 7, 5], "has a number that is none in parameters/model.embed.weight"),
        (None, "is no index"),
    ],
)
def test_a_box_that_is_none_is_refused(box, message, forge):
    _refused(forge(lambda index: index["tensors"][NAME].update(boxes=[box])), message)


@pytest.mark.parametrize("section", ["files", "tensors"])
def test_an_index_without_its_parts_is_refused(section, forge):
    _refused(forge(lambda index: index.pop(section)), "tensors.json is no index")


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "..", "", "a\0b"])
def test_a_manifest_that_leads_out_of_its_directory_is_none(name, forge):
    path = forge(lambda index: None)
    facts = {key: value for key, value in manifest.read(path).items() if key != "files"}
    manifest.write(path, [manifest.FileRecord(name, 1, "0")], facts)
    assert layout.verify(path) == ["manifest.json is no manifest"]
