import pytest
import torch
import torch.nn.functional as F

from titans_pretrain.train.loss import rank_loss, token_loss_sum


def test_rank_losses_averaged_over_data_and_summed_over_sequence_ranks_are_the_mean_over_targets():
    logits = torch.randn(4, 6, 10, dtype=torch.float64)
    targets = torch.randint(10, (4, 6))
    mask = torch.arange(6) < torch.tensor([[1], [6], [2], [0]])
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    shares = [
        rank_loss(token_loss_sum(losses[rows, span], mask[rows, span]), int(mask.sum()), 2)
        for rows in (slice(0, 2), slice(2, 4))
        for span in (slice(0, 3), slice(3, 6))
    ]
    assert (sum(shares) / 2).item() == pytest.approx(losses[mask].mean().item(), rel=1e-12)


def test_masked_targets_send_no_gradient_even_where_the_loss_is_infinite():
    losses = torch.tensor([[1.0, float("inf")]], requires_grad=True)
    token_loss_sum(losses, torch.tensor([[True, False]])).backward()
    assert torch.equal(losses.grad, torch.tensor([[1.0, 0.0]]))


def test_without_a_mask_all_targets_count():
    losses = torch.rand(2, 3)
    summed = token_loss_sum(losses, None)
    assert summed == losses.sum() == token_loss_sum(losses, torch.ones(2, 3, dtype=torch.bool))
