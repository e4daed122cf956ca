"""The loss and the scale of its gradient.

With s(t) the cross-entropy of target t, V the valid targets of the whole global batch, and R data
ranks, the loss of a step is the mean over all valid targets, wherever they are:

    L = (1 / |V|) sum over t in V of s(t)

ZeRO-3 averages gradients over data ranks and sums them over micro-batches. Gradients of the P
sequence ranks, which hold consecutive spans of the same sequences, are summed. So that the result
is the gradient of L, the loss of micro-batch m on data rank r and sequence rank p, with valid
targets V[r, p, m], is

    L[r, p, m] = (R / |V|) sum over t in V[r, p, m] of s(t)

since (1 / R) sum over r, sum over p and m, of L[r, p, m] = L. The derivative of a later span's loss
by an earlier span's weights is part of it: it comes back with the gradient of the memory's state.

Tensor ranks hold shares of the same logits and compute the same s(t): where losses or targets are
added up over ranks, one tensor rank of each group counts.

|V| is counted over all ranks before the first micro-batch. A mean of means would weigh a target
by how few others share its micro-batch.
"""

import torch


def token_loss_sum(losses: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The summed cross-entropy of the valid targets, in float32 nats.

    Args:
        losses: (batch, time) float32, s(t) of every target.
        mask: (batch, time), True where the target counts; None counts all.
    """
    return (losses if mask is None else losses.where(mask, 0.0)).sum()


def rank_loss(summed: torch.Tensor, valid: int, data_ranks: int) -> torch.Tensor:
    """L[r, p, m] of the module's docstring: what ``ZeroEngine.backward`` takes.

    Args:
        summed: ``token_loss_sum`` of the micro-batch.
        valid: |V|, valid targets of the global batch.
        data_ranks: R.
    """
    return summed * (data_ranks / valid)
