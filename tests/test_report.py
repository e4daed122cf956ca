import json
import math

import pytest

from titans_pretrain import report
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.errors import UserError


@pytest.fixture
def make_run(tmp_path):
    def make(name, steps=30, manifest=None):
        run = tmp_path / name
        run.mkdir()
        rows = [
            {"step": s, "loss": 6 - s / 10, "tokens": s * 100, "tokens_per_second": 50.0 + s}
            for s in range(1, steps + 1)
        ]
        rows.insert(10, {"step": 10, "validation_loss": 5.25})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if manifest is not None:
            (run / "config.yaml").write_text(f"data:\n  manifest: {manifest}\n")
        return run

    return make


def test_a_run_is_drawn_and_tabled(make_run, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"unigram_entropy": 6.4321}')
    run = make_run("first", manifest=tmp_path / "manifest.json")
    report.report([run])
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert header.split() == list(report.COLUMNS)
    assert row.split() == ["first", "30", "3,000", "5.9000", "3.0000", "5.2500", "6.4321", "66"]


def test_evaluations_are_joined_by_step(make_run, capsys, monkeypatch):
    run = make_run("evaluated")
    told = {"settings": {}, "results": {}}
    for step in range(3, 31, 3):
        scores = {"piqa/accuracy": 0.5} if step >= 27 else {}
        metrics = {"heldout/loss": 6 - step / 10} | scores
        evaluations.write(run, step, "a", metrics=metrics, **told)
    evaluations.fail(run, 29, "a", "no data")
    drawn = []
    draw = report._draw_run
    monkeypatch.setattr(
        report, "_draw_run", lambda axes, *more: drawn.append((axes, draw(axes, *more)))
    )
    report.report([run])
    *_, blank, header, losses, accuracies, failed, _ = capsys.readouterr().out.splitlines()
    assert blank == ""
    assert header.split() == ["evaluated:", "step", *map(str, range(9, 31, 3))]
    assert losses.split() == ["heldout/loss", *(f"{6 - step / 10:.4f}" for step in range(9, 31, 3))]
    assert accuracies.split() == ["piqa/accuracy", *["-"] * 6, "0.5000", "0.5000"]
    assert failed == "! step 29 was not evaluated: no data"
    labels = [text.get_text() for text in drawn[0][0].get_legend().get_texts()]
    assert "evaluated evaluation (3.000)" in labels
    assert not any("other settings" in label for label in labels)


def test_evaluations_of_other_settings_than_the_newest_are_marked(make_run, capsys, monkeypatch):
    run = make_run("evaluated")
    for step, dtype in ((10, "bfloat16"), (20, "float32"), (30, "float32")):
        told = {"settings": {"dtype": dtype, "tasks": []}, "results": {}}
        evaluations.write(run, step, "a", metrics={"heldout/loss": 4.0}, **told)
    drawn = []
    draw = report._draw_run
    monkeypatch.setattr(
        report, "_draw_run", lambda axes, *more: drawn.append((axes, draw(axes, *more)))
    )
    report.report([run])
    *_, header, _, note, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["evaluated:", "step", "10*", "20", "30"]
    assert note == "* step 10 was evaluated with other dtype"
    labels = [text.get_text() for text in drawn[0][0].get_legend().get_texts()]
    assert "evaluated evaluation of other settings (4.000)" in labels
    found = report.read_run(run).held_out()
    assert found == {"": [(20, 4.0), (30, 4.0)], "*": [(10, 4.0)], "!": []}


def fail(run, step, dtype, why, **metrics):
    """An evaluation that failed, with what it had found."""
    if metrics:
        place = evaluations.workplace(run, step, "a", {})
        place.mkdir(parents=True)
        evaluations.keep(place, metrics=metrics, settings={"dtype": dtype}, results={})
    evaluations.fail(run, step, "a", why)


def test_evaluations_that_failed_are_told_marked_and_not_compared_with(
    make_run, capsys, monkeypatch
):
    run = make_run("evaluated")
    for step in (10, 20):
        told = {"settings": {"dtype": "float32"}, "results": {}}
        evaluations.write(run, step, "a", metrics={"heldout/loss": 4.0}, **told)
    fail(run, 28, "float32", "one task\n failed", **{"heldout/loss": 3.0})
    fail(run, 29, "float32", "no disk")
    fail(run, 30, "bfloat16", "no memory", **{"heldout/loss": 2.0})
    drawn = []
    draw = report._draw_run
    monkeypatch.setattr(
        report, "_draw_run", lambda axes, *more: drawn.append((axes, draw(axes, *more)))
    )
    report.report([run])
    *_, header, losses, otherwise, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["evaluated:", "step", "10", "20", "28!", "30*!"]
    assert losses.split() == ["heldout/loss", "4.0000", "4.0000", "3.0000", "2.0000"]
    assert otherwise == "* step 30 was evaluated with other dtype"
    assert first == "! step 28 was evaluated in part: one task failed"
    assert second == "! step 29 was not evaluated: no disk"
    assert third == "! step 30 was evaluated in part: no memory"
    labels = [text.get_text() for text in drawn[0][0].get_legend().get_texts()]
    assert "evaluated evaluation (4.000)" in labels
    assert "evaluated evaluation in part (2.000)" in labels


