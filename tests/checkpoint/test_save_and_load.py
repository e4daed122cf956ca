import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_cases import cut, make_tensors
from forked_ranks import on_ranks

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.load import load, read_tensors
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel.shards import FlatShard

STATE = {"step": 3, "loss": 0.1 + 0.2, "rng": [1, 2], "note": None, "nested": {"on": True}}


def _save(rank, world, root, step=3, dtype=torch.float32, **options):
    arguments = {"state": STATE, "files": {"config.yaml": b"a: 1\n"}, "keep": 3} | options
    return save(root, step, cut(make_tensors(dtype), rank, world), **arguments)


def _load_and_compare(rank, world, path, dtype=torch.float32):
    """The state, if every element of every shard has the bits that were saved."""
    shards = cut(make_tensors(dtype), rank, world, blank=True)
    state = load(path, shards)
    for shard, wanted in zip(shards, cut(make_tensors(dtype), rank, world), strict=True):
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(shard.tensor.view(bits), wanted.tensor.view(bits)), shard.name
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written_by", [1, 2, 3])
def test_any_number_of_ranks_reads_what_any_other_wrote_bit_by_bit(tmp_path, written_by, dtype):
    if written_by == 1:
        path = _save(0, 1, tmp_path, dtype=dtype)
    else:
        saver = lambda rank: _save(rank, written_by, tmp_path, dtype=dtype)  # noqa: E731
        path = on_ranks(written_by, saver)[0]
    assert layout.verify(path) == []
    assert _load_and_compare(0, 1, path, dtype) == STATE
    for read_by in (2, 3, 5):
        loader = lambda rank, n=read_by: _load_and_compare(rank, n, path, dtype)  # noqa: E731
        assert on_ranks(read_by, loader) == [STATE] * read_by


@pytest.mark.parametrize("first", [1, 4, 7, 11, 19, 34])
def test_flat_ranges_may_cut_rows_anywhere(tmp_path, first):
    whole = torch.randn(7, 5)
    flat = whole.reshape(-1)
    parts = [(0, first), (first, 35)]
    written = [FlatShard("a", (7, 5), i, j, flat[i:j].clone()) for i, j in parts]
    path = save(tmp_path, 1, written, state={}, files={}, keep=1)
    for i, j in [(0, 35), (0, 3), (3, 13), (6, 7), (34, 35), (12, 30), (5, 5)]:
        shard = FlatShard("a", (7, 5), i, j, torch.zeros(j - i))
        load(path, [shard])
        assert torch.equal(shard.tensor, flat[i:j])


def test_whole_tensors_are_read_one_at_a_time_in_the_order_of_names(tmp_path):
    path = on_ranks(3, lambda rank: _save(rank, 3, tmp_path))[0]
    names = []
    for name, tensor in read_tensors(path, "parameters/"):
        names.append(name)
        assert torch.equal(tensor, make_tensors()[name])
    assert names == sorted(name for name in make_tensors() if name.startswith("parameters/"))


def test_what_all_ranks_hold_alike_is_written_once(tmp_path):
    path = on_ranks(2, lambda rank: _save(0, 1, tmp_path))[0]
    stored = sum(file.stat().st_size for file in path.glob("rank-*"))
    elements = sum(tensor.numel() for tensor in make_tensors().values())
    assert elements * 4 < stored < elements * 4 + 2000
    assert _load_and_compare(0, 1, path) == STATE


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    from safetensors.torch import load_file

    path = _save(0, 1, tmp_path)
    stored = load_file(path / "rank-00000.safetensors")
    assert torch.equal(
        stored["parameters/model.embed.weight@0,0"], make_tensors()["parameters/model.embed.weight"]
    )
    assert (path / "config.yaml").read_bytes() == b"a: 1\n"
    assert layout.read_state(path) == STATE
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "rank-00000.safetensors",
        "state.json",
        "tensors.json",
    ]


def test_a_pickle_in_the_checkpoint_is_never_executed(tmp_path):
    import pickle

    class Malicious:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "executed", "by the pickle")

    path = _save(0, 1, tmp_path)
    evil = pickle.dumps(Malicious())
    for name in ("rank-00000.safetensors", "tensors.json", ".metadata"):
        original = (path / name).read_bytes() if (path / name).exists() else None
        (path / name).write_bytes(evil)
        shards = cut(make_tensors(), 0, 1, blank=True)
        if original is None:
            load(path, shards)
        else:
            with pytest.raises(TitansError, match=r"cannot (be )?read"):
                load(path, shards)
            with pytest.raises(TitansError, match=r"cannot (be )?read"):
                list(read_tensors(path, ""))
            (path / name).write_bytes(original)
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil)
    assert (tmp_path / "executed").exists()


