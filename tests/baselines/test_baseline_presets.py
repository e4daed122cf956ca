"""A baseline's preset has as many parameters as its name says, and makes a run."""

import pytest
import yaml

from titans_pretrain import config
from titans_pretrain.plan import parameters

SIZES = {"170m": 170e6, "340m": 340e6, "760m": 760e6}
KINDS = (
    "llama",
    "mamba",
    "mamba2",
    "retnet",
    "gla",
    "deltanet",
    "gated-deltanet",
    "ttt-linear",
    "ttt-mlp",
    "samba",
    "gated-deltanet-h2",
    "rmt",
)
PRESETS = sorted(path.stem for path in config.PRESETS.glob("*.yaml") if "hf:" in path.read_text())


def test_each_baseline_has_a_preset_of_each_size():
    assert set(PRESETS) == {f"{kind}-{size}" for kind in KINDS for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_ttt_presets_have_the_published_inner_learning_rates_and_heads(size):
    heads = {"170m": 12, "340m": 16, "760m": 16}[size]
    for kind, rate in (("linear", 1.0), ("mlp", 0.1)):
        preset = yaml.safe_load((config.PRESETS / f"ttt-{kind}-{size}.yaml").read_text())
        assert (preset["inner_learning_rate"], preset["num_heads"]) == (rate, heads)


@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith("170m") else pytest.param(name, marks=pytest.mark.slow)
        for name in PRESETS
    ],
)
def test_parameters_are_within_two_percent_of_the_name(name):
    sections = {
        "model": {"preset": name},
        "data": {"manifest": "m.json", "sequence_length": 4096},
        "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 0.1},
        "run": {"directory": "out"},
    }
    run = config.resolve(sections, source="test")
    assert config.resolve(yaml.safe_load(config.dump(run)), source="again") == run
    assert parameters.count(run.model) == pytest.approx(SIZES[name.rsplit("-", 1)[1]], rel=0.02)
