"""TTT: a layer whose state is a model trained on the tokens (arXiv 2407.04620).

It is the form in the Mamba backbone: one projection for queries and keys with a convolution each, a
gate, and a convolution on the residual before the layer (``BeforeTTT``).

The inner model f reconstructs v - k from k: loss |LN(f(k)) - (v - k)|^2 / 2 a token. The gradients
of a mini-batch are taken at the weights before it (the dual form); token t uses the sum of those up
to its own.

Shapes: B batch, H heads, h head width, b tokens of a mini-batch, T time, D width.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baseline_layers import CausalConvolution, RMSNorm, heads, merged, rotate
from .configuration_baseline import BaselineConfig

EXPANSION = 4  # hidden width of the inner MLP over h
EPSILON = 1e-6  # of its layer norms
SLOPE = math.sqrt(2 / math.pi)  # of the tanh in gelu at zero, and
CUBIC = 0.044715  # of the cube beside it


class BeforeTTT(nn.Module):
    """A convolution of the normed residual, added to it before TTT's own norm."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.convolution = CausalConvolution(config.hidden_size, config.conv_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        out: Tensor = x + self.convolution(self.norm(x))
        return out


class TTT(nn.Module):
    """TTT-Linear, or TTT-MLP."""

    def __init__(self, config: BaselineConfig, kind: str) -> None:
        super().__init__()
        width, self.heads, self.batch = config.hidden_size, config.num_heads, config.mini_batch_size
        self.theta, head = config.rope_theta, width // config.num_heads
        self.rate = config.inner_learning_rate / head
        self.q_proj = nn.Linear(width, width, bias=False)
        self.q_conv = CausalConvolution(width, config.conv_width)
        self.k_conv = CausalConvolution(width, config.conv_width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.rate_proj = nn.Linear(width, self.heads)
        self.step_sizes = nn.Parameter(torch.zeros(self.batch))
        widths = [head, head] if kind == "ttt_linear" else [head, EXPANSION * head, head]
        self.inner_weights = nn.ParameterList(
            torch.zeros(self.heads, *pair) for pair in itertools.pairwise(widths)
        )
        self.inner_biases = nn.ParameterList(torch.zeros(self.heads, 1, out) for out in widths[1:])
        self.inner_scale = nn.Parameter(torch.ones(self.heads, 1, head))
        self.inner_shift = nn.Parameter(torch.zeros(self.heads, 1, head))
        self.norm = nn.LayerNorm(width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        time = x.shape[1]
        positions = torch.arange(time, device=x.device) % self.batch
        shared = self.q_proj(x)
        parts = [self.q_conv(shared), self.k_conv(shared), self.v_proj(x)]
        queries, keys, values = (heads(part, self.heads) for part in parts)
        queries, keys = (rotate(part, positions, self.theta) for part in (queries, keys))
        rates = self.rate * heads(self.rate_proj(x).float().sigmoid(), self.heads)
        parts = [part.float() for part in (queries, keys, values, rates)]
        parts = [F.pad(part, (0, 0, 0, -time % self.batch)) for part in parts]
        layers = [
            (weight.float(), bias.float())
            for weight, bias in zip(self.inner_weights, self.inner_biases, strict=True)
        ]
        outputs = []
        for q, k, v, rate in zip(*(part.split(self.batch, 2) for part in parts), strict=True):
            read, layers = self._mini_batch(layers, q, k, v, rate)
            outputs.append(q + _normal(read)[0] * self.inner_scale + self.inner_shift)
        read = merged(torch.cat(outputs, 2)[:, :, :time])
        gate = _gelu(self.gate_proj(x))
        out: Tensor = self.o_proj(gate * self.norm(read.to(x.dtype)))
        return out

    def _mini_batch(
        self, layers: Sequence[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, rate: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """What the queries read, and the inner layers after the mini-batch."""
        inputs, sums = _run(layers, k)
        gradients = self._gradients(layers, sums, v - k)
        count = torch.arange(1, self.batch + 1, device=q.device)
        share = (1 / count + self.step_sizes.float()).clamp(min=0)[:, None]
        steps = (share * rate.transpose(2, 3)).tril()  # (B, H, b, b): of token j in token i's step
        after, hidden = [], q
        for index, (weight, bias) in enumerate(layers):
            overlap = hidden @ inputs[index].transpose(2, 3) + 1  # the bias is one more input of 1
            total = hidden @ weight + bias - (steps * overlap) @ gradients[index]
            last = steps[:, :, -1, :, None] * gradients[index]
            moved = inputs[index].transpose(2, 3) @ last
            after.append((weight - moved, bias - last.sum(2, keepdim=True)))
            hidden = total if index == len(layers) - 1 else _gelu(total)
        return hidden, after

    def _gradients(
        self, layers: Sequence[tuple[Tensor, Tensor]], sums: Sequence[Tensor], target: Tensor
    ) -> list[Tensor]:
        """Of each token's loss by what enters each layer's activation; all at these weights."""
        unit, spread = _normal(sums[-1])
        scale, shift = self.inner_scale.float(), self.inner_shift.float()
        error = (unit * scale + shift - target) * scale
        centred = error - error.mean(-1, keepdim=True)
        gradient = (centred - unit * (error * unit).mean(-1, keepdim=True)) / spread
        found = [gradient]
        for index in range(len(layers) - 1, 0, -1):
            back = gradient @ layers[index][0].transpose(-1, -2)
            gradient = back * _gelu_slope(sums[index - 1])
            found.insert(0, gradient)
        return found


def _run(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's inputs, and its outputs before the activation."""
    inputs, sums = [x], []
    for weight, bias in layers:
        sums.append(inputs[-1] @ weight + bias)
        inputs.append(_gelu(sums[-1]))
    return inputs, sums


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm over the last axis without scale, and what it divided by."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return centred / spread, spread


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_slope(x: Tensor) -> Tensor:
    """The derivative of ``_gelu``."""
    curve = torch.tanh(SLOPE * x * (1 + CUBIC * x.square()))
    inner = SLOPE * (1 + 3 * CUBIC * x.square())
    return 0.5 * (1 + curve) + 0.5 * x * (1 - curve.square()) * inner
