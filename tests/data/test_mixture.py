from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_shards import documents_of, written

from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.mixture import Corpus, Slots, slot_counts
from titans_pretrain.errors import UserError

weights = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(counts=weights, seed=st.integers(0, 2**40), periods=st.integers(1, 20))
def test_every_position_of_every_source_has_one_place(counts, seed, periods):
    sources, positions = Slots(counts, seed=seed).deal(np.arange(periods * sum(counts)))
    for source, count in enumerate(counts):
        taken = np.sort(positions[sources == source])
        assert np.array_equal(taken, np.arange(periods * count))


@given(counts=weights, start=st.integers(0, 2**50))
def test_places_far_out_need_no_array_and_no_neighbours(counts, start):
    slots = Slots(counts, seed=1)
    together = slots.deal(np.arange(start, start + 40))
    alone = [slots.deal(np.array([start + i])) for i in range(40)]
    for number in range(2):
        assert together[number].tolist() == [pair[number][0] for pair in alone]


def test_periods_are_scattered_anew():
    sources, _ = Slots([5, 5], seed=0).deal(np.arange(1000))
    assert len({tuple(period) for period in sources.reshape(-1, 10).tolist()}) > 50


@pytest.mark.parametrize(
    ("given_weights", "counts"),
    [
        ([1], [1]),
        ([2, 2], [1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([0.001, 0.999], [1, 999]),
        ([3, 1e6], None),
        ([1, 1, 1], [1, 1, 1]),
        ([0.5, 0.3333, 0.1667], [500, 333, 167]),
    ],
)
def test_shares_are_exact_where_a_period_of_1000_can_hold_them(given_weights, counts):
    if counts is None:
        with pytest.raises(UserError, match=r"weight 3 is 3e-06 of all") as caught:
            slot_counts(given_weights)
        assert caught.value.where == "data.mixture.0.weight"
        return
    assert slot_counts(given_weights) == counts


@given(given_weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=6))
def test_rounded_shares_are_off_by_less_than_a_slot(given_weights):
    counts = slot_counts(given_weights)
    total = sum(Fraction(str(weight)) for weight in given_weights)
    assert sum(counts) <= 1000
    for count, weight in zip(counts, given_weights, strict=True):
        assert abs(count - Fraction(str(weight)) / total * sum(counts)) < 1


@pytest.fixture
def parts(tmp_path):
    """Two data sets of 3000 and 1500 tokens, told apart by the size of their ids."""
    first, second = documents_of(3000) % 100 + 3, documents_of(1500, 1) % 100 + 150
    return [str(written(tmp_path / name, [s])) for name, s in (("a", first), ("b", second))]


def loader(parts, shares, **options):
    corpus = Corpus.open(list(zip(parts, shares, strict=True)))
    options = {"sequence_length": 10, "seed": 0, "validation_fraction": 0} | options
    return SequenceLoader(corpus, **options)


def test_batches_hold_the_shares_of_their_sources(parts):
    read = loader(parts, [3, 1])
    rows = read.batch(step=0, position=0, sequences=80, rank=0, ranks=1).tokens
    assert int((rows[:, 0] >= 150).sum()) == 20
    assert not ((rows >= 150).any(1) & ((rows < 150) & (rows != 2)).any(1)).any()


def test_every_source_has_its_own_epochs(parts):
    read = loader(parts, [1, 1])
    small = 150  # sequences of the second
    rows = [
        read.batch(step=0, position=p * 10, sequences=100, rank=0, ranks=1).tokens
        for p in range(0, 600, 100)
    ]
    rows = np.concatenate(rows)
    second = rows[rows[:, 0] >= 150].tolist()
    assert len(second) == 2 * small
    assert sorted(second[:small]) == sorted(second[small:])
    assert second[:small] != second[small:]
    first = rows[rows[:, 0] < 150].tolist()
    assert len(first) == 300
    assert read.repeats(600) == [1.0, 2.0]
    assert read.repetitions(600) == f"the run reads its data more than once: {parts[1]} 2.00 times"
    assert read.repetitions(300) == ""


def test_a_step_takes_no_source_twice(parts):
    with pytest.raises(UserError, match="the data holds 300 of 10 tokens at these weights"):
        loader(parts, [1, 1]).check_step(301)


def test_held_out_sequences_of_all_sources_come_once_and_evenly(parts):
    read = loader(parts, [1, 1], validation_fraction=0.2)
    batches = read.validation_batches(sequences=1, limit=0, rank=0, ranks=1)
    kinds = [bool(batch.tokens[0, 0] >= 150) for batch in batches]
    assert len(kinds) == read.validation_sequences == 60 + 30
    for taken in (9, 30, 60):
        assert abs(sum(kinds[:taken]) - taken / 3) <= 1


def test_different_tokenizers_are_refused(tmp_path, parts):
    other = written(tmp_path / "other", [documents_of(500)], model=b"another")
    with pytest.raises(UserError, match="its tokenizer has sha256") as caught:
        loader([*parts, str(other)], [1, 1, 1])
    assert caught.value.where == f"data.mixture.2.manifest: {other.parent}"
    assert "one tokenizer" in caught.value.fix


def test_different_bos_is_refused(tmp_path, parts):
    other = written(tmp_path / "other", [documents_of(500)], bos=True)
    with pytest.raises(UserError, match="BOS begins every document of it, and none of") as caught:
        loader([*parts, str(other)], [1, 1, 1])
    assert caught.value.where == f"data.mixture.2.manifest: {other.parent}"


def test_different_held_out_shares_are_refused(tmp_path, parts):
    other = written(tmp_path / "other", [documents_of(500)], held_out_share=0.01)
    with pytest.raises(UserError, match=r"a share of 0.01 of it is held out") as caught:
        loader([*parts, str(other)], [1, 1, 1])
    assert caught.value.where == f"data.mixture.2.manifest: {other.parent}"
    assert "the same --held-out" in caught.value.fix


def test_the_same_data_twice_is_refused(parts):
    with pytest.raises(UserError, match=r"the same data as data.mixture.0"):
        loader([parts[0], parts[1], parts[0]], [1, 1, 1])


def test_the_fingerprint_is_that_of_parts_and_shares(parts):
    def fingerprint(names, shares):
        return loader(names, shares).corpus.fingerprint

    assert fingerprint(parts, [2, 4]) == fingerprint(parts, [1, 2])
    others = [(parts, [1, 1]), (parts[::-1], [1, 2]), (parts[:1], [1])]
    found = {fingerprint(*other) for other in others} | {fingerprint(parts, [1, 2])}
    assert len(found) == 4
    assert fingerprint(parts[:1], [1]) == Corpus.open([(parts[0], 1.0)]).fingerprint


def test_masks_count_everywhere_where_one_source_has_them(tmp_path, parts):
    stream = documents_of(500, 3)
    masked = written(tmp_path / "masked", [stream], masks=[np.zeros(500, int)])
    read = loader([parts[0], str(masked)], [1, 1])
    batch = read.batch(step=0, position=0, sequences=20, rank=0, ranks=1)
    counted = batch.target_mask.all(1)
    assert int(counted.sum()) == 10
    assert batch.target_mask.any(1).equal(counted)
