import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_shards import corpus, prepared

from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import UserError

LENGTH = 64


def stage(from_step, length):
    return SimpleNamespace(from_step=from_step, length=length)


@pytest.fixture
def loader(shards):
    return SequenceLoader(shards, sequence_length=LENGTH, seed=5, validation_fraction=0.2)


def step(loader, position, sequences, ranks=1, number=0):
    """A global batch, put together from its ranks."""
    rows = [
        loader.batch(
            step=number, position=position, sequences=sequences, rank=rank, ranks=ranks
        ).tokens
        for rank in range(ranks)
    ]
    return torch.cat(rows)


def spans(shards, fraction):
    """All (training, held-out) spans, straight from the definition."""
    streams = [shards.read(i, 0, n) for i, n in enumerate(shards.lengths)]
    boundary = shards.tokens - round(shards.tokens * fraction)
    parts = {True: [], False: []}
    before = 0
    for stream in streams:
        cut = min(max(boundary - before, 0), len(stream))
        for training, part in ((True, stream[:cut]), (False, stream[cut:])):
            parts[training] += [
                part[i : i + LENGTH + 1] for i in range(0, len(part) - LENGTH, LENGTH)
            ]
        before += len(stream)
    return [[tuple(part) for part in parts[kind]] for kind in (True, False)]


def as_set(rows):
    return sorted(map(tuple, rows.tolist()))


def test_every_span_comes_once_an_epoch_while_ranks_and_batch_change(shards, loader):
    training, _ = spans(shards, 0.2)
    assert loader.tokens_per_epoch == len(training) * LENGTH
    position, seen = 0, []
    plan = [(8, 4), (6, 1), (12, 2), (4, 4), (10, 5)] * 100
    for sequences, ranks in plan:
        left = (loader.tokens_per_epoch - position) // LENGTH
        sequences = sequences if sequences <= left else left
        if not sequences:
            break
        seen.append(step(loader, position, sequences, ranks if sequences % ranks == 0 else 1))
        position += sequences * LENGTH
    assert as_set(torch.cat(seen)) == sorted(training)


def test_resuming_needs_one_integer(shards, loader):
    whole = torch.cat([step(loader, i * 4 * LENGTH, 4) for i in range(6)])
    again = SequenceLoader(shards, sequence_length=LENGTH, seed=5, validation_fraction=0.2)
    rest = torch.cat([step(again, (12 + 6 * i) * LENGTH, 6, ranks=3) for i in range(2)])
    assert torch.equal(rest, whole[12:])


def test_a_step_may_cross_the_end_of_an_epoch(loader):
    count = loader.tokens_per_epoch // LENGTH
    first = step(loader, 0, count)
    across = step(loader, (count - 3) * LENGTH, 8)
    assert torch.equal(across[:3], first[-3:])
    assert torch.equal(across[3:], step(loader, count * LENGTH, 5))
    second = step(loader, count * LENGTH, count)
    assert not torch.equal(first, second)
    assert as_set(first) == as_set(second)


def test_seeds_have_orders_of_their_own(shards, loader):
    other = SequenceLoader(shards, sequence_length=LENGTH, seed=6, validation_fraction=0.2)
    assert not torch.equal(step(loader, 0, 8), step(other, 0, 8))


def test_tokens_are_int64_and_targets_follow_inputs(loader):
    batch = loader.batch(step=0, position=0, sequences=4, rank=1, ranks=2)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (2, LENGTH + 1)
    assert batch.target_mask is None


