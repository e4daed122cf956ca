"""The paper's benchmarks: their data, and what is refused before a model is loaded."""

import importlib
import json

import pytest
from benchmark_rows import rows, write

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.evaluate import benchmark_files as files
from titans_pretrain.evaluate import harness, tasks
from titans_pretrain.evaluate.tasks import Options


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def open_one(name, **options):
    (task,) = harness.open_tasks([name], Options(**{"max_length": 64} | options))
    return task


def test_each_of_the_nine_has_its_paper_column_and_its_stock_file():
    import lm_eval.tasks

    root = harness.Path(lm_eval.tasks.__file__).parent
    assert set(harness.BENCHMARKS) == set(tasks.PAPER)
    for benchmark in harness.BENCHMARKS.values():
        assert (root / benchmark.stock).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.PAPER)
def test_local_files_are_read_for_every_task(name, data):
    task = open_one(name, task_data=data)
    assert task.identity()["samples"] == 5
    assert len(list(task._task.eval_docs)) == 5


def test_identity_tells_data_length_and_samples(data, tmp_path):
    first = open_one("piqa", task_data=data)
    assert first.identity() == open_one("piqa", task_data=data, batch=4).identity()
    changed = rows()["piqa"]
    changed[3]["sol2"] = "another"
    other = write(tmp_path, piqa=changed)
    for options in (
        {"task_data": other},
        {"task_data": data, "samples": 2},
        {"task_data": data, "max_length": 65},
    ):
        assert open_one("piqa", **options).identity() != first.identity()


def test_more_samples_than_there_are_mean_all(data):
    assert open_one("piqa", task_data=data, samples=99).identity()["samples"] == 5


def test_the_length_of_the_training_stands_in_for_the_maximum(data):
    task = open_one("piqa", task_data=data, max_length=None, trained_length=32)
    assert task.identity()["max_length"] == 32


def test_no_known_length_is_refused(data):
    with pytest.raises(UserError, match="does not tell the sequence length") as caught:
        open_one("piqa", task_data=data, max_length=None)
    assert caught.value.where == "--max-length"


def test_data_out_of_reach_names_the_set_and_the_way_around(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match="data of piqa cannot be reached: ConnectionError"
    ) as caught:
        open_one("piqa")
    assert caught.value.where == "baber/piqa"
    assert "--task-data" in caught.value.fix


@pytest.mark.parametrize("local", [False, True])
def test_what_lm_eval_itself_fails_at_is_told_as_that(local, data, monkeypatch):
    import lm_eval.tasks

    def refuse(*_, **__):
        raise OSError("no such include") if local else AttributeError("'Task' has no 'load'")

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", refuse)
    with pytest.raises(TitansError, match=r"lm-eval 0\.4\.\d+ could not open its own") as caught:
        open_one("piqa", task_data=data if local else None)
    assert caught.value.exit_code == 1


def test_errors_of_the_hubs_client_are_of_the_hub():
    from huggingface_hub.errors import RevisionResolutionError

    assert harness._is_of_the_hub(RevisionResolutionError("gone"))
    assert not harness._is_of_the_hub(KeyError("piqa"))


def test_an_error_of_any_kind_that_the_hubs_client_raises_is_of_the_hub(monkeypatch, tmp_path):
    import lm_eval.tasks
    from datasets.packaged_modules.cache.cache import Cache

    def load(*_):  # as without a connection
        Cache(str(tmp_path), "aps/super_glue", "boolq", version="auto", hash="auto")

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    with pytest.raises(
        UserError, match="data of boolq cannot be reached: ValueError: Could"
    ) as caught:
        open_one("boolq")
    assert "--task-data" in caught.value.fix


def test_a_maximal_length_beyond_the_models_positions_is_refused(data):
    task = open_one("piqa", task_data=data)
    task.check(64)
    with pytest.raises(UserError, match="64 tokens are more than the model's 63") as caught:
        task.check(63)
    assert caught.value.where == "--max-length"


