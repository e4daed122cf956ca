"""``titans bench wavefront``: rows beside their formulas, ranks that run and ranks that fail."""

import json
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.bench import local_ranks, wavefront
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import TitansError, UserError

OPTIONS = wavefront.Options(layers=3, micro_batches=2, rounds=2, ranks=(1, 2))


def as_the_formula(given, ranks):
    """Ranks that take 10 ms a layer, the last a little less."""
    case = wavefront.Case(ranks, given["micro_batches"], given["interleaved"])
    step = case.ideal(given["layers"]) * 0.01
    return [step * (1 - 0.1 * rank) for rank in range(ranks)]


@pytest.fixture
def ideal_ranks(monkeypatch):
    monkeypatch.setattr(
        local_ranks, "run", lambda module, given, ranks: as_the_formula(given, ranks)
    )


@pytest.fixture
def stub_rank(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "stub_rank"


def test_a_row_is_its_slowest_rank_over_the_formula():
    layer, rows = wavefront.measure(OPTIONS, Tell(), as_the_formula)
    assert layer.median == pytest.approx(0.01)
    assert [(row["sequence_ranks"], row["micro_batches"], row["interleaved"]) for row in rows] == [
        (r, *kind) for r in (1, 2) for kind in ((1, False), (2, False), (2, True))
    ]
    assert [row["ratio"].median for row in rows] == pytest.approx([1] * 6)
    assert rows[-2]["ideal_seconds"] == pytest.approx(2 * (3 + 2 - 1) * 0.01)
    assert rows[-1]["ideal_seconds"] == pytest.approx((2 * 3 + 2 - 1) * 0.01)
    assert rows[-1]["lock_step_seconds"] == pytest.approx(2 * 3 * 2 * 0.01)


def test_one_micro_batch_has_one_row_for_itself():
    options = wavefront.Options(layers=3, micro_batches=1, ranks=(1,))
    _, rows = wavefront.measure(options, Tell(), as_the_formula)
    assert [row["interleaved"] for row in rows] == [False, True]


def test_a_table_a_target_a_picture_and_all_figures_as_json(ideal_ranks, tmp_path, capsys):
    file, picture = tmp_path / "result.json", tmp_path / "picture.png"
    sizes = ["--layers", "3", "--ranks", "1", "2", "--micro-batches", "2"]
    command = ["bench", "wavefront", *sizes, "--json", str(file), "--plot", str(picture)]
    assert cli.main([*command, "--check", "1.1"]) == 0
    assert "PASS" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found) == {
        "benchmark",
        "environment",
        "options",
        "layer_seconds",
        "rows",
        "checks",
    }
    assert len(found["rows"]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--check", "0.9"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["picture.pdf", "no/such/directory/picture.png"])
def test_a_picture_that_could_not_be_drawn_is_refused_at_once(tmp_path, path):
    with pytest.raises(UserError) as caught:
        wavefront.check_plot(tmp_path / path)
    assert caught.value.where == "--plot"


def test_a_number_of_ranks_that_is_given_twice_is_refused_before_anything_is_measured(
    monkeypatch, capsys
):
    monkeypatch.setattr(local_ranks, "run", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["bench", "wavefront", "--ranks", "2", "1", "2"]) == 2
    assert "where: --ranks" in capsys.readouterr().err


def test_ranks_tell_what_they_found_in_their_order(stub_rank):
    assert local_ranks.run(stub_rank, {"word": "a b"}, 2) == [[0, 2, "a b"], [1, 2, "a b"]]


def test_a_rank_that_fails_ends_the_others_and_is_told(stub_rank):
    with pytest.raises(TitansError, match="rank 1 ended with exit code 4\nrank's reason"):
        local_ranks.run(stub_rank, {"fails": 1}, 2)


def test_the_trainers_own_steps_take_at_least_their_layers_sleep():
    options = {
        "layers": 2,
        "seconds": (0.01, 0.02),
        "micro_batches": 2,
        "interleaved": True,
        "steps": 1,
    }
    found = local_ranks.run(wavefront.MODULE, options, 2)
    assert len(found) == 2
    assert min(found) > 2 * 2 * 0.03
