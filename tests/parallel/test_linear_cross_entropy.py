"""Losses of a head over chunks of tokens: those of whole logits, without whole logits."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pretrain.parallel import linear_cross_entropy
from titans_pretrain.parallel.linear_cross_entropy import CHUNK_BYTES, chunk_tokens

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 7, 8, 40


def given(dtype, scale=1.0, length=LENGTH):
    """Hidden states, weight, targets and the derivatives by the losses, some of them zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, length, WIDTH, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (ROWS, length + 1), generator=generator)[:, 1:]
    weights = torch.rand(ROWS, length, generator=generator, dtype=torch.float64)
    weights[:, -2:] = 0
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights


def chunks_of(tokens):
    return mock.patch.object(linear_cross_entropy, "chunk_tokens", return_value=tokens)


def chunked(given_values, tokens):
    hidden, weight, targets, weights = given_values
    with chunks_of(tokens):
        losses = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, None)
        gradients = torch.autograd.grad((losses * weights).sum(), (hidden, weight))
    return losses.detach(), *gradients


def whole(given_values):
    hidden, weight, targets, weights = given_values
    flat = (hidden @ weight.T).flatten(0, 1)
    losses = functional.cross_entropy(flat, targets.flatten(), reduction="none").view(weights.shape)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), (hidden, weight))


@pytest.mark.parametrize("tokens", [1, 4, 7, 21, 100])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_losses_and_gradients_are_those_of_whole_logits(dtype, tolerance, scale, tokens):
    values = given(dtype, scale)
    for found, expected in zip(chunked(values, tokens), whole(values), strict=True):
        assert found.dtype == expected.dtype == dtype
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, largest))


def test_the_gradient_is_the_derivative():
    hidden, weight, targets, _ = given(torch.float64)
    with chunks_of(5):
        assert torch.autograd.gradcheck(
            lambda *inputs: linear_cross_entropy.linear_cross_entropy(*inputs, targets, None),
            (hidden, weight),
        )


def test_a_target_that_does_not_count_gives_no_gradient_at_all():
    _, by_hidden, _ = chunked(given(torch.float32), 4)
    assert not by_hidden[:, -2:].any()
    assert by_hidden[:, :-2].all()


class Largest(TorchDispatchMode):
    """How many elements the largest tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **(options or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_is_larger_than_a_chunks_logits():
    values = given(torch.float32, length=64)
    tokens = 16
    with Largest() as largest:
        chunked(values, tokens)
    # hidden states and the weight are larger than neither
    assert largest.elements == max(tokens * VOCABULARY, ROWS * 64 * WIDTH)
    with Largest() as largest:
        whole(values)
    assert largest.elements == ROWS * 64 * VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
def test_a_weights_gradient_is_accumulated_once_a_pass(tied):
    _, weight, targets, _ = given(torch.float32)
    weight = nn.Parameter(weight.detach())
    accumulated = []
    weight.register_post_accumulate_grad_hook(accumulated.append)
    table = weight if tied else weight.detach().clone()
    hidden = functional.embedding(targets, table)
    with chunks_of(4):
        linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, None).sum().backward()
    assert len(accumulated) == 1


def test_in_bfloat16_chunks_add_up_in_float32():
    values = given(torch.bfloat16, length=400)
    exact = whole(
        [value.detach().double().requires_grad_() for value in values[:2]] + [*values[2:]]
    )
    losses, _, by_weight = chunked(values, 1)
    assert losses.dtype == torch.float32
    assert by_weight.dtype == torch.bfloat16
    # one rounding of the sum is 2^-9 of it; 1,200 in the sum would be 2 %
    assert float((by_weight.double() - exact[2]).norm() / exact[2].norm()) < 4e-3


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets, _ = given(torch.float32)
    with torch.no_grad(), chunks_of(4):
        losses = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, None)
    assert losses.grad_fn is None
    torch.testing.assert_close(losses, whole(given(torch.float32))[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_gpu_gives_what_float64_gives(dtype, tolerance):
    values = given(dtype, length=400)
    exact = whole(
        [value.detach().double().requires_grad_() for value in values[:2]] + [*values[2:]]
    )
    there = [value.detach().cuda().requires_grad_() for value in values[:2]]
    found = chunked([*there, *(value.cuda() for value in values[2:])], 128)
    for one, expected in zip(found, exact, strict=True):
        assert float((one.cpu().double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("wrong", [-100, -1, VOCABULARY])
def test_a_target_outside_of_the_vocabulary_is_refused(wrong):
    hidden, weight, targets, _ = given(torch.float32)
    targets = torch.full_like(targets, wrong)
    with pytest.raises(RuntimeError, match=r"token ids outside of \[0, 40\)"):
        linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, None)


def test_a_chunk_is_bounded_by_the_bytes_of_its_logits():
    assert chunk_tokens(32_000) == 2048
    assert chunk_tokens(128_256) == 512
    assert chunk_tokens(CHUNK_BYTES) == 1
    for share in (100, 50_257, 151_936, 3_000_000):
        assert 4 * share * chunk_tokens(share) <= CHUNK_BYTES
