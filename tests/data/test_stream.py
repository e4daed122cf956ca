"""The stream of all shards, its spans, and where documents begin in them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import EOS, documents_of, masks_of, written

from titans_pretrain.data.documents import cut, document_starts
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.data.stream import Spans


@pytest.fixture
def opened(made):
    return TokenShards.open(made)


def test_the_stream_is_all_shards_end_to_end(opened):
    streams = [documents_of(n, seed) for seed, n in enumerate((5000, 7000, 345))]
    assert opened.training.tokens == 12_345
    assert np.array_equal(opened.training.read(0, 12_345), np.concatenate(streams))
    assert opened.held_out.tokens == 700


@given(start=st.integers(0, 12_345), count=st.integers(0, 12_345))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_span_crosses_members_blocks_and_shards(opened, start, count):
    whole = opened.training.read(0, 12_345)
    stop = min(start + count, 12_345)
    assert np.array_equal(opened.training.read(start, stop), whole[start:stop])


@pytest.mark.parametrize("member_tokens", [1, 500, 4096, 5000, 10_000])
@pytest.mark.parametrize("check", [True, False])
def test_members_of_any_length_give_the_same_tokens_and_masks(tmp_path, member_tokens, check):
    stream = documents_of(9000)
    mask = np.random.default_rng(1).integers(0, 2, 9000)
    path = written(tmp_path, [stream], masks=[mask], member_tokens=member_tokens)
    read = TokenShards.open(path, check=check).training
    for start, stop in ((0, 9000), (4095, 4097), (499, 5002), (8999, 9000), (5000, 5000)):
        assert np.array_equal(read.read(start, stop), stream[start:stop])
        assert np.array_equal(masks_of(read, start, stop), mask[start:stop])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("tokens", [1, 1000, 1001])
def test_shards_shorter_than_a_member_are_read(tmp_path, tokens, check):
    stream, mask = documents_of(tokens), np.arange(tokens) % 3 == 0
    for name, masks in (("masked", [mask]), ("plain", None)):
        path = written(tmp_path / name, [stream], masks=masks, member_tokens=2**18)
        read = TokenShards.open(path, check=check).training
        assert np.array_equal(read.read(0, tokens), stream)
    read = TokenShards.open(tmp_path / "masked/manifest.json", check=check).training
    assert np.array_equal(masks_of(read), mask)


def test_four_byte_tokens_are_read(tmp_path):
    stream = np.arange(70_000, 75_000)
    read = TokenShards.open(written(tmp_path, [stream], dtype="uint32")).training
    assert np.array_equal(read.read(0, 5000), stream)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (12_344, 12_346), (5, 4)])
def test_a_span_beyond_the_stream_is_refused(opened, start, stop):
    with pytest.raises(IndexError):
        opened.training.read(start, stop)


@given(start=st.integers(0, 300), tokens=st.integers(0, 700), length=st.integers(1, 200))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_but_the_first_is_a_target_of_one_span(opened, start, tokens, length):
    spans = Spans(opened.training, start, start + tokens, length, EOS)
    rows = np.empty((spans.count, length + 1), np.int64)
    masks = np.ones(rows.shape, bool)
    real = spans.read(list(rows), list(masks), np.arange(spans.count))
    whole = opened.training.read(start, start + tokens)
    assert np.array_equal(rows[:, 1:][masks[:, 1:]], whole[1:])
    assert (rows[~masks] == EOS).all()
    assert (~masks).sum() == spans.padding < max(length, 1)
    assert np.array_equal(real, masks.sum(1))
    assert np.array_equal(rows[:, :-1][masks[:, :-1]], whole[: spans.count * length])


def by_hand(row, real):
    begun, out = 0, []
    for column in range(len(row) - 1):
        if 0 < column < real and row[column - 1] == EOS:
            begun = column
        out.append(begun)
    return out


def test_documents_begin_after_eos_and_pads_begin_none():
    row = [5, EOS, 6, 7, EOS, EOS, 8, EOS, EOS, EOS]  # an empty document, then two pads
    starts = document_starts(np.array([row, row]), np.array([8, 10]), EOS)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 6, 6, 6], [0, 0, 2, 2, 2, 5, 6, 6, 8]]
    assert starts.tolist() == [by_hand(row, 8), by_hand(row, 10)]


def test_rows_cut_shorter_have_starts_of_their_own():
    row = np.array([[5, EOS, 6, 7, 7, 8, EOS, 9, 9]])
    starts = document_starts(row, np.array([9]), EOS)
    pieces = [row[0, 0:5], row[0, 4:9]]
    assert cut(starts, 4).tolist() == [by_hand(piece, 5) for piece in pieces]
