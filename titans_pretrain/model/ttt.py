"""TTT: a layer whose state is a model trained on the tokens (arXiv 2407.04620).

It is the form in the Mamba backbone: one projection for queries and keys with a convolution each, a
gate, and a convolution on the residual before the layer (``BeforeTTT``).

The inner model f reconstructs v - k from k: loss |LN(f(k)) - (v - k)|^2 / 2 a token. The gradients
of a mini-batch are taken at the weights before it (the dual form); token t uses the sum of those up
to its own. Between calls the weights before the open mini-batch are kept, and the sum so far.

Shapes: B batch, H heads, h head width, b tokens of a mini-batch, T time, D width.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baseline_layers import Cached, CausalConvolution, heads, rotated
from .configuration_baseline import BaselineConfig
from .layers import RMSNorm, merge_heads
from .layout import Layout

Layers = Sequence[tuple[Tensor, Tensor]]  # weights (H, in, out) and biases (H, 1, out) of a head
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

    def forward(
        self, x: Tensor, history: Tensor | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) to the same shape, and the last inputs of the convolution."""
        out, after = self.convolution(self.norm(x), history, layout)
        return x + out, after


class InnerModel(nn.Module):
    """The inner model before the first token, learned, one for each head."""

    def __init__(self, heads: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for layer, (width, out) in enumerate(itertools.pairwise(widths)):
            weight, bias = torch.zeros(heads, width, out), torch.zeros(heads, 1, out)
            self.register_parameter(f"weight_{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias_{layer}", nn.Parameter(bias))

    def forward(self) -> Layers:
        """Weight (H, in, out) and bias (H, 1, out) of each layer."""
        layers = range(self.depth)
        return [(getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")) for i in layers]


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
        self.inner = InnerModel(self.heads, widths)
        self.inner_scale = nn.Parameter(torch.ones(self.heads, 1, head))
        self.inner_shift = nn.Parameter(torch.zeros(self.heads, 1, head))
        self.norm = nn.LayerNorm(width, EPSILON)

    def forward(
        self, x: Tensor, layout: Layout | None = None, cached: Cached | None = None
    ) -> tuple[Tensor, Cached]:
        """(B, T, D) to the same shape, and the state afterwards (empty without a layout)."""
        tails: Cached = {}
        cached = cached or {}
        cells = torch.arange(x.shape[1], device=x.device) if layout is None else layout.cells
        cells = cells % self.batch
        shared = self.q_proj(x)
        queries, tails["queries"] = self.q_conv(shared, cached.get("queries"), layout)
        keys, tails["keys"] = self.k_conv(shared, cached.get("keys"), layout)
        parts = [heads(part, self.heads) for part in (queries, keys, self.v_proj(x))]
        parts[:2] = [rotated(part, cells, self.theta) for part in parts[:2]]
        rates = self.rate * heads(self.rate_proj(x).float().sigmoid(), self.heads)
        parts = [part.float() for part in (*parts, rates)]
        if layout is None:
            read, tails = self._whole(parts), {}
        else:
            read, state = self._continue(parts, cells, layout, cached)
            tails |= state
        gate = _gelu(self.gate_proj(x))
        return self.o_proj(gate * self.norm(merge_heads(read).to(x.dtype))), tails

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        """What sequences read that begin here; parts are queries, keys, values and rates."""
        layers, outputs = self._begin(), []
        for q, k, v, rate in zip(*(part.split(self.batch, 2) for part in parts), strict=True):
            read, layers = self._mini_batch(layers, q, k, v, rate)
            outputs.append(self._out(q, read))
        return torch.cat(outputs, 2)

    def _continue(
        self, parts: list[Tensor], cells: Tensor, layout: Layout, cached: Cached
    ) -> tuple[Tensor, Cached]:
        """What rows read that stand anywhere in a mini-batch, and the inner model afterwards."""
        layers, learned = self._restore(cached, cells.shape[0])
        parts[3] = parts[3] * layout.valid[:, None, :, None]  # other slots teach nothing
        full = layout.valid & (cells == self.batch - 1)
        pieces = [*(part.split(self.batch, 2) for part in parts)]
        marks = [part.split(self.batch, 1) for part in (cells, full)]
        outputs = []
        for q, k, v, rate, cell, ends in zip(*pieces, *marks, strict=True):
            inputs, gradients = self._learn(layers, k, v)
            share = self._shares()[cell][:, None, :, None]
            steps = (share * rate.transpose(2, 3)).tril()
            read = _read(layers, inputs, gradients, steps, q, (share, learned))
            outputs.append(self._out(q, read))
            sums = _sums(inputs, gradients, rate)
            learned = [(a + c, b + d) for (a, b), (c, d) in zip(learned, sums, strict=True)]
            layers, learned = self._close(ends.any(1), layers, learned)
        names = zip(self._names(), (*layers, *learned), strict=True)
        after = {name: part for pair, of in names for name, part in zip(pair, of, strict=True)}
        return torch.cat(outputs, 2), after

    def _begin(self) -> Layers:
        return [(weight.float(), bias.float()) for weight, bias in self.inner()]

    def _names(self) -> list[tuple[str, str]]:
        """Of the inner layers and of what the open mini-batch has taught each, in a cache."""
        kinds, count = ("inner", "learned"), self.inner.depth
        return [(f"{kind}_weight.{i}", f"{kind}_bias.{i}") for kind in kinds for i in range(count)]

    def _restore(self, cached: Cached, batch: int) -> tuple[Layers, Layers]:
        """The inner layers, and what the open mini-batch has taught; both with the batch first."""
        count, names = self.inner.depth, self._names()
        if names[0][0] in cached:
            found = [(cached[weight], cached[bias]) for weight, bias in names]
            return found[:count], found[count:]
        layers = [(w.expand(batch, *w.shape), b.expand(batch, *b.shape)) for w, b in self._begin()]
        return layers, [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in layers]

    def _close(self, ends: Tensor, layers: Layers, learned: Layers) -> tuple[Layers, Layers]:
        """Rows (B,) whose mini-batch ends take its sum into their weights."""
        ended = ends.view(-1, 1, 1, 1)
        share = self._shares()[-1] * ended
        moved = [
            (weight - share * by_weight, bias - share * by_bias)
            for (weight, bias), (by_weight, by_bias) in zip(layers, learned, strict=True)
        ]
        return moved, [(weight * ~ended, bias * ~ended) for weight, bias in learned]

    def _shares(self) -> Tensor:
        """(b,), the share of the sum of the gradients so far that each token's weights move by."""
        count = torch.arange(1, self.batch + 1, device=self.step_sizes.device)
        return (1 / count + self.step_sizes.float()).clamp(min=0)

    def _out(self, q: Tensor, read: Tensor) -> Tensor:
        return q + _normal(read)[0] * self.inner_scale + self.inner_shift

    def _mini_batch(
        self, layers: Layers, q: Tensor, k: Tensor, v: Tensor, rate: Tensor
    ) -> tuple[Tensor, Layers]:
        """What the queries read, and the inner layers after the mini-batch (a whole one)."""
        inputs, gradients = self._learn(layers, k, v)
        steps = (self._shares()[: q.shape[2], None] * rate.transpose(2, 3)).tril()
        read = _read(layers, inputs, gradients, steps, q)
        sums = _sums(inputs, gradients, steps[:, :, -1, :, None])
        pairs = zip(layers, sums, strict=True)
        return read, [(weight - w, bias - b) for (weight, bias), (w, b) in pairs]

    def _learn(self, layers: Layers, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's inputs, and the gradients by its outputs."""
        inputs, sums = _run(layers, k)
        return inputs, self._gradients(layers, sums, v - k)

    def _gradients(self, layers: Layers, sums: Sequence[Tensor], target: Tensor) -> list[Tensor]:
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


def _read(
    layers: Layers,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    steps: Tensor,
    q: Tensor,
    before: tuple[Tensor, Layers] | None = None,
) -> Tensor:
    """What queries read of layers that have moved by the gradients up to their own tokens.

    Args:
        layers: at the start of the mini-batch.
        inputs, gradients: of each layer, from the tokens here, (B, H, b, .).
        steps: (B, H, b, b), of token j in token i's weights.
        q: (B, H, b, h).
        before: shares (B, 1, b, 1), and sums over the mini-batch's tokens of earlier calls.
    """
    hidden = q
    for index, (weight, bias) in enumerate(layers):
        overlap = hidden @ inputs[index].transpose(2, 3) + 1  # the bias is one more input of 1
        total = hidden @ weight + bias - (steps * overlap) @ gradients[index]
        if before is not None:
            share, sums = before
            total = total - share * (hidden @ sums[index][0] + sums[index][1])
        hidden = total if index == len(layers) - 1 else _gelu(total)
    return hidden


def _sums(inputs: Sequence[Tensor], gradients: Sequence[Tensor], rate: Tensor) -> Layers:
    """Gradients of the layers over tokens, each at its rate (B, H, b, 1)."""
    scaled = [rate * gradient for gradient in gradients]
    return [
        (x.transpose(2, 3) @ gradient, gradient.sum(2, keepdim=True))
        for x, gradient in zip(inputs, scaled, strict=False)  # the last output enters no layer
    ]


def _run(layers: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
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
