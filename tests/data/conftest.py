import itertools

import numpy as np
import pytest
from made_shards import corpus, documents_of, prepared, written

from data_prep import tokenizer
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.data.shards import TokenShards


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tokenizer.train(corpus(300), 300, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="session")
def manifest(model, tmp_path_factory):
    """Three shards of about 10,000 tokens and a short one; members of 500."""
    return prepared(tmp_path_factory.mktemp("plain"), model, [{"text": t} for t in corpus(3100)])


@pytest.fixture
def own_manifest(model, tmp_path):
    """The same, to be damaged."""
    return prepared(tmp_path, model, [{"text": t} for t in corpus(3100)])


@pytest.fixture(scope="session")
def masked_manifest(model, tmp_path_factory):
    rows = [{"prompt": t, "text": " memory learns"} for t in corpus(500)]
    return prepared(tmp_path_factory.mktemp("masked"), model, rows, prompt_column="prompt")


@pytest.fixture
def shards(manifest):
    return TokenShards.open(manifest)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Three training shards, 12,345 tokens in all, and two held-out ones of 700."""
    streams = [documents_of(n, seed) for seed, n in enumerate((5000, 7000, 345))]
    held_out = [documents_of(n, 9 + n) for n in (500, 200)]
    return written(tmp_path_factory.mktemp("made") / "data", streams, held_out=held_out)


@pytest.fixture
def made_corpus(made):
    return Corpus.open([(str(made), 1.0)])


@pytest.fixture
def stream(made_corpus):
    """The training stream of ``made``, (tokens,)."""
    training = made_corpus.sources[0].training
    return training.read(0, training.tokens)


@pytest.fixture
def counting(tmp_path):
    """Makes a corpus of shards whose tokens count up over all of them, none of them EOS."""

    def make(*lengths, name="counting", **options):
        ends = np.cumsum([0, *lengths]) + 1000
        streams = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
        manifest = written(tmp_path / name, streams, dtype="uint32", **options)
        return Corpus.open([(str(manifest), 1.0)])

    return make
