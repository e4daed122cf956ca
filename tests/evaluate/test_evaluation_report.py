"""Our results beside the paper's, with the settings they depend on."""

import json
import math

import pytest

from titans_pretrain.evaluate import loaded, paper, report, report_figure, report_tables


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory that says it is a model of 380 million parameters."""
    monkeypatch.setattr(loaded, "parameters", lambda _: 380_000_000)
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


def cell(task, name="", *, samples=10, max_length=None, shots=None, more=None, **metrics):
    identity = {"samples": samples, "max_length": max_length, "shots": shots, **(more or {})}
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
    found = report_tables.compare(model, NINE, paper_size=None)
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
    found = report_tables.compare(model, NINE, paper_size="760M")
    assert "30B tokens" in report.page(found)


def test_no_average_of_fewer_than_all(model):
    (ours,) = row(
        report.page(report_tables.compare(model, NINE[:4], paper_size=None)), "**this model**"
    )
    assert ours[-1] == "-"


def test_every_number_comes_with_its_settings(model):
    found = report_tables.compare(model, NINE, paper_size=None)
    (told,) = row(report.page(found), "arc_challenge")
    assert told[2] == "samples 10, shots 0, max length 4,096, truncated 3"
    (ours,) = found["table_1"]["ours"]
    for task, settings in ours["settings"].items():
        assert {"samples", "max_length", "shots"} <= set(settings), task


def test_all_that_a_number_depends_on_is_told_hashes_by_their_beginnings(model):
    more = {"seed": 3, "essays": ["a" * 64, "b" * 64], "lm_eval": "0.4.13", "definition": 1}
    cells = [cell("niah_number", "2048", accuracy=1.0, samples=9, more=more)]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    wanted = "samples 9, seed 3, essays aaaaaaaa bbbbbbbb, lm eval 0.4.13, definition 1"
    assert row(page, "niah_number 2048")[0][2] == wanted
    assert f"(1) {wanted}; samples by length: 2048 9." in page


def test_what_the_paper_leaves_open_or_misprints_is_told(model):
    cells = [*NINE, cell("niah_uuid", "2048", accuracy=1.0)]
    page = report.page(report_tables.compare(model, cells, paper_size="760M"))
    assert "prints 47.32 as the average of TTT, its columns give 49.37" in page
    assert "S-NIAH-W has UUIDs as values is our reading" in page
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    assert "its columns give 47.80; and 47.83 for Titans (LMM), its columns give 47.87" in page


def test_table_1_has_a_row_for_each_length_and_the_most_samples_of_each_task(model):
    cells = [
        cell("piqa", acc=0.5, max_length=64, samples=100),
        cell("piqa", acc=0.9, max_length=64, samples=3),
        cell("piqa", acc=0.7, max_length=32, samples=3),
    ]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    found = {ours[0]: ours[4] for ours in row(page, "**this model**")}
    assert found == {
        "**this model** (max length 64)": "50.00",
        "**this model** (max length 32)": "70.00",
    }
    assert len(row(page, "piqa")) == 3


@pytest.mark.parametrize("other", ["documents", "lm_eval", "version"])
def test_more_samples_of_other_questions_do_not_outrank_the_newest(model, other):
    old, new = ({other: name} for name in ("old", "new"))
    cells = [
        cell("piqa", acc=0.6, max_length=64, samples=1838, more=new),
        cell("piqa", acc=0.9, max_length=64, samples=2000, more=old),
        cell("piqa", acc=0.5, max_length=64, samples=3, more=new),
    ]
    (ours,) = report_tables.compare(model, cells, paper_size=None)["table_1"]["ours"]
    assert ours["values"][paper.columns().index("piqa")] == 60.0
    assert ours["settings"]["piqa"][other] == "new"


def test_needles_of_other_settings_are_rows_of_their_own(model):
    cells = [
        cell("niah_pk", "2048", accuracy=1.0, more={"seed": 0}),
        cell("niah_pk", "4096", accuracy=0.5, more={"seed": 1}),
    ]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    assert [ours[1:3] for ours in row(page, "**this model**")] == [["100.00", "-"], ["-", "50.00"]]


def test_needles_are_shown_at_the_papers_lengths_and_ours(model):
    cells = [cell("niah_pk", at, accuracy=value) for at, value in (("1024", 1.0), ("16384", 0.5))]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    (head,) = row(page, "S-NIAH-PK (niah_pk)")
    assert head[1:] == ["1024", "2048", "4096", "8192", "16384"]
    assert row(page, "**this model**")[0][1:] == ["100.00", "-", "-", "-", "50.00"]
    assert row(page, "Titans (MAC)")[0][1:] == ["-", "99.20", "98.80", "99.00", "98.40"]


FIVE = [cell(f"babilong_qa{n}", "4k", accuracy=n / 10) for n in range(1, 6)]
HEAD = ["1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "512k", "1M", "10M"]


def test_babilong_stands_beside_the_paper_where_all_of_its_questions_were_asked(model):
    cells = [
        *FIVE,
        cell("babilong_qa6", "4k", accuracy=0.9),
        cell("babilong_qa1", "1M", accuracy=0.1),
    ]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    beside, alone = page.split("Mean accuracy in percent of other sets of questions")
    (ours,) = row(beside, "**this model**")
    assert ours[1:] == ["30.00" if at == "4k" else "-" for at in HEAD]
    assert len(row(beside, "Titans (MAC)")) == 1
    assert "Figure 6a" in beside
    assert "Figure 6b" not in page
    assert not row(alone, "Titans")
    assert [ours[1:] for ours in row(alone, "**this model**")] == [["-", "10.00"], ["40.00", "-"]]
    assert "(1) qa1; " in alone
    assert "(2) qa1, qa2, qa3, qa4, qa5, qa6; " in alone


@pytest.mark.parametrize(
    "other",
    [
        {"samples": 3},
        {"more": {"seed": 1}},
        {"more": {"background": ["b" * 64]}},
        {"more": {"definition": 2}},
    ],
)
def test_babilong_of_other_settings_is_a_row_of_its_own(other, model):
    cells = [*FIVE, *(cell(one["task"], "8k", accuracy=1.0, **other) for one in FIVE)]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    first, second = (ours[1:] for ours in row(page, "**this model**"))
    assert first == ["30.00" if at == "4k" else "-" for at in HEAD]
    assert second == ["100.00" if at == "8k" else "-" for at in HEAD]


def test_fewer_questions_than_the_papers_stand_alone(model):
    cells = [*FIVE[:4], cell("babilong_qa6", "4k", accuracy=0.5)]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    assert len(row(page, "**this model**")) == 1
    assert not row(page, "Titans")


def test_questions_of_other_facts_are_not_mixed(model):
    old, new = {"facts": "a" * 64}, {"facts": "b" * 64}
    cells = [
        cell("babilong_qa1", "1k", accuracy=0.1, more=old),
        cell("babilong_qa1", "2k", accuracy=0.3, more=old),
        cell("babilong_qa1", "1k", accuracy=0.2, more=new),
    ]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    wanted = [["20.00", "-"], ["10.00", "30.00"]]  # the newest first
    assert [ours[1:] for ours in row(page, "**this model**")] == wanted
    assert "(1) qa1; samples 10, facts bbbbbbbb; samples by length: 1k 10." in page
    assert "(2) qa1; samples 10, facts aaaaaaaa; samples by length: 1k 10, 2k 10." in page


def test_questions_whose_facts_were_not_corrected_stand_beside_old_ones_and_new_ones(model):
    def asked(number, at, accuracy, facts):
        return cell(f"babilong_qa{number}", at, accuracy=accuracy, more={"facts": facts * 64})

    cells = [
        *(asked(n, at, 0.1, str(n)) for n in range(1, 6) for at in ("4k", "8k")),
        asked(1, "4k", 0.6, "a"),
        asked(6, "2k", 0.7, "6"),
    ]
    found = report_tables.compare(model, cells, paper_size=None)
    (part,) = found["figure_6"]
    rows = [
        (len(one["questions"]), one["settings"]["facts"][0][0], sorted(one["cells"]))
        for one in part["ours"]
    ]
    assert rows == [
        (5, "a", ["4k"]),
        (4, "2", ["8k"]),
        (1, "6", ["2k"]),
        (5, "1", ["4k", "8k"]),
    ]
    values = [round(one["accuracy"], 6) for ours in part["ours"] for one in ours["cells"].values()]
    assert values == [20, 10, 70, 10, 10]


def test_a_fine_tuned_model_stands_beside_fine_tuned_ones(model):
    cells = [cell(one["task"], "10M", accuracy=0.5, shots=0) for one in FIVE]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    assert "Figure 6b" in page
    assert "Figure 6a" not in page
    assert row(page, "RMT")[0][-1] == "34.00"


CURVE = [
    {"from": 0, "to": 1, "loss": 800.0, "perplexity": None},
    {"from": 1, "to": 2, "loss": 100.0, "perplexity": math.exp(100.0)},
    {"from": 2, "to": 2048, "loss": 3.5, "perplexity": math.exp(3.5)},
]


def test_a_curve_is_told_by_position(model, tmp_path):
    found = report.write(model, tmp_path, [cell("position", "2048", loss=3.5, curve=CURVE)])
    page = report.page(found)
    assert row(page, "positions")[0][1:] == ["loss (nats per token)", "perplexity"]
    assert row(page, "0 to 0")[0][1:] == ["800.0000", "-"]
    assert row(page, "1 to 1")[0][1:] == ["100.0000", "2.688e+43"]
    assert row(page, "2 to 2,047")[0][1:] == ["3.5000", "33.1155"]
    assert row(page, "position 2048")[0][1] == "loss 3.5000"


def test_curves_of_one_name_are_numbered_and_told_apart_by_their_settings(model):
    cells = [
        cell("position", "64", loss=3.5, curve=CURVE[2:], more={"code": code * 64}) for code in "ab"
    ]
    page = report.page(report_tables.compare(model, cells, paper_size=None))
    for number, code in ((1, "a"), (2, "b")):
        head = f"## Loss against position: position 64 ({number})"
        assert f"{head}\n\nsamples 10, code {code * 8}.\n" in page


def test_the_picture_of_a_curve_has_an_axis_of_perplexities():
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    report_figure._curves(axes, [{"name": "position", "curve": CURVE}])
    axes.set_ylim(0, 800)
    figure.canvas.draw()
    (right,) = axes.child_axes
    assert right.get_ylabel() == "perplexity"
    told = [
        tick.label1.get_text() or tick.label2.get_text() for tick in right.yaxis.get_major_ticks()
    ]
    assert (told[0], told[-1]) == ("1", "")  # of losses 0 and 800
    pyplot.close(figure)


def test_table_1_has_a_row_for_each_code(model):
    cells = [
        cell("piqa", acc=0.5, max_length=64),
        cell("piqa", acc=0.7, max_length=64, more={"code": "a" * 64}),
        cell("boolq", acc=0.9, max_length=64, more={"code": "transformers 5.1.0"}),
    ]
    found = report_tables.compare(model, cells, paper_size=None)
    names = [ours[0] for ours in row(report.page(found), "**this model**")]
    assert sorted(names) == [
        "**this model** (code aaaaaaaa)",
        "**this model** (code transformers 5.1.0)",
        "**this model** (code unknown)",
    ]
    assert [ours["values"].count(None) for ours in found["table_1"]["ours"]] == [10] * 3


def test_where_nothing_was_done_the_reasons_are_told(model, tmp_path):
    report.write(model, tmp_path, [], failed=["piqa: no answer"])
    page = (tmp_path / "report.md").read_text()
    assert "## Not done\n\n- piqa: no answer\n" in page
    assert "## Results" not in page
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_results_that_the_paper_has_none_of_are_told_alone(model):
    page = report.page(report_tables.compare(model, [cell("position", loss=3.25)], paper_size=None))
    assert row(page, "position")[0][1] == "loss 3.2500"
    assert "Titans" not in page


@pytest.mark.parametrize(
    ("name", "tokens"), [("2048", 2048), ("4k", 4000), ("1M", 10**6), ("0k", 0), ("", 0), ("qa", 0)]
)
def test_cells_are_ordered_by_their_lengths(name, tokens):
    assert report_tables.tokens(name) == tokens


def test_the_same_results_give_the_same_text_and_a_picture(model, tmp_path):
    cells = [*NINE, cell("niah_pk", "2048", accuracy=1.0), *FIVE]
    cells.append(cell("babilong_qa1", "1k", accuracy=1.0))
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
    page = report.page(report_tables.compare(model, NINE, paper_size=None))
    assert "| trained tokens | not recorded |" in page
    assert "trained on a number of tokens that is not recorded" in page
    assert paper.figures()["table_1"]["source"] in page
