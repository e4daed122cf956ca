from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.parallel.shards import FlatShard, boxes


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(ranges())
def test_boxes_tile_the_range_in_order_and_each_is_contiguous(case):
    shape, start, stop = case
    flat = torch.arange(prod(shape)).reshape(shape)
    position = start
    for box in boxes(shape, start, stop):
        assert box.start == position < box.stop
        region = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        assert flat[region].shape == box.sizes
        assert flat[region].flatten().tolist() == list(range(box.start, box.stop))
        position = box.stop
    assert position == stop


@given(ranges())
def test_there_are_few_boxes(case):
    shape, start, stop = case
    assert len(boxes(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_stay_together():
    (box,) = boxes((4, 3, 2), 6, 18)
    assert (box.offsets, box.sizes) == ((1, 0, 0), (2, 3, 2))


def test_a_scalar_has_one_box_and_an_empty_range_none():
    (box,) = boxes((), 0, 1)
    assert (box.offsets, box.sizes, box.start, box.stop) == ((), (), 0, 1)
    assert boxes((), 0, 0) == boxes((3, 4), 5, 5) == boxes((0, 4), 0, 0) == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 13)])
def test_a_range_outside_the_tensor_is_refused(start, stop):
    with pytest.raises(ValueError, match="no range"):
        boxes((3, 4), start, stop)


def test_a_shard_whose_tensor_does_not_fit_its_range_is_refused():
    with pytest.raises(ValueError, match="elements"):
        FlatShard("weight", (3, 4), 0, 5, torch.zeros(4))
    with pytest.raises(ValueError, match="no range"):
        FlatShard("weight", (3, 4), 10, 13, torch.zeros(3))


@st.composite
def windowed_shards(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, extent)) for extent in shape)
    sizes = tuple(draw(st.integers(0, e - o)) for e, o in zip(shape, offsets, strict=True))
    start = draw(st.integers(0, prod(sizes)))
    stop = draw(st.integers(start, prod(sizes)))
    window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    part = torch.arange(prod(shape)).reshape(shape)[window].reshape(-1)[start:stop]
    return FlatShard("weight", shape, start, stop, part, offsets, sizes)


@given(windowed_shards())
def test_boxes_of_a_window_lie_where_its_elements_lie_in_the_logical_tensor(shard):
    whole = torch.arange(prod(shard.shape)).reshape(shard.shape)
    position = shard.start
    for box in shard.boxes():
        assert box.start == position < box.stop
        region = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        own = shard.tensor[box.start - shard.start : box.stop - shard.start]
        assert torch.equal(whole[region].flatten(), own)
        position = box.stop
    assert position == shard.stop


def test_the_window_is_the_whole_tensor_unless_given():
    assert FlatShard("weight", (3, 4), 0, 2, torch.zeros(2)).window == ((0, 0), (3, 4))
    assert FlatShard("scale", (), 0, 1, torch.zeros(1)).window == ((), ())


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((0, 3), (3, 2)), ((-1, 0), (3, 4)), ((0,), (3,)), ((0, 0), (3, -1))]
)
def test_a_window_outside_the_tensor_is_refused(offsets, sizes):
    with pytest.raises(ValueError, match=r"no window of a tensor of \(3, 4\)"):
        FlatShard("weight", (3, 4), 0, 0, torch.zeros(0), offsets, sizes)


def test_half_a_window_or_a_range_beyond_it_is_refused():
    with pytest.raises(ValueError, match="offsets and sizes"):
        FlatShard("weight", (3, 4), 0, 2, torch.zeros(2), (0, 0))
    with pytest.raises(ValueError, match=r"no range of a tensor of \(3, 2\)"):
        FlatShard("weight", (3, 4), 0, 7, torch.zeros(7), (0, 2), (3, 2))
