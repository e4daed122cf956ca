"""The order is a pure function of manifest, seed, length and step: every way to resume is exact.

The cases are those in which other loaders repeat, lose or refuse samples: another number of ranks,
of threads, another micro-batch, data that moved, other steps, a second resume, data that ends.
"""

import random
import shutil

import pytest
import torch
from made_shards import EOS, documents_of, written

from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.data.prefetch import ReadAhead

LENGTH, SEQUENCES, STEPS = 16, 24, 40


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The manifests of two data sets; an epoch of the first is 26 steps, cut off in the middle."""
    folder = tmp_path_factory.mktemp("elastic")
    first = written(folder / "first", [documents_of(n, n) for n in (4000, 3000, 2980)])
    second = written(folder / "second", [documents_of(3000, 7)])
    return first, second


def opened(manifests):
    corpus = Corpus.open([(str(path), 1.0 + n) for n, path in enumerate(manifests)])
    return SequenceLoader(corpus, sequence_length=LENGTH, seed=3, validation_fraction=0.02)


def run(manifests, ranks, first, stop, *, workers=0, steps=STEPS, sequences=SEQUENCES, start=None):
    """The global batches of steps [first, stop) as ranks of their own read them."""
    tokens = sequences * LENGTH
    start = first * tokens if start is None else start
    found = []
    for rank in range(ranks):
        loader = opened(manifests)

        def read(step, position, loader=loader, rank=rank):
            return loader.batch(
                step=step, position=position, sequences=sequences, rank=rank, ranks=ranks
            )

        ahead = ReadAhead(read, tokens=tokens, steps=steps, workers=workers)
        numbers = range(first, stop)
        found.append([ahead.take(n, start + (n - first) * tokens).tokens for n in numbers])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def equal(one, other):
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.fixture(scope="module", params=[1, 2], ids=["one manifest", "a mixture"])
def manifests(request, places):
    return places[: request.param]


@pytest.fixture(scope="module")
def reference(manifests):
    """The run that was never stopped, on 2 ranks."""
    return run(manifests, 2, 0, STEPS)


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_together_see_the_same_at_every_step(manifests, reference, ranks, workers):
    assert equal(run(manifests, ranks, 0, STEPS, workers=workers), reference)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (1, 8), (8, 3), (3, 2)])
def test_a_resume_on_other_ranks_and_threads_goes_on_exactly(manifests, reference, before, after):
    stop = random.Random(before * 10 + after).randint(1, STEPS - 1)
    seen = run(manifests, before, 0, stop, workers=1)
    seen += run(manifests, after, stop, STEPS, workers=4)
    assert equal(seen, reference)


def test_a_second_and_a_third_resume_go_on_exactly(manifests, reference):
    borders = [0, 7, 8, 31, STEPS]
    seen = []
    for ranks, first, stop in zip((4, 2, 8, 1), borders, borders[1:], strict=False):
        seen += run(manifests, ranks, first, stop)
    assert equal(seen, reference)


def test_moved_data_goes_on_exactly(manifests, reference, tmp_path):
    moved = [
        shutil.copytree(path.parent, tmp_path / f"moved-{n}") / "manifest.json"
        for n, path in enumerate(manifests)
    ]
    assert equal(run(moved, 2, 20, STEPS), reference[20:])
    corpora = [opened(paths).corpus for paths in (manifests, moved)]
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_more_steps_change_no_order(manifests, reference):
    assert equal(run(manifests, 2, 0, STEPS, workers=1, steps=10 * STEPS), reference)


def test_another_global_batch_goes_on_with_the_next_sequence(manifests, reference):
    start = 20 * SEQUENCES * LENGTH
    seen = run(manifests, 3, 20, 60, sequences=12, start=start)
    assert torch.equal(torch.cat(seen), torch.cat(reference[20:]))


def test_micro_batches_are_cuts_of_the_same_rows(manifests, reference):
    """A rank of many micro-batches has the rows of many ranks, in the same order."""
    assert equal(run(manifests, 1, 0, 5), run(manifests, 24, 0, 5))


def test_data_that_ends_goes_on_with_every_token_once_an_epoch(places):
    loader = opened(places[:1])
    count = round(1 / loader.repeats(1)[0])
    assert SEQUENCES * 26 < count * 2 < SEQUENCES * 2 * STEPS
    assert count % SEQUENCES
    rows = torch.cat(run(places[:1], 3, 0, 3 * count // SEQUENCES + 1))
    epochs = [sorted(map(tuple, rows[e * count : (e + 1) * count].tolist())) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(set(epochs[0])) == count
    training = loader.corpus.sources[0].training
    kept = training.tokens - round(training.tokens * 0.02)
    targets = [token for row in epochs[0] for token in row[1:]]
    expected = training.read(1, kept).tolist()
    pads = len(targets) - len(expected)
    assert sorted(targets) == sorted([*expected, *[EOS] * pads])


def test_the_state_is_one_integer(manifests, reference):
    """A loader that never read anything gives step 33 from the tokens before it alone."""
    position = 33 * SEQUENCES * LENGTH
    batch = opened(manifests).batch(
        step=33, position=position, sequences=SEQUENCES, rank=0, ranks=1
    )
    assert torch.equal(batch.tokens, reference[33])