def test_where_every_evaluation_failed_the_newest_reasons_are_told(make_run, capsys):
    run = make_run("evaluated")
    for step in range(1, 11):
        fail(run, step, "float32", f"no data {step}")
    report.report([run])
    *_, head, first, _, _, _, _, _, _, last, earlier, _ = capsys.readouterr().out.splitlines()
    assert head == "evaluated: no evaluation"
    assert first == "! step 3 was not evaluated: no data 3"
    assert last == "! step 10 was not evaluated: no data 10"
    assert earlier == "! 2 earlier evaluations failed, too"


def test_several_runs_share_a_picture(make_run, tmp_path, capsys):
    output = tmp_path / "pictures/both.png"
    report.report([make_run("one"), make_run("two", steps=300)], output)
    assert output.stat().st_size > 10_000
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["one", "two"]


def test_a_torn_last_line_is_left_out_and_said(make_run, capsys):
    run = make_run("torn")
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 31, "lo')
    assert report.read_run(run).train[-1] == (30, 3.0)
    assert "metrics.jsonl:32: the last line is torn" in capsys.readouterr().err


def test_a_bad_line_in_the_middle_is_named(make_run):
    run = make_run("bad")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("nonsense\n" + text)
    with pytest.raises(UserError, match="no JSON object") as caught:
        report.read_run(run)
    assert caught.value.where.endswith("metrics.jsonl:1")


def test_a_directory_without_metrics_or_without_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read metrics.jsonl"):
        report.report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step is logged yet"):
        report.report([tmp_path])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": 1, "loss": null}', "loss is None, no number"),
        ('{"step": 1, "loss": "a"}', "loss is 'a', no number"),
        ('{"step": 1, "loss": true}', "loss is True, no number"),
        ('{"step": "x", "loss": 1.0}', "step is 'x', no number"),
        ('{"step": 1, "validation_loss": [2]}', "validation_loss is \\[2\\], no number"),
        ('{"step": 1, "loss": 1.0, "tokens": "9"}', "tokens is '9', no number"),
        ('{"step": 1, "loss": 1.0, "tokens_per_second": {}}', "tokens_per_second is {}, no"),
        ('{"step": 1, "loss": 1' + "0" * 400 + "}", "loss is 1000.*, no number"),
        ('"a"', "no JSON object with a step"),
        ("[" * 100_000, "no JSON object with a step"),
        ('{"loss": 1.0}', "no JSON object with a step"),
    ],
)
def test_a_row_of_other_things_than_numbers_is_named(make_run, row, message):
    run = make_run("bad")
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write(row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        report.read_run(run)
    assert caught.value.where.endswith("metrics.jsonl:32")


def test_an_unknown_unigram_entropy_is_told_with_the_reason(make_run, tmp_path, capsys):
    run = make_run("moved", manifest="data/manifest.json")
    assert report.read_run(run).unigram_entropy is None
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path.cwd()}/data/manifest.json: No such file")
    (run / "config.yaml").write_text("model: {}")
    assert report.read_run(run).unigram_entropy is None
    assert f"{run}/config.yaml: names no unigram entropy" in capsys.readouterr().err


def test_smoothed_losses_are_means_around_their_steps():
    losses = [float(i % 7) for i in range(1000)]
    middles, means = report._smooth(losses)
    assert list(middles) == list(range(1000))
    assert means[500] == pytest.approx(sum(losses[490:511]) / 21)
    assert means[0] == pytest.approx(sum(losses[:11]) / 11)
    losses[500] = math.nan
    losses[501] = math.inf
    _, means = report._smooth(losses)
    rest = losses[490:500] + losses[502:511]
    assert means[500] == pytest.approx(sum(rest) / 19)
    assert all(map(math.isnan, report._smooth([math.nan] * 300)[1]))


def test_smoothing_a_long_run_takes_no_square_of_its_length():
    class Counted(list):
        taken = 0

        def __getitem__(self, key):
            Counted.taken += len(range(*key.indices(len(self))))
            return super().__getitem__(key)

    middles, means = report._smooth(Counted([1.0] * 100_000))
    assert len(middles) == len(means) == 2000
    assert Counted.taken < 50 * 100_000


def test_a_run_is_called_by_its_own_name(make_run):
    run = make_run("directory")
    (run / "config.yaml").write_text("run: {name: given}\n")
    assert report.read_run(run).name == "given"
    (run / "config.yaml").write_text("run: {name: ''}\n")
    assert report.read_run(run).name == "directory"
