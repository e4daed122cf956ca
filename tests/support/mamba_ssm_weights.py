"""What mamba-ssm's mixers begin with."""

import math

import pytest
import torch
import torch.nn.functional as F


def uniform(tensor, bound):
    """Whether values are drawn evenly from within the bound."""
    assert float(tensor.abs().max()) == pytest.approx(bound, rel=0.1)
    assert float(tensor.abs().max()) <= bound
    assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)


def check(mixer, residuals):
    """Whether a mixer begins so, in a model of that many sums into its residual."""
    inner = mixer.out_proj.in_features
    uniform(mixer.in_proj.weight, mixer.in_proj.in_features**-0.5)
    uniform(mixer.conv1d.weight, mixer.conv1d.kernel_size[0] ** -0.5)
    uniform(mixer.conv1d.bias, mixer.conv1d.kernel_size[0] ** -0.5)
    uniform(mixer.out_proj.weight, inner**-0.5 / math.sqrt(residuals))
    assert mixer.D.eq(1).all()
    scales = mixer.A_log.exp()
    if scales.ndim == 1:  # Mamba2
        steps = F.softplus(mixer.dt_bias)
        assert not torch.equal(scales, torch.arange(1.0, len(scales) + 1))
        assert scales.min() >= 1
        assert scales.max() <= 16
    else:
        uniform(mixer.x_proj.weight, inner**-0.5)
        uniform(mixer.dt_proj.weight, mixer.dt_proj.in_features**-0.5)
        steps = F.softplus(mixer.dt_proj.bias)
        torch.testing.assert_close(scales[0], torch.arange(1.0, scales.shape[1] + 1))
    assert steps.min() >= 0.0009
    assert steps.max() <= 0.11
