import json
import weakref

import pytest
import yaml
from made_shards import EOS, documents_of, written

from titans_pretrain import cli
from titans_pretrain import config as run_config
from titans_pretrain.data import at_step
from titans_pretrain.data.loader import open_loader
from titans_pretrain.errors import UserError
from titans_pretrain.train.directory import RunDirectory

LENGTH = 48


@pytest.fixture
def configure(tmp_path, made):
    """Writes a run's configuration."""

    def make(name="run.yaml", data=None, **train):
        sections = {
            "model": {"variant": "lmm", "hidden_size": 64, "memory_heads": 2},
            "data": {
                "sequence_length": LENGTH,
                "validation_fraction": 0,
                **(data or {"manifest": str(made)}),
            },
            "train": {"steps": 100, "global_batch_size": 6, "learning_rate": 1e-3, **train},
            "run": {"directory": str(tmp_path / "run")},
        }
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(sections))
        return path

    return make


def rows_of(config, position, sequences):
    batch = open_loader(config.data).batch(
        step=0, position=position, sequences=sequences, rank=0, ranks=1
    )
    return batch.tokens[:, :-1].tolist()


def streams(made):
    """Tokens of each training shard by name."""
    sizes = enumerate((5000, 7000, 345))
    return {f"00000-{n:05d}.tar": documents_of(size, n) for n, size in sizes}


@pytest.mark.parametrize("step", [1, 7, 60])
def test_the_documents_named_are_those_trained_on(configure, made, step):
    config = run_config.load(configure())
    found = at_step.describe(config, step)
    assert found["position"] == (step - 1) * 6 * LENGTH
    for sequence, row in zip(
        found["sequences"], rows_of(config, found["position"], 6), strict=True
    ):
        assert sequence["manifest"] == str(made)
        stream = streams(made)[sequence["shard"]][sequence["offset"] :]
        count = min(len(stream), LENGTH)
        assert stream[:count].tolist() == row[:count]
        documents = sequence["documents"]
        assert [d["first"] for d in documents] == [0] + [d["stop"] for d in documents[:-1]]
        ends = [column + 1 for column, token in enumerate(row) if token == EOS]
        assert all(d["stop"] in ends for d in documents[:-1])
        for document in documents:
            shard, _, number = document["id"].partition("/")
            assert document["shard"] == f"{shard}.tar"
            whole = streams(made)[document["shard"]].tolist()
            before = [i + 1 for i, token in enumerate(whole) if token == EOS]
            start, stop = ([0, *before])[int(number)], before[int(number)]
            part = row[document["first"] : document["stop"]]
            assert part == whole[start:stop] or _contains(whole[start:stop], part)
            assert document["url"].startswith("https://example.org/")
            assert document["dump"] == "CC-1"


def _contains(whole, part):
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


def test_all_documents_of_an_epoch_are_named(configure, made):
    config = run_config.load(configure(global_batch_size=258))
    found = at_step.describe(config, 1)
    named = {document["id"] for s in found["sequences"] for document in s["documents"]}
    every = sum(int((stream == EOS).sum()) for stream in streams(made).values())
    assert len(named) == every
    shards = [len({d["shard"] for d in s["documents"]}) for s in found["sequences"]]
    assert max(shards) == 2
    assert {s["epoch"] for s in found["sequences"]} == {0}
    assert {s["epoch"] for s in at_step.describe(config, 2)["sequences"]} == {1}


@pytest.mark.parametrize("run", [False, True])
def test_a_step_beyond_the_run_is_refused(configure, begun, tmp_path, run):
    with pytest.raises(UserError, match="step 101 of a run of 100") as caught:
        at_step.describe(begun, 101, run=tmp_path / "run" if run else None)
    assert caught.value.where == "train.steps"


def test_other_data_than_the_runs_is_refused(configure, begun, tmp_path):
    (tmp_path / "run/data.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(UserError, match=r"the data has fingerprint .*, the run began with other"):
        at_step.describe(begun, 1, run=tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "has not begun"), ("[]", "cannot be read"), ("{", "cannot be read")],
)
def test_a_run_that_does_not_tell_its_data_is_refused(configure, begun, tmp_path, content, told):
    (tmp_path / "run/data.json").unlink()
    if content is not None:
        (tmp_path / "run/data.json").write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        at_step.describe(begun, 1, run=tmp_path / "run")
    assert "configuration instead" in caught.value.fix


