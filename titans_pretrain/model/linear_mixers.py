"""RetNet, GLA, DeltaNet and Gated DeltaNet: one linear recurrence with different parts.

Shapes: B batch, H heads, T time, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baseline_layers import Cached, ShortConvolution, heads, places, rotated
from .configuration_baseline import BaselineConfig
from .layers import RMSNorm, merge_heads
from .layout import Layout
from .recurrences import by_chunks

GLA_CHUNK = 16  # a decay a channel needs a tensor of chunk x chunk x width
GLA_RANK, GLA_DIVISOR = 16, 16.0
RATES = (math.log(0.001), math.log(0.1))  # of HeadDecay's softplus at the start, and
LARGEST_A, SMALLEST_A = 16.0, 1e-4  # of its A


class Parts(NamedTuple):
    """What a kind is made of.

    Attributes:
        key, value: widths of all heads' keys and values over D.
        delta: whether it writes by the delta rule, on convolved keys of length one.
        decay: ``fixed`` (one a head), ``channel`` (learned, one a key channel), ``head`` (learned).
        gate: whether a SiLU gate scales the output.
    """

    key: float
    value: float
    delta: bool
    decay: str
    gate: bool


PARTS = {
    "retnet": Parts(1, 2, delta=False, decay="fixed", gate=True),
    "gla": Parts(0.5, 1, delta=False, decay="channel", gate=True),
    "deltanet": Parts(1, 1, delta=True, decay="", gate=False),
    "gated_deltanet": Parts(0.75, 1.5, delta=True, decay="head", gate=True),
}


class HeadDecay(nn.Module):
    """Gated DeltaNet's log decay a head, -exp(A) softplus(x W + b), as Mamba2's."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, count, bias=False)
        self.A_log = nn.Parameter(torch.zeros(count))
        self.dt_bias = nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, 1)."""
        rate = F.softplus(self.proj(x).float() + self.dt_bias.float())
        return (-self.A_log.float().exp() * rate).transpose(1, 2)[..., None]


class ChannelDecay(nn.Module):
    """GLA's log decay a key channel, logsigmoid(x W_1 W_2 + b) / 16."""

    def __init__(self, width: int, channels: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.down_proj = nn.Linear(width, GLA_RANK, bias=False)
        self.up_proj = nn.Linear(GLA_RANK, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, K)."""
        logits = self.up_proj(self.down_proj(x)).float()
        return heads(F.logsigmoid(logits) / GLA_DIVISOR, self.count)


class LinearMixer(nn.Module):
    """A linear recurrence between projections."""

    def __init__(self, config: BaselineConfig, kind: str) -> None:
        super().__init__()
        width, self.heads, self.kind = config.hidden_size, config.num_heads, kind
        self.parts, self.theta = PARTS[kind], config.rope_theta
        key, value = int(width * self.parts.key), int(width * self.parts.value)
        self.chunk = GLA_CHUNK if kind == "gla" else config.chunk_size
        self.q_proj = nn.Linear(width, key, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, value, bias=False)
        self.o_proj = nn.Linear(value, width, bias=False)
        self.norm = RMSNorm(value // self.heads, config.rms_norm_eps)
        if self.parts.gate:
            self.gate_proj = nn.Linear(width, value, bias=False)
        if self.parts.delta:
            self.write_proj = nn.Linear(width, self.heads, bias=False)
            self.q_conv = ShortConvolution(key, config.conv_width)
            self.k_conv = ShortConvolution(key, config.conv_width)
            self.v_conv = ShortConvolution(value, config.conv_width)
        self.decay: nn.Module | None = None
        if self.parts.decay == "head":
            self.decay = HeadDecay(width, self.heads)
        elif self.parts.decay == "channel":
            self.decay = ChannelDecay(width, key, self.heads)

    def forward(
        self, x: Tensor, layout: Layout | None = None, cached: Cached | None = None
    ) -> tuple[Tensor, Cached]:
        """(B, T, D) to the same shape, and the state afterwards (empty without a layout)."""
        cached, after = cached or {}, {}
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        write, log_decay = None, self._log_decay(x)
        if self.parts.delta:
            queries, after["queries"] = self.q_conv(queries, cached.get("queries"), layout)
            keys, after["keys"] = self.k_conv(keys, cached.get("keys"), layout)
            values, after["values"] = self.v_conv(values, cached.get("values"), layout)
            write = heads(self.write_proj(x).float().sigmoid(), self.heads)
        queries, keys, values = (heads(part, self.heads) for part in (queries, keys, values))
        if self.parts.delta:
            queries, keys = (F.normalize(part.float(), dim=-1) for part in (queries, keys))
        elif self.parts.decay == "fixed":
            positions = places(x, layout)
            queries, keys = (rotated(part, positions, self.theta) for part in (queries, keys))
        queries = queries * queries.shape[-1] ** -0.5
        if layout is not None:  # slots without a token leave the state as it is
            token = layout.valid[:, None, :, None]
            log_decay = log_decay * token
            keys, write = (keys * token, None) if write is None else (keys, write * token)
        read, after["state"] = by_chunks(
            queries, keys, values, log_decay, write, self.chunk, cached.get("state")
        )
        read = merge_heads(self.norm(read.to(x.dtype)))
        if self.parts.gate:
            read = read * F.silu(self.gate_proj(x))
        return self.o_proj(read), {} if layout is None else after

    def _log_decay(self, x: Tensor) -> Tensor:
        """(B, H, T, 1), or (B, H, T, K)."""
        if self.decay is not None:
            learned: Tensor = self.decay(x)
            return learned
        shape = (x.shape[0], self.heads, x.shape[1], 1)
        if not self.parts.decay:
            return x.new_zeros(shape, dtype=torch.float32)
        exponents = torch.arange(self.heads, device=x.device, dtype=torch.float32)
        fixed = torch.log1p(-torch.exp2(-5.0 - exponents))
        return fixed[None, :, None, None].expand(shape)
