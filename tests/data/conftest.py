import pytest
from made_shards import corpus, prepared

from data_prep import tokenizer
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
