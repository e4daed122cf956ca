import pytest
from made_up import rows, sentences, write_jsonl

from data_prep import inputs, plan, tokenizer
from data_prep.settings import Settings
from data_prep.task import prepare as prepare_task


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
def freeze(model, tmp_path):
    """Freezes the plan of a pattern in a directory: many small shards and members."""

    def run(pattern, name="out", *, tasks=1, tokenizer=model, drop_duplicates=False, **settings):
        settings = {"shard_bytes": 40_000, "member_tokens": 1024} | settings
        output = tmp_path / name
        plan.freeze(
            inputs.find([str(pattern)]),
            tokenizer,
            output,
            Settings(**settings),
            tasks,
            ["--input", str(pattern)],
            drop_duplicates=drop_duplicates,
        )
        return output

    return run


@pytest.fixture
def prepare(freeze):
    """Freezes a plan and does one task of it: the output and, from the last, the manifest."""

    def run(pattern, name="out", *, task=0, workers=None, encoder="sentencepiece", **options):
        output = freeze(pattern, name, **options)
        return output, prepare_task(output, task, workers=workers, encoder=encoder)

    return run
