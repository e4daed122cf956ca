"""Part of needle_recall.py: half its length, fewer steps, fewer needles, and less forgetting."""

import json
from dataclasses import replace

import needle_recall
import pytest
from needle_recall import LONG, SHORT, Samples, Trial

TRAINED = 128
PARTS = (
    replace(SHORT, samples=replace(SHORT.samples, count=11_200), changes=("train.steps=350",)),
    replace(
        LONG,
        samples=Samples(TRAINED, count=4000),
        changes=(
            "train.steps=170",
            "train.min_learning_rate_ratio=0.1",
            "train.warmup_steps=20",
            "train.global_batch_size=16",
            "train.micro_batch_size=16",
        ),
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes", "least", "most"),
    [("lmm", ("model.forget_bias=-7",), 0.95, 1), ("window", (), 0, 0.1)],
    ids=["lmm", "window"],
)
def test_a_memory_recalls_needles_at_four_times_its_training_length(
    config, changes, least, most, tmp_path
):
    needle_recall.make_data(tmp_path, PARTS)
    trial = Trial(config, config, changes, parts=PARTS)
    model = needle_recall.make_model(config, trial, tmp_path, seed=0)
    found = needle_recall.recall(model, TRAINED, [1, 4], samples=40)
    assert all(least <= share <= most for share in found.values()), found


def test_the_share_is_that_of_as_many_needles_as_asked(tmp_path, monkeypatch):
    """The report holds what earlier calls with other numbers of samples found, too."""
    rows = [
        {"cell": str(at * TRAINED + 128), "identity": {"samples": count}, "result": {"accuracy": x}}
        for at, count, x in [(1, 100, 0.9), (32, 40, 0.5), (32, 100, 0.2), (1, 40, 0.1)]
    ]
    out = tmp_path / "model-needles"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"results": rows}))
    monkeypatch.setattr(needle_recall, "titans", lambda *_: None)
    found = needle_recall.recall(tmp_path / "model", TRAINED, [1, 32], samples=100)
    assert found == {1: 0.9, 32: 0.5}
