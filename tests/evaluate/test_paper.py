"""The paper's figures are those it prints."""

import pytest

from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import paper

MISPRINTS = {
    ("400M", "Gated DeltaNet-H2"): 47.80,
    ("400M", "Titans (LMM)"): 47.87,
    ("760M", "TTT"): 49.37,
}


def test_table_1_is_whole():
    sizes = {size: len(paper.table_1(size)) for size in paper.SIZES}
    assert sizes == {"340M": 11, "400M": 15, "760M": 13}
    for size in paper.SIZES:
        for row in paper.table_1(size):
            assert len(row["values"]) == len(paper.columns()) == 11
            assert row["tokens"] == ("30B" if size == "760M" else "15B")


@pytest.mark.parametrize("size", paper.SIZES)
def test_the_mean_of_the_accuracies_is_the_printed_average(size):
    for row in paper.table_1(size):
        *_, printed = row["values"]
        mean = sum(row["values"][2:10]) / 8
        assert mean == pytest.approx(MISPRINTS.get((size, row["model"]), printed), abs=0.0201)


@pytest.mark.parametrize(
    ("size", "model", "wikitext", "lambada", "boolq"),
    [
        ("340M", "Titans (MAC)", 25.43, 28.13, 60.18),
        ("400M", "Transformer++", 30.63, 37.37, 61.59),
        ("400M", "Titans (LMM)", 25.03, 28.99, 60.85),
        ("760M", "Titans (MAG)", 18.61, 19.86, 62.11),
        ("760M", "Mamba2", 22.94, 28.37, 58.15),
    ],
)
def test_a_sample_of_table_1(size, model, wikitext, lambada, boolq):
    (values,) = (row["values"] for row in paper.table_1(size) if row["model"] == model)
    assert (values[0], values[1], values[9]) == (wikitext, lambada, boolq)


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("Titans (LMM)", 92.68),
        ("Titans (MAC)", 97.95),
        ("Titans (MAG)", 96.70),
        ("Titans (MAL)", 96.91),
    ],
)
def test_table_2_gives_the_long_context_column_of_table_5(model, mean):
    cells = [value for task in paper.figures()["table_2"]["rows"][model].values() for value in task]
    assert len(cells) == 12
    assert sum(cells) / 12 == pytest.approx(mean, abs=0.0051)


@pytest.mark.parametrize(
    ("model", "ppl"),
    [
        ("Titans (LMM)", 27.01),
        ("Titans (MAC)", 26.67),
        ("Titans (MAG)", 25.70),
        ("Titans (MAL)", 25.91),
    ],
)
def test_the_perplexities_of_400m_give_the_column_of_table_5(model, ppl):
    (values,) = (row["values"] for row in paper.table_1("400M") if row["model"] == model)
    assert (values[0] + values[1]) / 2 == pytest.approx(ppl, abs=0.0051)


def test_figure_6_has_a_value_for_each_length_that_was_run():
    few, tuned = (paper.figures()[f"figure_6{part}"] for part in "ab")
    assert {model: len(values) for model, values in few["rows"].items()} == {
        "Titans (MAC)": 10,
        "GPT-4": 8,
        "GPT-4o-mini": 8,
        "Llama-3.1-8B": 8,
    }
    assert {model: len(values) for model, values in tuned["rows"].items()} == {
        "Titans (MAC)": 11,
        "Mamba": 8,
        "RMT": 11,
        "Llama-3.1-8B + RAG": 11,
    }
    assert tuned["rows"]["Titans (MAC)"][-1] == 69
    assert len(few["lengths"]) == 11


@pytest.mark.parametrize(
    ("parameters", "size"), [(7_000, "340M"), (368e6, "340M"), (370e6, "400M"), (2e9, "760M")]
)
def test_the_nearest_size_is_nearest_in_ratio(parameters, size):
    assert paper.nearest_size(int(parameters)) == size


def test_another_size_is_refused():
    paper.check_size(None)
    paper.check_size("340M")
    with pytest.raises(UserError, match="no models of 1B") as caught:
        paper.check_size("1B")
    assert "340M, 400M, 760M" in caught.value.fix


def test_our_row_has_the_papers_metric_of_each_task():
    results = {
        "wikitext": {"word_perplexity": 20.5, "byte_perplexity": 1.7},
        "lambada_openai": {"perplexity": 30.0, "acc": 0.5},
        "hellaswag": {"acc": 0.1, "acc_norm": 0.25},
        "arc_challenge": {"acc": 0.1, "acc_norm": 0.75},
        **{name: {"acc": 0.5} for name in ("piqa", "winogrande", "arc_easy", "social_iqa")},
    }
    row = dict(zip(paper.columns(), paper.row_of(results), strict=True))
    assert (row["wikitext"], row["lambada_openai perplexity"]) == (20.5, 30.0)
    assert (row["hellaswag"], row["arc_challenge"], row["piqa"]) == (25, 75, 50)
    assert row["boolq"] is None
    assert row["average"] is None
    row = dict(zip(paper.columns(), paper.row_of(results | {"boolq": {"acc": 0.5}}), strict=True))
    assert row["average"] == 50
