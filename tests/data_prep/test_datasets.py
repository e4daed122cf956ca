"""Datasets by name: files of our kinds in place, all else built once into Arrow."""

import json
import os

import datasets
import huggingface_hub
import pytest
from made_up import rows, write_jsonl
from read_sources import write

from data_prep import inputs, retry, sources
from data_prep.sources import Columns, Reader
from titans_pretrain.errors import UserError

SHA = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    return tmp_path / "set"


def find(name, split="train", **options):
    given = {"config": None, "revision": None} | options
    return inputs.find_dataset(str(name), split=split, **given)


def texts(items):
    with Reader(Columns()) as reader:
        return [
            row.text
            for item in items
            for shape in [sources.layout(item)]
            for unit in range(shape.units)
            for batch in reader.rows(item, shape, unit)
            for row in batch
        ]


def test_files_of_our_kinds_are_read_where_they_lie(folder, cache):
    write(folder / "data/train-00000.parquet", rows(900))
    write(folder / "data/test-00000.parquet", rows(5))
    found = find(folder)
    assert [item.name for item in found] == ["train-00000.parquet"]
    assert found[0].url == str(folder / "data/train-00000.parquet")
    assert sources.layout(found[0]).units == 2
    assert not list(cache.rglob("*.arrow"))


def test_an_unknown_split_or_dataset_is_refused(folder):
    write(folder / "data/train-00000.parquet", rows(9))
    with pytest.raises(UserError, match="no split 'tran'") as caught:
        find(folder, split="tran")
    assert "train" in caught.value.fix
    with pytest.raises(UserError, match="cannot open the dataset"):
        find(folder / "none")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_other_kinds_are_built_into_arrow_once(folder, cache, kind):
    values = rows(40)
    path = folder / f"data/train.{kind}"
    if kind == "csv":
        lines = [f"{row['id']},{json.dumps(row['text'])}" for row in values]
        path.write_text("id,text\n" + "\n".join(line.replace("\\n", "\n") for line in lines) + "\n")
    else:
        path.write_text(json.dumps(values))
    found = find(folder)
    assert {os.path.splitext(item.url)[1] for item in found} == {".arrow"}
    assert texts(found) == [row["text"] for row in values]
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert find(folder) == found
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == made


def test_files_of_our_kinds_that_mean_something_else_to_the_loader_are_built(folder):
    (folder / "a.txt").write_text("text\none\ntwo\n")
    assert texts(find("csv", data_files=[f"{folder}/a.txt"])) == ["one", "two"]
    assert texts(find("text", data_files=[f"{folder}/a.txt"])) == ["text", "one", "two"]
    (folder / "data/a.jsonl").write_text(json.dumps({"held": [{"text": "x"}, {"text": "y"}]}))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/a.jsonl\n  field: held\n---\n"
    )
    assert texts(find(folder)) == ["x", "y"]


def test_files_that_the_dataset_filters_or_has_in_another_encoding_are_built(folder):
    head = "---\nconfigs:\n- config_name: default\n  data_files: data/"
    write(folder / "data/a.parquet", [{"text": "low", "n": 1}, {"text": "high", "n": 5}])
    (folder / "README.md").write_text(f"{head}a.parquet\n  filters: [[n, '>', 3]]\n---\n")
    assert texts(find(folder)) == ["high"]
    (folder / "data/b.jsonl").write_text('{"text": "caf\xe9"}\n', encoding="latin-1")
    (folder / "README.md").write_text(f"{head}b.jsonl\n  encoding: latin-1\n---\n")
    assert texts(find(folder)) == ["caf\xe9"]


def test_a_loader_reads_the_data_files_given(folder):
    for name in ("a", "b"):
        (folder / f"{name}.csv").write_text(f"text\nof {name}\n")
    found = find("csv", data_files=[f"{folder}/a.csv", f"{folder}/b.csv"])
    assert texts(found) == ["of a", "of b"]
    found = find("csv", split="test", data_files=[f"{folder}/b.csv"])
    assert texts(found) == ["of b"]


