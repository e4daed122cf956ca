"""Linear recurrences over time by chunks, in float32.

Shapes: B batch, H heads, T time, K key width, V value width, C tokens of a chunk.

State S (K, V) of a head, decay a_t (a scalar, or one a key channel), write strength b_t:

    S_t = a_t S_{t-1} + k_t u_t^T,   o_t = S_t^T q_t
    u_t = v_t                                     without the delta rule
    u_t = b_t (v_t - (a_t S_{t-1})^T k_t)         with it

A token with k_t = 0 (b_t = 0 with the delta rule) and a_t = 1 leaves the state as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def by_chunks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    write: Tensor | None = None,
    chunk: int = 64,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) of a recurrence, and its state afterwards, (B, H, K, V) in float32.

    Args:
        queries: (B, H, T, K).
        keys: (B, H, T, K); of length at most one for the delta rule.
        values: (B, H, T, V).
        log_decay: (B, H, T, K), or (B, H, T, 1) for one a head; at most 0.
        write: (B, H, T, 1), the delta rule's strength, with one decay a head; None without it.
        chunk: tokens taken at once; changes rounding only.
        state: S before the first token; None for zeros.
    """
    time = queries.shape[2]
    chunk = min(chunk, time)
    parts = [queries, keys, values, log_decay] + ([] if write is None else [write])
    parts = [F.pad(part.float(), (0, 0, 0, -time % chunk)) for part in parts]
    if state is None:
        state = keys.new_zeros(*keys.shape[:2], keys.shape[3], values.shape[3], dtype=torch.float32)
    outputs = []
    for pieces in zip(*(part.split(chunk, 2) for part in parts), strict=True):
        output, state = _chunk(state, *pieces)
        outputs.append(output)
    return torch.cat(outputs, 2)[:, :, :time], state


def _chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, write: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One chunk's outputs and the state after it."""
    past = log_decay.cumsum(2)  # of the chunk's start, the own token's decay included
    earlier = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    updates = v
    if write is not None:
        own = torch.eye(q.shape[2], device=q.device)
        overlap = write * _products(k, k, past, earlier.tril(-1))
        known = (k * past.exp()) @ state
        updates = torch.linalg.solve_triangular(
            own + overlap, write * (v - known), upper=False, unitriangular=True
        )
    output = (q * past.exp()) @ state + _products(q, k, past, earlier) @ updates
    left = past[:, :, -1:]
    state = left.transpose(2, 3).exp() * state
    return output, state + (k * (left - past).exp()).transpose(2, 3) @ updates


def _products(left: Tensor, right: Tensor, past: Tensor, allowed: Tensor) -> Tensor:
    """(B, H, C, C): left_i . right_j, the channels decayed from j to i, where allowed, else 0.

    Differences are taken before exp, which so is at most one, however strong the decay.
    """
    if past.shape[-1] == 1:
        spans = (past - past.transpose(2, 3)).masked_fill(~allowed, -torch.inf)
        return (left @ right.transpose(2, 3)) * spans.exp()
    spans = past[:, :, :, None] - past[:, :, None]
    spans = spans.masked_fill(~allowed[:, :, None], -torch.inf)
    return torch.einsum("bhik,bhjk,bhijk->bhij", left, right, spans.exp())
