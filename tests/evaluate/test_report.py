"""Our results beside the paper's, with the settings they depend on."""

import json

import pytest

from titans_pretrain.evaluate import loaded, paper, report


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory that says it is a model of 380 million parameters."""
    monkeypatch.setattr(loaded, "parameters", lambda _: 380_000_000)
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


def cell(task, name="", *, samples=10, max_length=None, shots=None, **metrics):
    identity = {"samples": samples, "max_length": max_length, "shots": shots}
    return {
        "task": task,
        "cell": name,
        "dtype": "float32",
        "identity": identity,
        "result": {**metrics, "samples": samples},
    }


NINE = [
    cell("wikitext", word_perplexity=25.0, max_length=4096, shots=0),
    cell("lambada_openai", perplexity=30.0, acc=0.4, max_length=4096, shots=0),
    *(cell(name, acc=0.5, max_length=4096, shots=0) for name in ("piqa", "winogrande", "boolq")),
    *(cell(name, acc=0.5, max_length=4096, shots=0) for name in ("arc_easy", "social_iqa")),
    *(cell(name, acc_norm=0.3, max_length=4096, shots=0) for name in ("hellaswag",)),
    cell("arc_challenge", acc_norm=0.3, max_length=4096, shots=0, truncated=3),
]


def row(page, name):
    lines = [line for line in page.splitlines() if line.startswith(f"| {name}")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def test_table_1_stands_beside_the_papers_models_of_the_nearest_size(model):
    found = report.compare(model, NINE, paper_size=None)
    assert found["table_1"]["size"] == "400M"
    page = report.page(found)
    (ours,) = row(page, "**this model**")
    assert ours[1:] == [
        *("25.00", "30.00", "40.00", "50.00", "30.00", "50.00"),
        *("50.00", "30.00", "50.00", "50.00", "43.75"),
    ]
    (theirs,) = row(page, "Titans (MAG)")
    assert theirs[1:3] == ["23.59", "27.81"]
    assert "380,000,000 parameters" in page
    assert "400M on 15B tokens" in page


def test_another_size_can_be_chosen(model):
    found = report.compare(model, NINE, paper_size="760M")
    assert "30B tokens" in report.page(found)


def test_no_average_of_fewer_than_all(model):
    (ours,) = row(report.page(report.compare(model, NINE[:4], paper_size=None)), "**this model**")
    assert ours[-1] == "-"


def test_every_number_comes_with_its_settings(model):
    found = report.compare(model, NINE, paper_size=None)
    (told,) = row(report.page(found), "arc_challenge")
    assert told[2] == "samples 10, shots 0, max length 4,096, truncated 3"
    for task, settings in found["table_1"]["settings"].items():
        assert {"samples", "max_length", "shots"} <= set(settings), task


def test_needles_are_shown_at_the_papers_lengths_and_ours(model):
    cells = [cell("niah_pk", at, accuracy=value) for at, value in (("1024", 1.0), ("16384", 0.5))]
    page = report.page(report.compare(model, cells, paper_size=None))
    (head,) = row(page, "S-NIAH-PK (niah_pk)")
    assert head[1:] == ["1024", "2048", "4096", "8192", "16384"]
    assert row(page, "**this model**")[0][1:] == ["100.00", "-", "-", "-", "50.00"]
    assert row(page, "Titans (MAC)")[0][1:] == ["-", "99.20", "98.80", "99.00", "98.40"]


def test_babilong_is_the_mean_of_the_questions_asked(model):
    cells = [
        cell("babilong_qa1", "4k", accuracy=0.75),
        cell("babilong_qa2", "4k", accuracy=0.25),
        cell("babilong_qa1", "1M", accuracy=0.1),
    ]
    found = report.compare(model, cells, paper_size=None)
    page = report.page(found)
    (ours,) = row(page, "**this model**")
    head = ["1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "512k", "1M", "10M"]
    assert ours[1:] == ["50.00" if at == "4k" else "10.00" if at == "1M" else "-" for at in head]
    assert "(qa1, qa2)" in page
    assert "Figure 6a" in page
    assert "Figure 6b" not in page


def test_a_fine_tuned_model_stands_beside_fine_tuned_ones(model):
    cells = [cell("babilong_qa1", "10M", accuracy=0.5, shots=0)]
    page = report.page(report.compare(model, cells, paper_size=None))
    assert "Figure 6b" in page
    assert row(page, "RMT")[0][-1] == "34.00"


def test_a_curve_is_told_by_position(model, tmp_path):
    curve = [{"from": 0, "to": 1, "loss": 5.0}, {"from": 1, "to": 2048, "loss": 3.5}]
    found = report.write(model, tmp_path, [cell("position", "2048", loss=3.5, curve=curve)])
    page = report.page(found)
    assert row(page, "1 to 2,047")[0][1] == "3.5000"
    assert row(page, "position 2048")[0][1] == "loss 3.5000"


def test_results_that_the_paper_has_none_of_are_told_alone(model):
    page = report.page(report.compare(model, [cell("position", loss=3.25)], paper_size=None))
    assert row(page, "position")[0][1] == "loss 3.2500"
    assert "Titans" not in page


@pytest.mark.parametrize(
    ("name", "tokens"), [("2048", 2048), ("4k", 4000), ("1M", 10**6), ("0k", 0), ("", 0), ("qa", 0)]
)
def test_cells_are_ordered_by_their_lengths(name, tokens):
    assert report.tokens(name) == tokens


def test_the_same_results_give_the_same_text_and_a_picture(model, tmp_path):
    cells = [*NINE, cell("niah_pk", "2048", accuracy=1.0), cell("babilong_qa1", "1k", accuracy=1.0)]
    out = tmp_path / "out"
    out.mkdir()
    found = report.write(model, out, cells)
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    first = (out / "report.md").read_bytes()
    report.write(model, out, cells)
    assert (out / "report.md").read_bytes() == first
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "report.png"]


def test_a_picture_of_other_results_is_drawn_too(model, tmp_path):
    report.write(model, tmp_path, [cell("position", loss=3.25)])
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_what_is_not_recorded_is_said(model):
    page = report.page(report.compare(model, NINE, paper_size=None))
    assert "| trained tokens | not recorded |" in page
    assert "trained on a number of tokens that is not recorded" in page
    assert paper.figures()["table_1"]["source"] in page
