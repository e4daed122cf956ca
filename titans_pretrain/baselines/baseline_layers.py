"""Small parts of the baselines' blocks.

Shapes: B batch, H heads, T time, D width, h head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAMBA2_A = (1.0, 16.0)  # Mamba2's A at the start


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        full = x.float()
        scaled = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """Feed-forward with a SiLU gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class CausalConvolution(nn.Module):
    """Causal depthwise convolution over time."""

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, channels) to the same shape."""
        ahead = self.conv.kernel_size[0] - 1
        out: Tensor = self.conv(F.pad(x.transpose(1, 2), (ahead, 0))).transpose(1, 2)
        return out


class ShortConvolution(CausalConvolution):
    """Causal depthwise convolution over time without bias, then SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, channels) to the same shape."""
        return F.silu(super().forward(x))


class WindowAttention(nn.Module):
    """Causal rotary attention over the last ``window`` tokens."""

    def __init__(self, width: int, heads: int, window: int, theta: float) -> None:
        super().__init__()
        self.heads, self.window, self.theta = heads, window, theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape, by blocks of queries with the keys in their reach."""
        positions = torch.arange(x.shape[1], device=x.device)
        queries, keys, values = (
            heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (rotate(part, positions, self.theta) for part in (queries, keys))
        outputs = []
        for first in range(0, x.shape[1], self.window):
            last = min(first + self.window, x.shape[1])
            low = max(0, first - self.window + 1)
            ages = positions[first:last, None] - positions[low:last]
            seen = (ages >= 0) & (ages < self.window)
            outputs.append(
                F.scaled_dot_product_attention(
                    queries[:, :, first:last],
                    keys[:, :, low:last],
                    values[:, :, low:last],
                    attn_mask=seen,
                )
            )
        out: Tensor = self.o_proj(merged(torch.cat(outputs, 2)))
        return out


@torch.no_grad()
def begin_as_mamba_ssm(mixer: Any, residuals: int) -> None:
    """Change new weights of transformers' Mamba or Mamba2 mixer where those of mamba-ssm differ.

    Args:
        mixer: its output projection is made smaller, and Mamba2's A is drawn.
        residuals: sums into the residual of the whole model.
    """
    mixer.out_proj.weight /= math.sqrt(residuals)
    if mixer.A_log.ndim == 1:  # Mamba2: one a head
        mixer.A_log.uniform_(*MAMBA2_A).log_()


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, H h) to (B, H, T, h)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, T, h) to (B, T, H h)."""
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(B, H, T, h) with the pairs (i, i + h/2) rotated by position; (T,) positions."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions[:, None].float() * theta**-steps
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
