import pytest
import torch
import torch.nn.functional as F

from titans_pretrain.train.loss import rank_loss, token_loss_sum


def test_the_mean_of_rank_losses_over_ranks_is_the_mean_over_valid_targets():
    logits = torch.randn(4, 6, 10, dtype=torch.float64)
    targets = torch.randint(10, (4, 6))
    mask = torch.arange(6) < torch.tensor([[1], [6], [2], [0]])
    whole = F.cross_entropy(logits[mask].float(), targets[mask])
    shares = [
        rank_loss(token_loss_sum(logits[rows], targets[rows], mask[rows]), int(mask.sum()), 2)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert (sum(shares) / 2).item() == pytest.approx(whole.item(), rel=1e-6)


def test_masked_targets_send_no_gradient_even_where_the_loss_is_infinite():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    scaled = logits + torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, float("-inf")]]])
    token_loss_sum(scaled, torch.tensor([[0, 2]]), torch.tensor([[True, False]])).backward()
    assert logits.grad[0, 0].abs().sum() > 0
    assert torch.equal(logits.grad[0, 1], torch.zeros(3))


def test_without_a_mask_all_targets_count_in_float32():
    logits, targets = torch.randn(2, 3, 5).bfloat16(), torch.randint(5, (2, 3))
    summed = token_loss_sum(logits, targets, None)
    assert summed.dtype == torch.float32
    assert summed == token_loss_sum(logits, targets, torch.ones(2, 3, dtype=torch.bool))
