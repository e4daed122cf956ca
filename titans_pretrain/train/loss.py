"""The loss and the scale of its gradient.

With s(t) the cross-entropy of target t, V the valid targets of the whole global batch, and R data
ranks, the loss of a step is the mean over all valid targets, wherever they are:

    L = (1 / |V|) sum over t in V of s(t)

ZeRO-3 averages gradients over data ranks and sums them over micro-batches. So that the result is
the gradient of L, the loss of micro-batch m on rank r, with valid targets V[r, m], is

    L[r, m] = (R / |V|) sum over t in V[r, m] of s(t)      since   (1 / R) sum of L[r, m] = L.

|V| is counted over all ranks before the first micro-batch. A mean of means would weigh a target
by how few others share its micro-batch.
"""

import torch
import torch.nn.functional as F


def token_loss_sum(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy of the valid targets, in float32 nats.

    Args:
        logits: (batch, time, vocabulary).
        targets: (batch, time) token ids.
        mask: (batch, time), True where the target counts; None counts all.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    if mask is not None:
        losses = losses.where(mask.flatten(), 0.0)
    return losses.sum()


def rank_loss(summed: torch.Tensor, valid: int, data_ranks: int) -> torch.Tensor:
    """L[r, m] of the module's docstring: what ``ZeroEngine.backward`` takes.

    Args:
        summed: ``token_loss_sum`` of the micro-batch.
        valid: |V|, valid targets of the global batch.
        data_ranks: R.
    """
    return summed * (data_ranks / valid)