def test_a_missing_harness_names_the_extra(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError) as caught:
        harness.open_tasks(["piqa"], Options(max_length=64))
    assert "pip install 'titans-pretrain[eval]'" in caught.value.fix


def test_a_missing_file_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"piqa\.jsonl is missing") as caught:
        open_one("piqa", task_data=tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "goal, sol1, sol2, label" in caught.value.fix


def good(name):
    return rows(1)[name][0]


@pytest.mark.parametrize(
    ("name", "column", "value", "fix"),
    [
        ("wikitext", "page", 3, "write a text"),
        ("lambada_openai", "text", "one", "two words"),
        ("piqa", "label", 2, "one of 0, 1"),
        ("piqa", "label", True, "one of 0, 1"),
        ("hellaswag", "endings", ["one"], "list of two"),
        ("hellaswag", "label", "", "one of 0, 1, 2, 3"),
        ("winogrande", "sentence", "no gap", "with _"),
        ("winogrande", "answer", "3", "one of 1, 2"),
        ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A", "B", "C"]}, "as many labels"),
        ("arc_easy", "choices", ["a", "b"], '{"text"'),
        ("arc_challenge", "answerKey", "E", "one of A, B, C, D"),
        ("social_iqa", "label", "0", "one of 1, 2, 3"),
        ("boolq", "label", "yes", "one of 0, 1"),
    ],
)
def test_a_bad_value_names_line_and_column(name, column, value, fix, tmp_path):
    lines = [json.dumps(good(name)), "", json.dumps(good(name) | {column: value})]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"column {column} is ") as caught:
        files.read(tmp_path / f"{name}.jsonl", harness.BENCHMARKS[name].columns)
    assert caught.value.where.endswith(f"{name}.jsonl, line 3")
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "no JSON"),
        ("[1]", "a list instead of a JSON object"),
        ('{"sol1": "a"}', "column goal is missing"),
    ],
)
def test_a_bad_line_is_named(line, what, tmp_path):
    file = tmp_path / "piqa.jsonl"
    file.write_text(json.dumps(good("piqa")) + "\n" + line + "\n")
    with pytest.raises(UserError, match=what) as caught:
        files.read(file, harness.BENCHMARKS["piqa"].columns)
    assert caught.value.where == f"{file}, line 2"


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        files.read(tmp_path / "piqa.jsonl", harness.BENCHMARKS["piqa"].columns)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "piqa.jsonl").mkdir()
    with pytest.raises(UserError, match=r"piqa\.jsonl cannot be read: Is a directory"):
        files.read(tmp_path / "piqa.jsonl", harness.BENCHMARKS["piqa"].columns)


def test_labels_come_as_the_hub_has_them(tmp_path):
    write(tmp_path, hellaswag=[good("hellaswag") | {"label": 1, "more": "is left out"}])
    (row,) = files.read(tmp_path / "hellaswag.jsonl", harness.BENCHMARKS["hellaswag"].columns)
    assert row["label"] == "1"
    assert "more" not in row


class Scorer:
    """Says that every answer has the probability of ``score``."""

    def __init__(self, score):
        self.score = score

    def loglikelihood(self, requests):
        return [(self.score, True) for _ in requests]

    loglikelihood_rolling = None


@pytest.mark.parametrize("score", [float("nan"), -1e9])
def test_a_metric_that_is_not_finite_is_a_failure(score, data):
    task = open_one("lambada_openai", task_data=data)._task
    with pytest.raises(TitansError, match=r"perplexity is (nan|inf)") as caught:
        harness.score(task, Scorer(score), 2)
    assert not isinstance(caught.value, UserError)


def test_the_first_samples_are_scored(data):
    found = harness.score(open_one("lambada_openai", task_data=data)._task, Scorer(-2.0), 2)
    assert found["perplexity"] == pytest.approx(7.389056, rel=1e-6)
    assert (found["acc"], found["samples"]) == (1.0, 2)
