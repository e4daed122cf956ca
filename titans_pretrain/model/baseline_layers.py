"""Small parts of the baselines' blocks.

Shapes: B batch, H heads, T time, D width, h head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_blocks import continue_window
from .attention_flex import attend_window
from .layers import full_precision, merge_heads, rotate, split_heads
from .layout import Layout, join, newest

Cached = dict[str, Tensor]
MAMBA2_A = (1.0, 16.0)  # Mamba2's A at the start


class CausalConvolution(nn.Conv1d):
    """Causal depthwise convolution over time."""

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, history: Tensor | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``convolve``."""
        joined, after = _behind(history, x, layout, self.kernel_size[0] - 1)
        return super().forward(joined.transpose(1, 2)).transpose(1, 2), after


class ShortConvolution(CausalConvolution):
    """Causal depthwise convolution over time without bias, then SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, history: Tensor | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``convolve``."""
        out, after = super().forward(x, history, layout)
        return F.silu(out), after


def convolve(
    conv: nn.Conv1d, x: Tensor, history: Tensor | None = None, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve (B, T, D) so that no output sees a later input.

    Args:
        conv: its weights; it may pad both sides.
        x: the inputs.
        history: those before them, newest last; None for zeros. Needs a layout.
        layout: the slots when a call continues.

    Returns:
        The outputs (B, T, D), and the last ``width - 1`` inputs (B, width - 1, D).
    """
    joined, after = _behind(history, x, layout, conv.kernel_size[0] - 1)
    first = int(conv.padding[0])
    out: Tensor = conv(joined.transpose(1, 2))[:, :, first : first + x.shape[1]]
    return out.transpose(1, 2), after


def _behind(
    history: Tensor | None, x: Tensor, layout: Layout | None, past: int
) -> tuple[Tensor, Tensor]:
    """The inputs (B, past + T, D) with what came before them, and the last ``past`` of them."""
    if layout is None:
        joined = F.pad(x, (0, 0, past, 0))
        return joined, joined[:, x.shape[1] :]
    if history is None:
        history = x.new_zeros(x.shape[0], past, x.shape[2])
    joined = join(history, x, layout)
    return joined, newest(joined, past, layout)


class WindowAttention(nn.Module):
    """Causal rotary attention over the last ``window`` tokens."""

    def __init__(self, width: int, heads: int, window: int, theta: float) -> None:
        super().__init__()
        self.heads, self.window, self.theta = heads, window, theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, layout: Layout | None = None, cached: Cached | None = None
    ) -> tuple[Tensor, Cached]:
        """(B, T, D) to the same shape, and the keys and values of the window's last tokens."""
        positions = places(x, layout)
        queries, keys, values = (
            heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (rotated(part, positions, self.theta) for part in (queries, keys))
        after: Cached = {}
        if layout is None:
            read = attend_window(queries, keys, values, self.window)
        else:
            read, after = continue_window(queries, keys, values, layout, cached or {}, self.window)
        return self.o_proj(merge_heads(read)), after


@torch.no_grad()
def begin_as_mamba_ssm(mixer: Any, residuals: int) -> None:
    """Change new weights of transformers' Mamba or Mamba2 mixer where those of mamba-ssm differ.

    Those begin as torch's own layers do, biases of projections at zero.

    Args:
        mixer: its output projection is made smaller, and Mamba2's A is drawn.
        residuals: sums into the residual of the whole model.
    """
    for name in ("in_proj", "conv1d", "x_proj", "out_proj"):
        layer = getattr(mixer, name, None)  # Mamba2 has no x_proj
        if layer is not None:
            layer.reset_parameters()
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.zero_()
    mixer.out_proj.weight /= math.sqrt(residuals)
    if mixer.A_log.ndim == 1:  # Mamba2: one a head
        mixer.A_log.uniform_(*MAMBA2_A).log_()


def places(x: Tensor, layout: Layout | None) -> Tensor:
    """Each token's place in its sequence, (T,), or (B, T) of slots."""
    return torch.arange(x.shape[1], device=x.device) if layout is None else layout.positions


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, H h) to (B, H, T, h)."""
    return split_heads(x, x.shape[-1] // count)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(B, H, T, h) with all of each head rotated by position, in full precision inside."""
    return rotate(full_precision(x), positions, x.shape[-1], theta).to(x.dtype)
