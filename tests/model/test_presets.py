"""A preset has as many parameters as its name says."""

import pytest
import torch
import yaml

from titans_pretrain.config import PRESETS
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM

UNITS = {"m": 1e6, "b": 1e9}
TITANS = [*PRESETS.glob("titans-*.yaml"), *PRESETS.glob("transformer-*.yaml")]


@pytest.mark.parametrize("path", sorted(TITANS), ids=lambda path: path.stem)
def test_parameters_are_within_three_percent_of_the_name(path):
    size = path.stem.rsplit("-", 1)[1]
    with torch.device("meta"):
        model = TitansForCausalLM(TitansConfig(**yaml.safe_load(path.read_text())))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.03)