def test_boxes_that_leave_a_gap_are_refused(tmp_path):
    path = on_ranks(2, lambda rank: _save(rank, 2, tmp_path))[0]
    index = json.loads((path / "tensors.json").read_text())
    index["tensors"]["parameters/model.embed.weight"]["boxes"].pop()
    (path / "tensors.json").write_text(json.dumps(index))
    message = "parameters/model.embed.weight: the checkpoint holds [0-9]+ of (its )?35 elements"
    with pytest.raises(TitansError, match=message):
        load(path, cut(make_tensors(), 0, 1, blank=True))
    with pytest.raises(TitansError, match=message):
        list(read_tensors(path, "parameters/"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "state.json is missing"), (b'{"a"', "state.json cannot be read")],
)
def test_a_damaged_state_is_named(tmp_path, content, message):
    path = _save(0, 1, tmp_path)
    (path / "state.json").unlink()
    if content is not None:
        (path / "state.json").write_bytes(content)
    with pytest.raises(TitansError, match=message):
        load(path, cut(make_tensors(), 0, 1, blank=True))


def test_a_file_without_a_box_that_the_index_promises_is_named(tmp_path):
    path = _save(0, 1, tmp_path)
    index = (path / "tensors.json").read_text()
    (path / "tensors.json").write_text(index.replace("model.scale", "model.SCALE"))
    tensors = {name.replace("scale", "SCALE"): part for name, part in make_tensors().items()}
    for read in (
        lambda: load(path, cut(tensors, 0, 1, blank=True)),
        lambda: list(read_tensors(path, "parameters/model.SCALE")),
    ):
        with pytest.raises(TitansError) as caught:
            read()
        assert "rank-00000.safetensors" in f"{caught.value.what} {caught.value.where}"


def test_an_index_of_another_format_is_refused(tmp_path):
    path = _save(0, 1, tmp_path)
    for content in ("[]", '{"format": "titans-checkpoint/2", "tensors": {}}'):
        (path / "tensors.json").write_text(content)
        with pytest.raises(TitansError, match="not of format 'titans-checkpoint/1'"):
            load(path, [])
        with pytest.raises(TitansError, match="not of format 'titans-checkpoint/1'"):
            list(read_tensors(path, ""))


def _load_changed(rank, world, path, change):
    tensors = make_tensors()
    if rank == world - 1:
        change(tensors)
    load(path, cut(tensors, rank, world, blank=True))


CHANGES = {
    "missing from the checkpoint: parameters/new": lambda t: t.update(
        {"parameters/new": torch.zeros(9)}
    ),
    r"parameters/model.norm.weight \(3,\) instead of \(4,\)": lambda t: t.update(
        {"parameters/model.norm.weight": torch.zeros(4)}
    ),
    r"parameters/model.memory torch.float32 instead of torch.bfloat16": lambda t: t.update(
        {"parameters/model.memory": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_names_shapes_and_dtypes_are_refused_on_all_ranks_by_name(tmp_path, message):
    path = _save(0, 1, tmp_path)
    with pytest.raises(UserError, match=f"of another model or optimizer: .*{message}") as caught:
        _load_changed(0, 1, path, CHANGES[message])
    assert str(path / "config.yaml") in caught.value.fix
    for error in on_ranks(2, lambda rank: _load_changed(rank, 2, path, CHANGES[message])):
        assert isinstance(error, UserError)
        assert re.search(message, error.what)


def test_a_name_that_nobody_asks_for_is_refused(tmp_path):
    path = _save(0, 1, tmp_path)
    with pytest.raises(TitansError, match=r"unexpected in the checkpoint: momentum/model.memory"):
        _load_changed(0, 1, path, lambda tensors: tensors.pop("momentum/model.memory"))


def test_a_tensor_that_the_ranks_hold_only_in_part_is_not_saved(tmp_path):
    half = FlatShard("a", (4,), 0, 2, torch.zeros(2))
    with pytest.raises(TitansError, match="a: the ranks hold 2 of its 4 elements"):
        save(tmp_path, 1, [half], state={}, files={}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_on_a_tensor_are_told_so(tmp_path):
    def disagree(rank):
        dtype = torch.float32 if rank else torch.bfloat16
        shard = FlatShard("a", (4,), 2 * rank, 2 * rank + 2, torch.zeros(2, dtype=dtype))
        save(tmp_path, 1, [shard], state={}, files={}, keep=1)

    for error in on_ranks(2, disagree):
        assert "a: rank 1 holds" in error.what
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_are_not_saved(tmp_path):
    def save_wide(rank):
        dtype = torch.float64 if rank else torch.float32
        shard = FlatShard("a", (4,), 2 * rank, 2 * rank + 2, torch.zeros(2, dtype=dtype))
        save(tmp_path, 1, [shard], state={}, files={}, keep=1)

    for error in on_ranks(2, save_wide):
        assert isinstance(error, TitansError)
        assert "a: torch.float64 is not stored" in error.what
        assert error.where == "rank 1"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": (1, 2)}}, r"state.a.b: a tuple does not read back"),
        ({"a": {1: 2}}, r"state.a: key 1 is no string"),
        ({"a": [torch.tensor(1)]}, r"state.a\[0\]: a Tensor does not read back"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, message):
    with pytest.raises(TitansError, match=message):
        _save(0, 1, tmp_path, state=state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["state.json", "../x", "rank-00000.safetensors", ".hidden"])
def test_files_cannot_take_a_name_of_the_format(tmp_path, name):
    with pytest.raises(TitansError, match="cannot be the name"):
        _save(0, 1, tmp_path, files={name: b""})
