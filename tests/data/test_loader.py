import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_shards import EOS, WORDS, documents_of, written

from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.errors import UserError

LENGTH = 64


def stage(from_step, length):
    return SimpleNamespace(from_step=from_step, length=length)


def make(corpus, **options):
    options = {"sequence_length": LENGTH, "seed": 5, "validation_fraction": None} | options
    return SequenceLoader(corpus, **options)


@pytest.fixture
def loader(made_corpus):
    return make(made_corpus)


def batches(loader, position, sequences, ranks=1, number=0):
    """A global batch, one part a rank."""
    return [
        loader.batch(step=number, position=position, sequences=sequences, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]


def step(loader, position, sequences, ranks=1, number=0):
    """The tokens of a global batch, put together from its ranks."""
    return torch.cat([b.tokens for b in batches(loader, position, sequences, ranks, number)])


def spans(stream, length=LENGTH):
    """All spans of a stream, straight from the definition."""
    padded = np.append(stream, np.full(length, EOS))
    return [tuple(padded[i : i + length + 1].tolist()) for i in range(0, len(stream) - 1, length)]


def as_set(rows):
    return sorted(map(tuple, rows.tolist()))


def count_of(loader):
    """Sequences of an epoch."""
    return round(1 / loader.repeats(1)[0])


def test_every_span_comes_once_an_epoch_while_ranks_and_batch_change(stream, loader):
    position, seen = 0, []
    for sequences, ranks in [(8, 4), (6, 1), (12, 2), (4, 4), (10, 5)] * 100:
        left = count_of(loader) - position // LENGTH
        sequences = min(sequences, left)
        if not sequences:
            break
        seen.append(step(loader, position, sequences, ranks if sequences % ranks == 0 else 1))
        position += sequences * LENGTH
    assert as_set(torch.cat(seen)) == sorted(spans(stream))


def test_every_token_but_the_first_is_a_target_once_an_epoch(stream, loader):
    (batch,) = batches(loader, 0, count_of(loader))
    targets = batch.tokens[:, 1:][batch.target_mask]
    assert np.array_equal(np.sort(targets.numpy()), np.sort(stream[1:]))
    assert len(spans(stream)) * LENGTH - len(targets) == LENGTH - (len(stream) - 1) % LENGTH > 0


def test_all_ranks_agree_whether_there_is_a_mask(loader):
    masked = 0
    for first in range(0, count_of(loader), 8):
        parts = batches(loader, first * LENGTH, 8, ranks=8)
        kinds = {part.target_mask is None for part in parts}
        assert len(kinds) == 1
        masked += kinds == {False}
    assert 1 <= masked <= 2


def test_a_step_may_cross_the_end_of_an_epoch(loader):
    count = count_of(loader)
    first = step(loader, 0, count)
    across = step(loader, (count - 3) * LENGTH, 8)
    assert torch.equal(across[:3], first[-3:])
    assert torch.equal(across[3:], step(loader, count * LENGTH, 5))
    second = step(loader, count * LENGTH, count)
    assert not torch.equal(first, second)
    assert as_set(first) == as_set(second)


def test_seeds_have_orders_of_their_own(made_corpus, loader):
    assert not torch.equal(step(loader, 0, 8), step(make(made_corpus, seed=6), 0, 8))


def test_tokens_are_int64_and_targets_follow_inputs(counting):
    (_, batch) = batches(make(counting(1001), validation_fraction=0), 0, 4, ranks=2)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (2, LENGTH + 1)
    assert (batch.tokens.diff() == 1).all()
    assert batch.target_mask is batch.document_starts is None


def test_a_shorter_stage_covers_the_same_tokens(made_corpus):
    stages = [stage(0, 16), stage(3, 32), stage(5, 64)]
    short = make(made_corpus, length_schedule=stages)
    assert [short.length_at(number) for number in range(6)] == [16, 16, 16, 32, 32, 64]
    full = step(short, 8 * LENGTH, 4, number=5)
    for number, length in ((0, 16), (3, 32)):
        rows = step(short, 8 * LENGTH, 4, ranks=2, number=number)
        assert rows.shape == (4 * LENGTH // length, length + 1)
        pieces = rows.reshape(4, -1, length + 1)
        assert torch.equal(pieces[:, :, :-1].flatten(1), full[:, :-1])
        assert torch.equal(pieces[:, :, 1:].flatten(1), full[:, 1:])


@pytest.fixture
def masked(tmp_path):
    """A corpus of distinct tokens, of which the multiples of 3 are no targets."""
    stream = np.arange(1000, 2000)
    path = written(tmp_path / "masked", [stream], dtype="uint32", masks=[stream % 3 > 0])
    return Corpus.open([(str(path), 1.0)])


@pytest.mark.parametrize("number", [0, 1])
def test_masks_follow_their_targets(masked, number):
    loader = make(masked, validation_fraction=0, length_schedule=[stage(1, 16)])
    for batch in batches(loader, 0, 8, ranks=2, number=number):
        assert batch.target_mask.dtype == torch.bool
        targets = batch.tokens[:, 1:]
        assert torch.equal(batch.target_mask, (targets % 3 > 0) & (targets != EOS))


@pytest.mark.parametrize("number", [0, 1])
def test_document_starts_follow_their_tokens(made_corpus, number):
    loader = make(made_corpus, length_schedule=[stage(1, 16)], document_starts=True)
    for batch in batches(loader, 0, 40, ranks=2, number=number):
        inputs, starts = batch.tokens[:, :-1], batch.document_starts
        assert starts.dtype == torch.int64
        assert starts.shape == inputs.shape
        columns = torch.arange(starts.shape[1])
        begins = (starts == columns) & (columns > 0)
        assert torch.equal(begins[:, 1:], inputs[:, :-1] == EOS)
        assert torch.equal(starts, torch.where(begins, columns, 0).cummax(1).values)
    last = next(loader.validation_batches(sequences=11, limit=0, rank=0, ranks=1))
    assert last.document_starts.shape == (11, LENGTH)


def held_out_of(corpus):
    (source,) = corpus.sources
    return source.held_out.read(0, source.held_out.tokens)


@pytest.mark.parametrize(
    ("sequences", "ranks", "limit"), [(4, 1, 0), (4, 4, 0), (6, 2, 0), (4, 2, 7), (8, 4, 10**6)]
)
def test_held_out_sequences_come_once_in_order_over_all_ranks(
    made_corpus, loader, sequences, ranks, limit
):
    expected = spans(held_out_of(made_corpus))
    assert len(expected) == loader.validation_sequences == 11
    expected = expected[:limit] if limit else expected
    per_rank = [
        list(loader.validation_batches(sequences=sequences, limit=limit, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    seen, targets = [], 0
    for together in zip(*per_rank, strict=True):
        for batch in together:
            assert len(batch.tokens) == sequences // ranks
            mask = torch.ones(len(batch.tokens), LENGTH, dtype=torch.bool)
            mask = mask if batch.target_mask is None else batch.target_mask
            targets += int(mask.sum())
            seen += map(tuple, batch.tokens[mask.any(1)].tolist())
    assert seen == expected
    assert targets == min(len(held_out_of(made_corpus)) - 1, len(expected) * LENGTH)


def test_padding_keeps_the_masks_of_real_rows(masked):
    loader = make(masked, validation_fraction=0.1)
    (plain,) = loader.validation_batches(sequences=1, limit=1, rank=0, ranks=1)
    (padded,) = loader.validation_batches(sequences=3, limit=1, rank=0, ranks=1)
    assert torch.equal(padded.target_mask[0], plain.target_mask[0])
    assert not padded.target_mask[1:].any()


def test_data_with_held_out_documents_needs_no_fraction(made_corpus):
    with pytest.raises(UserError, match="prepared with held-out ones") as caught:
        make(made_corpus, validation_fraction=0.1)
    assert caught.value.where.startswith("data.validation_fraction")
    assert make(made_corpus, validation_fraction=0).validation_sequences == 11


def test_data_told_to_hold_out_documents_that_held_out_none_has_no_other_validation(tmp_path):
    path = written(tmp_path, [documents_of(9000)], held_out_share=1e-9)
    loader = make(Corpus.open([(str(path), 1.0)]), validation_fraction=None)
    assert loader.validation_sequences == 0
    assert count_of(loader) == -(-8999 // LENGTH)


def test_all_ranks_have_a_mask_where_a_row_of_any_is_a_repetition(counting):
    loader = make(counting(1282), validation_fraction=0.4)  # 8 held-out sequences without pads
    each = [
        list(loader.validation_batches(sequences=6, limit=0, rank=rank, ranks=3))
        for rank in range(3)
    ]
    masked = [[batch.target_mask is not None for batch in batches] for batches in each]
    assert masked[0] == masked[1] == masked[2] == [False, True]


def both(corpus, length, fraction):
    """All training and all held-out tokens that are no pads."""
    loader = make(corpus, sequence_length=length, seed=0, validation_fraction=fraction)
    held_out = list(loader.validation_batches(sequences=1, limit=0, rank=0, ranks=1))
    held_out = torch.cat([batch.tokens for batch in held_out] or [torch.empty(0)])
    training = step(loader, 0, count_of(loader))
    return training[training != EOS], held_out[held_out != EOS]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_no_token_of_training_is_held_out(counting, fraction):
    training, held_out = both(counting(1200, 800), LENGTH, fraction)
    boundary = 1000 + 2000 - round(2000 * fraction)
    assert training.unique().tolist() == list(range(1000, boundary))
    assert held_out.unique().tolist() == list(range(boundary, 3000))


def test_a_hundredth_is_held_out_by_default(counting):
    _, held_out = both(counting(10_000), LENGTH, None)
    assert held_out.unique().tolist() == list(range(10_900, 11_000))


def test_sequences_cross_shards(counting):
    training, _ = both(counting(10, 20, 70, 500), 100, 0)
    assert len(training.unique()) == 600


def test_sequences_longer_than_all_data_are_refused(counting):
    corpus = counting(600, 399)
    make(corpus, sequence_length=998, validation_fraction=0)
    with pytest.raises(UserError, match="the data holds no sequence of 999 tokens: it has 999"):
        make(corpus, sequence_length=999, validation_fraction=0)
    with pytest.raises(UserError, match="of which 500 are held out") as caught:
        make(corpus, sequence_length=499, validation_fraction=0.5005)
    assert "hold out less" in caught.value.fix


def test_a_held_out_share_without_a_sequence_is_refused_with_one_that_has(counting):
    corpus = counting(9000)
    with pytest.raises(UserError, match=r"holds out 1 tokens, no sequence of 64") as caught:
        make(corpus, validation_fraction=1e-4)
    fraction = float(caught.value.fix.split()[1].strip(","))
    assert make(corpus, validation_fraction=fraction).validation_sequences >= 1


def test_any_suggested_fraction_works_and_is_refused_only_where_none_would():
    draw = random.Random(0)
    suggested = refused = 0
    cases = [(1333, 700), (1401, 700), (1402, 700), (10**9, 64), (62_347, 25_000)]
    cases += [(draw.randint(90, 600), draw.randint(1, 80)) for _ in range(400)]
    for tokens, length in cases:
        stream = SimpleNamespace(tokens=tokens, masks=False)
        source = SimpleNamespace(
            training=stream,
            held_out=SimpleNamespace(tokens=0),
            held_out_share=0,
            eos_id=2,
            place="here",
        )
        corpus = SimpleNamespace(sources=[source], counts=[1])
        with pytest.raises(UserError) as caught:
            make(corpus, sequence_length=length, validation_fraction=1e-12)
        if caught.value.fix.startswith("use 0,"):
            refused += 1
            assert tokens < 2 * (length + 1)
        else:
            suggested += 1
            fraction = float(caught.value.fix.split()[1].strip(","))
            make(corpus, sequence_length=length, validation_fraction=fraction)
    assert suggested > 100
    assert refused > 10


def test_a_step_larger_than_the_data_is_refused(loader):
    count = count_of(loader)
    with pytest.raises(UserError, match=f"takes {count + 1} sequences, the data holds {count}"):
        step(loader, 0, count + 1)


def test_a_batch_that_does_not_divide_is_refused(loader):
    with pytest.raises(UserError, match="6 sequences do not divide over 4 data ranks"):
        step(loader, 0, 6, ranks=4)
    with pytest.raises(UserError, match="6 sequences do not divide over 4 data ranks"):
        next(loader.validation_batches(sequences=6, limit=0, rank=0, ranks=4))


def test_a_position_of_another_sequence_length_is_refused(loader):
    with pytest.raises(UserError, match="position 100 is no multiple"):
        step(loader, 100, 1)


def test_a_prepared_corpus_is_read_as_text(model, manifest):
    loader = make(Corpus.open([(str(manifest), 1.0)]), validation_fraction=0.05)
    rows = step(loader, 0, 16)
    words = {word for row in rows.tolist() for word in model.decode(row).split()}
    assert set(WORDS) <= words


def test_urls_are_read_like_directories(made, made_corpus, tmp_path):
    import fsspec

    remote = fsspec.filesystem("memory")
    for path in made.parent.iterdir():
        remote.pipe_file(f"/data/{path.name}", path.read_bytes())
    opened = Corpus.open(
        [("memory://data/manifest.json", 1.0)], cache=str(tmp_path), cache_bytes=2**24
    )
    assert opened.fingerprint == made_corpus.fingerprint
    assert torch.equal(step(make(opened), 0, 50), step(make(made_corpus), 0, 50))
    remote.rm("/data/00000-00001.tar")
    with pytest.raises(UserError, match=r"00000-00001.tar is missing") as caught:
        Corpus.open([("memory://data/manifest.json", 1.0)], cache=str(tmp_path))
    assert "from where they were prepared" in caught.value.fix
    url = made.as_uri()
    assert torch.equal(step(make(Corpus.open([(url, 1.0)])), 0, 9), step(make(opened), 0, 9))