def test_data_files_choose_among_a_datasets_own(folder):
    for name in ("x", "y"):
        write_jsonl(folder / f"data/{name}.jsonl", [{"text": name}])
    assert texts(find(folder, data_files=["data/y.jsonl"])) == ["y"]


def test_a_dataset_that_cannot_be_built_is_refused_with_the_cause(folder):
    (folder / "data/train.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot build the dataset") as caught:
        find(folder)
    assert "JSON" in caught.value.what


def test_a_dataset_that_lists_a_file_twice_is_refused(folder):
    write_jsonl(folder / "data/0.jsonl", rows(2))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: [data/0.jsonl, 'data/*.jsonl']\n---\n"
    )
    with pytest.raises(UserError, match="lists a file twice"):
        find(folder)


def test_a_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="`datasets` is not installed"):
        find("any")


def test_a_hub_that_fails_twice_and_then_answers_is_asked_again(folder, monkeypatch, capsys):
    write(folder / "data/train.parquet", rows(9))
    real, failures = datasets.load_dataset_builder, [ConnectionError("no hub"), TimeoutError()]

    def sometimes(*given, **options):
        if failures:
            raise failures.pop()
        return real(*given, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", sometimes)
    assert len(find(folder)) == 1
    assert capsys.readouterr().err.count("opening the dataset") == 2


class Hub:
    """What of the hub is asked for a commit."""

    asked = None

    def resolve_path(self, url):
        _, name, rest = url.removeprefix("hf://").split("/", 2)
        repo, _, path = rest.partition("/")
        repo, _, revision = repo.partition("@")
        return type(
            "Place",
            (),
            {
                "repo_type": "dataset",
                "repo_id": f"{name}/{repo}",
                "revision": revision or "main",
                "path_in_repo": path,
            },
        )

    def repo_info(self, repo_id, *, repo_type, revision):
        type(self).asked = (repo_id, repo_type, revision)
        return type("Info", (), {"sha": SHA})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.asked = None
    return Hub


@pytest.mark.parametrize(("given", "revision"), [("", "main"), ("@v1.4", "v1.4")])
def test_a_hub_url_is_pinned_to_the_commit_of_its_branch(hub, given, revision):
    url = f"hf://datasets/org/set{given}/data/*.parquet"
    assert inputs.pinned(url) == f"hf://datasets/org/set@{SHA}/data/*.parquet"
    assert hub.asked == ("org/set", "dataset", revision)


@pytest.mark.parametrize(
    "url", [f"hf://datasets/org/set@{SHA}/a.parquet", "hf://buckets/org/b/a.parquet", "s3://b/a"]
)
def test_what_has_no_moving_branch_stays_as_it_is(hub, url):
    assert inputs.pinned(url) == url
    assert hub.asked is None


def test_a_datasets_hub_files_keep_their_commit_in_their_names(hub, monkeypatch):
    config = type("Config", (), {"data_files": {"train": ["hf://datasets/o/s/a.parquet"]}})
    builder = type("Parquet", (), {"config": config, "__module__": "datasets.packaged.parquet"})()
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
    monkeypatch.setattr(inputs, "_size", lambda url: 9)
    (item,) = find("o/s")
    assert item.name == item.url == f"hf://datasets/o/s@{SHA}/a.parquet"


def test_a_hub_file_whose_commit_cannot_be_had_is_named(hub, monkeypatch):
    class NoAnswer(Exception):
        pass

    def refuse(*_, **__):
        raise NoAnswer("401: who are you?")

    monkeypatch.setattr(Hub, "repo_info", refuse)
    with pytest.raises(UserError, match="who are you") as caught:
        inputs._pin("hf://datasets/o/s/a.parquet", where="--dataset")
    assert (caught.value.where, "network" in caught.value.fix) == ("--dataset", True)
