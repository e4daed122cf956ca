import pytest
from made_up import rows, sentences, write_jsonl

from data_prep import inputs, shard, tokenizer
from data_prep.manifest import Settings


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return tokenizer.train(sentences(300), 350, path)


@pytest.fixture
def corpus(tmp_path):
    """Two files, 2500 and 40 documents: four units."""
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw/a.jsonl", rows(2500, 1))
    write_jsonl(tmp_path / "raw/b.jsonl", rows(40, 2))
    return f"{tmp_path}/raw/*.jsonl"


@pytest.fixture
def prepare(model, tmp_path):
    """Prepares a pattern into a directory, many small shards and members."""

    def run(pattern, name="out", *, task=0, tasks=1, tokenizer=model, **settings):
        settings = {"shard_bytes": 40_000, "member_tokens": 1024} | settings
        output = tmp_path / name
        command = ["--input", str(pattern)]
        done = shard.prepare(
            inputs.find([str(pattern)]),
            tokenizer,
            output,
            Settings(**settings),
            task=task,
            tasks=tasks,
            command=command,
        )
        return output, done

    return run
