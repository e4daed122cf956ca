"""Small parts the blocks are made of: norms, short convolution, feed-forward, rotary positions.

Shapes: B batch, T time (or slots), D width, h head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout, join, newest


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """The vectors of the last axis at length one; in half precision the bound on zero would be."""
    return F.normalize(full_precision(x), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        full = full_precision(x)
        scaled = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time (Section 4.4)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.width = width

    def forward(
        self,
        x: Tensor,
        history: Tensor | None = None,
        layout: Layout | None = None,
        reach: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve (B, T, D); the inputs before the first token are ``history``, and zeros.

        Args:
            x: the inputs.
            history: those before them, newest last.
            layout: the slots when decoding or padded.
            reach: (B, T), how many inputs before its own an output sees at most; None for no bound.

        Returns:
            The outputs (B, T, D), and the last ``width - 1`` inputs (B, width - 1, D).
        """
        past = self.width - 1
        if history is None:
            history = x.new_zeros(x.shape[0], past, x.shape[2])
        history = F.pad(history, (0, 0, past - history.shape[1], 0))
        if layout is None:
            joined = torch.cat([history, x], 1)
            after = joined[:, x.shape[1] :]
        else:
            joined = join(history, x, layout)
            after = newest(joined, past, layout)
        if reach is None:
            return _Convolved.apply(joined, self.weight), after
        time = x.shape[1]
        taps = [joined[:, tap : tap + time] * self.weight[:, tap] for tap in range(self.width)]
        for tap in range(past):  # of the products: autograd would keep a copy of each tap's inputs
            taps[tap] = torch.where((reach >= past - tap)[..., None], taps[tap], 0)
        return torch.stack(taps).sum(0), after


class _Convolved(torch.autograd.Function):
    """A causal depthwise convolution; the library's own gradients are slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _depthwise(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        time, past = grad.shape[1], weight.shape[1] - 1
        x_grad = _depthwise(F.pad(grad, (0, 0, past, past)), weight.flip(1))
        taps = [(grad * x[:, tap : tap + time]).flatten(0, 1).sum(0) for tap in range(past + 1)]
        return x_grad, torch.stack(taps, 1)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T + K - 1, D) with (D, K) to (B, T, D); one of the library's for float32 on a CPU."""
    time = x.shape[1] - weight.shape[1] + 1
    here = x.device.type == "cpu" and time and {x.dtype, weight.dtype} == {torch.float32}
    if not here:  # cuDNN would round float32 to TF32; oneDNN takes minutes for bfloat16
        return torch.stack([x[:, tap : tap + time] * w for tap, w in enumerate(weight.T)]).sum(0)
    with torch.autocast(device_type="cpu", enabled=False):
        # an image of one row, whose channels may come last
        image, kernel = x.mT[:, :, None], weight[:, None, None]
        return F.conv2d(image, kernel, groups=len(weight))[:, :, 0].mT


class SwiGLU(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PersistentTokens(nn.Module):
    """Learned tokens that do not depend on the input (Eq. 19)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self) -> Tensor:
        """The tokens as a batch of one, (1, N_p, D)."""
        return self.weight[None]


def rotate(x: Tensor, positions: Tensor, width: int, theta: float) -> Tensor:
    """Rotate the first ``width`` dimensions of every head by its token's position.

    Args:
        x: (B, H, T, h).
        positions: (T,) or (B, T) integers.
        width: even number of dimensions that rotate.
        theta: base of the frequencies.
    """
    if not width:
        return x
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
    angle = positions[..., None].double() * theta**-exponent
    angle = angle[:, None] if positions.dim() == 2 else angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def split_heads(x: Tensor, head_width: int) -> Tensor:
    """(B, T, D) to (B, H, T, h)."""
    return x.unflatten(-1, (-1, head_width)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, h) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)
