"""Ratios, tables and targets of benchmarks."""

import json
import math

import pytest

from titans_pretrain.bench import figures, memory_targets
from titans_pretrain.bench.figures import Spread
from titans_pretrain.bench.memory_targets import ATTENTION, OURS, THEIRS
from titans_pretrain.errors import UserError

LENGTHS = [2048, 8192, 65536]


PEERS = [ATTENTION, THEIRS]


def parse(*given, peers=PEERS):
    found = memory_targets.parse(given, LENGTHS, 8192, peers)
    return [(one.kind, one.length, one.bound) for one in found]


def row(tokens, layer=OURS, peak=10, **more):
    return {"tokens": tokens, "layer": layer, "peak_bytes": peak, "ratios": {}} | more


def just(value):
    return Spread(value, value, value)


def test_a_ratio_is_the_median_of_the_rounds_own():
    assert figures.ratio([2, 30, 4], [1, 10, 8]) == Spread(2, 0.5, 3)
    assert Spread(2, 0.5, 3).text() == "2.00 (0.50 to 3.00)"


def test_a_target_without_a_length_is_judged_at_all_that_it_can_be():
    assert parse("speed=2.5") == [("speed", 2048, 2.5), ("speed", 8192, 2.5)]
    assert parse("attention@8192=1") == [("attention", 8192, 1.0)]
    assert parse("products=0.5") == [("products", length, 0.5) for length in LENGTHS]
    assert parse("growth=1.1") == [("growth", 8192, 1.1), ("growth", 65536, 1.1)]
    assert parse("growth@65536=1.1", "memory@2048=0.2") == [
        ("growth", 65536, 1.1),
        ("memory", 2048, 0.2),
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("speed", "no target"),
        ("sped=2", "did you mean 'speed'"),
        ("speed=fast", "no bound above zero"),
        ("speed=-1", "no bound above zero"),
        ("speed=inf", "no bound above zero"),
        ("speed@512=2", "'512' is not measured"),
        ("speed@=2", "no target"),
        ("speed@65536=2", "no peer is measured beyond 8192 tokens"),
        ("growth@2048=1.1", "growth needs a second length"),
    ],
)
def test_a_target_that_cannot_be_judged_is_refused(given, told):
    with pytest.raises(UserError) as caught:
        parse(given)
    assert told in str(caught.value)
    assert caught.value.where == "--check"
    assert caught.value.fix


@pytest.mark.parametrize(("kind", "peer"), [("attention", ATTENTION), ("memory", THEIRS)])
def test_a_target_beside_one_that_is_not_measured_is_refused(kind, peer):
    others = [other for other in PEERS if other != peer]
    with pytest.raises(UserError, match=f"{peer} is not measured"):
        parse(f"{kind}=1", peers=others)
    assert parse("products=1", peers=[])


def test_targets_are_met_or_missed_by_medians():
    rows = [
        row(
            8192,
            ratios={THEIRS: just(5.0), ATTENTION: just(0.9)},
            products=just(0.4),
            growth=just(1.05),
        ),
        row(8192, THEIRS, peak=100),
    ]
    wanted = {
        "speed=5": True,
        "speed=5.1": False,
        "attention=0.9": True,
        "attention=1": False,
        "memory=0.1": True,
        "memory=0.09": False,
        "growth=1.1": True,
        "growth=1.01": False,
        "products=0.4": True,
        "products=0.5": False,
    }
    targets = memory_targets.parse([*wanted], [64, 8192], 8192, PEERS)
    verdicts = memory_targets.judge([one for one in targets if one.length == 8192], rows)
    assert [one.passed for one in verdicts] == [*wanted.values()]
    assert figures.verdict_lines(verdicts)[1] == (
        "FAIL  8,192 tokens: tokens/s of titans-pytorch's at least 5.1: 5"
    )


@pytest.mark.parametrize("kind", ["speed", "attention", "memory"])
def test_a_figure_that_is_missing_meets_no_target(kind):
    rows = [row(64, products=just(1), growth=just(1)), row(64, THEIRS, peak=None)]
    (verdict,) = memory_targets.judge(memory_targets.parse([f"{kind}=0.1"], [64], 64, PEERS), rows)
    assert not verdict.passed
    assert verdict.found is None
    assert figures.verdict_lines([verdict])[0].endswith("not measured")


def test_json_is_written_whole_and_plain(tmp_path):
    path = tmp_path / "result.json"
    verdict = figures.Verdict("told", 1.0, None, passed=False)
    figures.write_json(path, {"rows": [{"seconds": just(1.0)}], "checks": (verdict,)})
    found = json.loads(path.read_text())
    assert found["rows"][0]["seconds"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert found["checks"][0]["found"] is None
    with pytest.raises(ValueError, match="JSON"):
        figures.write_json(path, {"rows": math.nan})
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize("place", [".", "no/such/directory/result.json"])
def test_a_json_file_that_could_not_be_written_is_refused_at_once(tmp_path, place):
    with pytest.raises(UserError) as caught:
        figures.check_json(tmp_path / place)
    assert caught.value.where == "--json"
