"""Part of needle_recall.py: one length less, fewer steps, fewer needles."""

from dataclasses import replace

import needle_recall
import pytest
from needle_recall import LONG, SHORT, Samples, Trial

TRAINED = 128
PARTS = (
    replace(SHORT, changes=("train.steps=350",)),
    replace(
        LONG,
        samples=Samples(TRAINED, count=4000),
        changes=(
            "train.steps=200",
            "train.min_learning_rate_ratio=0.1",
            "train.warmup_steps=20",
            "train.global_batch_size=16",
            "train.micro_batch_size=16",
        ),
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "least", "most"), [("lmm", 0.95, 1), ("window", 0, 0.1)])
def test_a_memory_recalls_needles_at_four_times_its_training_length(config, least, most, tmp_path):
    needle_recall.make_data(tmp_path, PARTS)
    model = needle_recall.make_model(config, Trial(config, config, parts=PARTS), tmp_path, seed=0)
    found = needle_recall.recall(model, TRAINED, [1, 4], samples=40)
    assert all(least <= share <= most for share in found.values()), found