def test_a_shorter_stage_covers_the_same_tokens(shards):
    stages = [stage(0, 16), stage(3, 32), stage(5, 64)]
    short = SequenceLoader(
        shards, sequence_length=LENGTH, seed=5, validation_fraction=0.2, length_schedule=stages
    )
    assert [short.length_at(number) for number in range(6)] == [16, 16, 16, 32, 32, 64]
    full = step(short, 8 * LENGTH, 4, number=5)
    for number, length in ((0, 16), (3, 32)):
        rows = step(short, 8 * LENGTH, 4, ranks=2, number=number)
        assert rows.shape == (4 * LENGTH // length, length + 1)
        pieces = rows.reshape(4, -1, length + 1)
        assert torch.equal(pieces[:, :, :-1].flatten(1), full[:, :-1])
        assert torch.equal(pieces[:, :, 1:].flatten(1), full[:, 1:])


def test_masks_follow_their_targets(masked_manifest):
    shards = TokenShards.open(masked_manifest)
    loader = SequenceLoader(
        shards,
        sequence_length=LENGTH,
        seed=0,
        validation_fraction=0.1,
        length_schedule=[stage(1, 16)],
    )
    stream = np.concatenate([shards.read(i, 0, n) for i, n in enumerate(shards.lengths)])
    masks = np.concatenate([shards.read_mask(i, 0, n) for i, n in enumerate(shards.lengths)])
    for number in (0, 1):
        batch = loader.batch(step=number, position=0, sequences=4, rank=0, ranks=1)
        assert batch.target_mask.dtype == torch.bool
        assert batch.target_mask.shape == batch.tokens[:, 1:].shape
        for row, mask in zip(batch.tokens.numpy(), batch.target_mask.numpy(), strict=True):
            found = [
                i
                for i in range(len(stream) - len(row) + 1)
                if np.array_equal(stream[i : i + len(row)], row)
            ]
            assert any(np.array_equal(masks[i + 1 : i + len(row)], mask) for i in found)
    assert 0 < batch.target_mask.float().mean() < 1


@pytest.mark.parametrize(
    ("sequences", "ranks", "limit"), [(4, 1, 0), (4, 4, 0), (6, 2, 0), (4, 2, 7), (8, 4, 10**6)]
)
def test_held_out_sequences_come_once_in_order_over_all_ranks(
    shards, loader, sequences, ranks, limit
):
    _, held_out = spans(shards, 0.2)
    expected = held_out[:limit] if limit else held_out
    per_rank = [
        list(loader.validation_batches(sequences=sequences, limit=limit, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = []
    for together in zip(*per_rank, strict=True):
        for batch in together:
            assert len(batch.tokens) == sequences // ranks
            real = (
                torch.ones(len(batch.tokens), dtype=bool)
                if batch.target_mask is None
                else batch.target_mask.all(1)
            )
            if batch.target_mask is not None:
                assert not batch.target_mask[~real].any()
            seen += map(tuple, batch.tokens[real].tolist())
    assert seen == expected


def test_padding_keeps_the_masks_of_real_rows(masked_manifest):
    shards = TokenShards.open(masked_manifest)
    loader = SequenceLoader(shards, sequence_length=LENGTH, seed=0, validation_fraction=0.1)
    (plain,) = loader.validation_batches(sequences=1, limit=1, rank=0, ranks=1)
    (padded,) = loader.validation_batches(sequences=3, limit=1, rank=0, ranks=1)
    assert torch.equal(padded.target_mask[0], plain.target_mask[0])
    assert not padded.target_mask[1:].any()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.2, 0.5, 0.9])
def test_no_training_span_reaches_into_the_held_out_part(shards, fraction):
    loader = SequenceLoader(shards, sequence_length=LENGTH, seed=1, validation_fraction=fraction)
    training, held_out = spans(shards, fraction)
    count = loader.tokens_per_epoch // LENGTH
    assert as_set(step(loader, 0, count)) == sorted(training)
    batches = list(loader.validation_batches(sequences=1, limit=0, rank=0, ranks=1))
    assert [tuple(batch.tokens[0].tolist()) for batch in batches] == held_out


def test_sequences_longer_than_any_shard_are_refused(shards):
    with pytest.raises(UserError, match="no shard holds a sequence of 100000 tokens"):
        SequenceLoader(shards, sequence_length=100_000, seed=0, validation_fraction=0)


def test_a_held_out_share_without_a_sequence_is_refused_with_one_that_has(shards):
    with pytest.raises(UserError, match=r"holds out .* no sequence of 64") as caught:
        SequenceLoader(shards, sequence_length=LENGTH, seed=0, validation_fraction=1e-4)
    fraction = float(caught.value.fix.split()[1].strip(","))
    loader = SequenceLoader(shards, sequence_length=LENGTH, seed=0, validation_fraction=fraction)
    assert len(list(loader.validation_batches(sequences=1, limit=0, rank=0, ranks=1))) == 1


class Counting:
    """Shards of given lengths whose tokens count up over all of them; no shard ends early."""

    masks = False

    def __init__(self, *lengths):
        self.lengths, self.tokens = lengths, sum(lengths)
        self.first = np.cumsum([0, *lengths])

    def read(self, shard, start, count):
        assert 0 <= start <= start + count <= self.lengths[shard]
        return np.arange(count, dtype=np.int64) + self.first[shard] + start


def both(shards, length, fraction):
    """All training and all held-out rows."""
    loader = SequenceLoader(shards, sequence_length=length, seed=0, validation_fraction=fraction)
    held_out = list(loader.validation_batches(sequences=1, limit=0, rank=0, ranks=1))
    return step(loader, 0, loader.tokens_per_epoch // length), [batch.tokens for batch in held_out]


@pytest.mark.parametrize(("length", "count"), [(63, 0), (64, 0), (65, 1), (128, 1), (129, 2)])
def test_the_last_target_lies_in_the_shard_too(length, count):
    training, _ = both(Counting(length, 65), 64, 0)
    assert len(training) == count + 1


def test_a_held_out_part_without_room_for_the_last_target_is_refused():
    with pytest.raises(UserError, match="holds out 64 tokens, no sequence of 64"):
        both(Counting(640), 64, 64 / 640)


@pytest.mark.parametrize("held_out", [65, 127, 128, 129])
def test_no_target_of_training_is_held_out_where_spans_end_at_the_boundary(held_out):
    training, validation = both(Counting(640), 64, held_out / 640)
    assert training.max() < 640 - held_out
    assert min(rows.min() for rows in validation) == 640 - held_out
    assert len(training) == (640 - held_out - 1) // 64
    assert len(validation) == (held_out - 1) // 64


def test_any_suggested_fraction_works_and_is_refused_only_where_none_would():
    draw = random.Random(0)
    suggested = refused = 0
    cases = [((1333,), 700), ((1401,), 700), ((1402,), 700), ((10**7, 65), 64)]
    cases.append(((50_002, 12_345), 25_000))  # four digits are too few
    for _ in range(400):
        lengths = tuple(draw.randint(1, 150) for _ in range(draw.randint(1, 4)))
        cases.append((lengths, draw.randint(1, 80)))
    for lengths, length in cases:
        shards = Counting(*lengths)
        options = {"sequence_length": length, "seed": 0}
        try:
            SequenceLoader(shards, validation_fraction=1e-9, **options)
        except UserError as error:
            if error.where != "data.validation_fraction":
                continue
            if error.fix.startswith("use 0,"):
                refused += 1
                for tokens in range(1, shards.tokens):
                    with pytest.raises(UserError):
                        SequenceLoader(
                            shards, validation_fraction=tokens / shards.tokens, **options
                        )
            else:
                suggested += 1
                fraction = float(error.fix.split()[1].strip(","))
                SequenceLoader(shards, validation_fraction=fraction, **options)
    assert suggested > 100
    assert refused > 10


def test_sequences_that_only_the_held_out_part_prevents_are_told_so():
    with pytest.raises(UserError, match="100 tokens are held out") as caught:
        both(Counting(150), 64, 2 / 3)
    assert "hold out less" in caught.value.fix


def test_a_step_larger_than_the_data_is_refused(loader):
    count = loader.tokens_per_epoch // LENGTH
    with pytest.raises(UserError, match=f"takes {count + 1} sequences, the data holds {count}"):
        loader.batch(step=0, position=0, sequences=count + 1, rank=0, ranks=1)


def test_a_batch_that_does_not_divide_is_refused(loader):
    with pytest.raises(UserError, match="6 sequences do not divide over 4 data ranks"):
        loader.batch(step=0, position=0, sequences=6, rank=0, ranks=4)
    with pytest.raises(UserError, match="6 sequences do not divide over 4 data ranks"):
        next(loader.validation_batches(sequences=6, limit=0, rank=0, ranks=4))


def test_a_position_of_another_sequence_length_is_refused(loader):
    with pytest.raises(UserError, match="position 100 is no multiple"):
        loader.batch(step=0, position=100, sequences=1, rank=0, ranks=1)


def test_four_byte_tokens_are_read(model, tmp_path, monkeypatch):
    from data_prep import manifest

    monkeypatch.setattr(manifest, "token_type", lambda size: "uint32")
    shards = TokenShards.open(prepared(tmp_path, model, [{"text": t} for t in corpus(50)]))
    text = model.decode(shards.read(0, 0, shards.lengths[0]).tolist())
    assert "memory" in text