@pytest.fixture
def begun(configure, tmp_path):
    """The configuration of a run that has begun, in its directory."""
    config = run_config.load(configure("run/config.yaml"))
    RunDirectory(tmp_path / "run").begin(config, open_loader(config.data).corpus.fingerprint)
    return config


def write_metrics(run, *rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')


def row(step, tokens):
    return {"step": step, "loss": 1.0, "tokens": tokens * LENGTH}


@pytest.mark.parametrize(
    ("step", "first", "count"),
    [(1, 0, 4), (2, 4, 4), (3, 8, 10), (4, 18, 10), (5, 58, 6), (6, 64, 6), (8, 76, 6)],
)
def test_a_run_tells_the_position_whatever_the_batches_were(begun, tmp_path, step, first, count):
    write_metrics(
        tmp_path / "run",
        row(1, 4),
        {"step": 1, "validation_loss": 1.0},
        row(2, 8),
        row(3, 18),
        {"event": "rollback", "step": 3, "position": 1, "undone": True},
        row(4, 28),
        {"event": "rollback", "step": 4, "position": 58 * LENGTH},
        row(5, 64),
    )
    found = at_step.describe(begun, step, run=tmp_path / "run")
    assert found["position"] == first * LENGTH
    assert len(found["sequences"]) == count


def test_a_step_that_the_metrics_lack_is_refused(begun, tmp_path):
    write_metrics(tmp_path / "run", row(1, 4), row(5, 20))
    for step in (3, 5):
        with pytest.raises(UserError, match=f"no rows of steps {step - 1} and {step}"):
            at_step.describe(begun, step, run=tmp_path / "run")


def test_a_mixture_names_each_manifest(configure, made, tmp_path):
    other = written(tmp_path / "other", [documents_of(3000, 5)])
    parts = [{"manifest": str(made), "weight": 2}, {"manifest": str(other), "weight": 1}]
    found = at_step.describe(run_config.load(configure(data={"mixture": parts})), 3)
    named = [sequence["manifest"] for sequence in found["sequences"]]
    assert (named.count(str(made)), named.count(str(other))) == (4, 2)


def test_the_command_prints_documents_text_and_json(manifest, configure, model, capsys):
    path = str(configure(data={"manifest": str(manifest)}))
    assert cli.main(["data", "at-step", path, "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("step 2: 6 sequences from token 288 on")
    assert cli.main(["data", "at-step", path, "2", "--json", "--text"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = run_config.load(path)
    texts = [model.decode(tokens) for tokens in rows_of(config, 288, 6)]
    assert [sequence["text"] for sequence in found["sequences"]] == texts
    assert cli.main(["data", "at-step", path, "2", "--text"]) == 0
    assert texts[0] in capsys.readouterr().out


@pytest.mark.parametrize("at", range(4, 1000, 83))
def test_every_damage_of_a_provenance_file_is_named(configure, tmp_path, at):
    path = written(tmp_path / "data", [documents_of(500)])
    table = tmp_path / "data/00000-00000.documents.parquet"
    content = bytearray(table.read_bytes())
    content[at] ^= 1
    table.write_bytes(content)
    with pytest.raises(UserError, match=r"00000-00000.documents.parquet is damaged: .* sha256"):
        at_step.describe(run_config.load(configure(data={"manifest": str(path)})), 1)


def test_one_shard_s_provenance_is_in_memory_at_a_time(configure, monkeypatch):
    tables, most, read = [], [], at_step._table

    def counted(path):
        table = read(path)
        tables.append(weakref.ref(table))
        most.append(sum(one() is not None for one in tables))
        return table

    monkeypatch.setattr(at_step, "_table", counted)
    found = at_step.describe(run_config.load(configure(global_batch_size=100)), 1)
    assert len({sequence["shard"] for sequence in found["sequences"]}) == len(most) == 3
    assert max(most) <= 2  # the last, until the next is assigned
