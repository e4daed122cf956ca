"""transformers' Mamba and Mamba2 with a state of their own between calls, the same in any release.

Shapes: B batch, T time (or slots), D width, C channels inside, N state size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .baseline_layers import Cached, convolve, heads
from .layers import merge_heads
from .layout import Layout
from .recurrences import by_chunks


class Mamba(MambaMixer):
    """Mamba; whole sequences run transformers' code and its kernels."""

    def forward(
        self, x: Tensor, layout: Layout | None = None, cached: Cached | None = None
    ) -> tuple[Tensor, Cached]:
        """(B, T, D) to the same shape, and the state afterwards (empty without a layout)."""
        if layout is None:
            return super().forward(x), {}
        cached = cached or {}
        inputs, gate = self.in_proj(x).chunk(2, -1)
        inputs, tail = convolve(self.conv1d, inputs, cached.get("inputs"), layout)
        inputs = self.act(inputs)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        step, write, read = self.x_proj(inputs).split(sizes, -1)
        steps = F.softplus(self.dt_proj(step).float()) * layout.valid[..., None]
        out, state = selective_scan(
            inputs.float(),
            steps,
            -self.A_log.float().exp(),
            write.float(),
            read.float(),
            cached.get("state"),
        )
        out = (out + inputs.float() * self.D.float()).to(x.dtype) * self.act(gate)
        return self.out_proj(out), {"inputs": tail, "state": state}


class Mamba2(Mamba2Mixer):
    """Mamba2; whole sequences run transformers' code and its kernels."""

    def forward(
        self, x: Tensor, layout: Layout | None = None, cached: Cached | None = None
    ) -> tuple[Tensor, Cached]:
        """(B, T, D) to the same shape, and the state afterwards (empty without a layout)."""
        if layout is None:
            return super().forward(x), {}
        cached = cached or {}
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, inputs, step = self.in_proj(x).split(sizes, -1)
        inputs, tail = convolve(self.conv1d, inputs, cached.get("inputs"), layout)
        shared = self.n_groups * self.ssm_state_size
        values, keys, queries = self.act(inputs).split([self.intermediate_size, shared, shared], -1)
        steps = F.softplus(step.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
        steps = heads(steps * layout.valid[..., None], self.num_heads)
        values = heads(values.float(), self.num_heads)
        keys, queries = (self._of_heads(part.float()) for part in (keys, queries))
        decay = -self.A_log.float().exp()[:, None, None] * steps
        out, state = by_chunks(
            queries, keys, values * steps, decay, None, self.chunk_size, cached.get("state")
        )
        out = out + values * self.D.float()[:, None, None]
        out = self.norm(merge_heads(out), gate)
        return self.out_proj(out.to(x.dtype)), {"inputs": tail, "state": state}

    def _of_heads(self, x: Tensor) -> Tensor:
        """(B, T, groups N) to (B, H, T, N)."""
        return heads(x, self.n_groups).repeat_interleave(self.num_heads // self.n_groups, 1)


def selective_scan(
    x: Tensor, steps: Tensor, a: Tensor, write: Tensor, read: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence S_t = exp(d_t A) S_{t-1} + d_t x_t b_t^T, y_t = S_t c_t, in float32.

    The sequence is cut into about as many parts as each has tokens: all parts are read side by side
    from zero, then the states between them go from one to the next.

    Args:
        x: (B, T, C).
        steps: (B, T, C), d; at 0 a token leaves the state as it is.
        a: (C, N), at most 0.
        write: (B, T, N), b.
        read: (B, T, N), c.
        state: (B, C, N) before the first token; None for zeros.

    Returns:
        y (B, T, C), and the state afterwards.
    """
    time = x.shape[1]
    size = 1
    while size * size < time:  # no root of a length, which a graph may know only by its bounds
        size *= 2
    added, steps, write, read = (
        F.pad(part, (0, 0, 0, -time % size)).unflatten(1, (-1, size))
        for part in (steps * x, steps, write, read)
    )
    own = x.new_zeros(added.shape[0], added.shape[1], *a.shape)
    outputs = []
    for t in range(size):
        own = (steps[:, :, t, :, None] * a).exp() * own
        own = own + added[:, :, t, :, None] * write[:, :, t, None]
        outputs.append((own * read[:, :, t, None]).sum(-1))
    past = steps.cumsum(2)
    begins = [torch.zeros_like(own[:, 0]) if state is None else state]
    for part in range(own.shape[1]):
        left = (past[:, part, -1, :, None] * a).exp()
        begins.append(left * begins[-1] + own[:, part])
    before = torch.stack(begins[:-1], 1)
    for t in range(size):
        left = (past[:, :, t, :, None] * a).exp() * before
        outputs[t] = outputs[t] + (left * read[:, :, t, None]).sum(-1)
    return torch.stack(outputs, 2).flatten(1, 2)[:, :time], begins[-1]
