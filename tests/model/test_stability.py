"""The clamped memory stays finite whatever it is shown; the paper's bare rule does not."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from memory_cases import Case, flat
from torch import Tensor

import titans_pretrain
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.memory import MemoryState, memory_scan
from titans_pretrain.model.modeling_titans import TitansForCausalLM

CLIP = TitansConfig().surprise_clip
ALPHAS = (0.0, 0.001, 1.0)
ETAS = (0.0, 0.99, 1.0)
DIM = 4


def adversarial_case(time: int, depth: int, dtype: torch.dtype, max_step: float = 1.0) -> Case:
    """Rows are the gates at their limits, heads the inputs that add up or swing the most.

    Head 0 sees one key and one value of 1e3 for ever, head 1 one key and a value that swings
    between 1e3 and -1e3, head 2 random keys and values of 1e3.
    """
    generator = torch.Generator().manual_seed(depth)
    gates = torch.tensor([(a, e) for a in ALPHAS for e in ETAS])
    batch, heads = len(gates), 3
    alpha, eta = (g[:, None, None].expand(batch, heads, time) for g in gates.unbind(dim=1))

    same = torch.ones(time, DIM)
    swing = same * torch.tensor([1.0, -1.0]).repeat(time // 2 + 1)[:time, None]
    noise = torch.randn(time, DIM, generator=generator)
    keys = F.normalize(torch.stack([same, same, noise]), dim=-1)
    large = 1e3 * torch.stack([same, swing, noise])
    spread = (batch, heads, time, DIM)

    widths = [DIM] + [2 * DIM] * (depth - 1) + [DIM]
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [torch.randn(o, i, generator=generator) / i**0.5 for o, i in shapes]
    past = [0.1 * torch.randn(o, i, generator=generator) for o, i in shapes]
    return Case(
        queries=keys.expand(spread).to(dtype),
        keys=keys.expand(spread).to(dtype),
        values=large.expand(spread).to(dtype),
        forget=alpha.clone(),
        momentum=eta.clone(),
        step=max_step * (1 - eta),
        state=MemoryState(
            tuple(w.expand(batch, heads, -1, -1) for w in weights),
            tuple(s.expand(batch, heads, -1, -1) for s in past),
        ),
    )


def diverged(case: Case, **options: object) -> list[str]:
    """Names of the results that are not finite."""
    results = flat(case.run(memory_scan, **options))
    return [name for name, x in results.items() if not x.isfinite().all()]


@pytest.mark.parametrize(
    ("depth", "dtype"),
    [*((depth, torch.float32) for depth in (1, 2, 3, 4)), (2, torch.bfloat16), (4, torch.bfloat16)],
)
def test_100000_adversarial_tokens_leave_everything_finite(depth: int, dtype: torch.dtype) -> None:
    case = adversarial_case(100_000, depth, dtype)
    with torch.no_grad():
        assert not diverged(case, chunk_size=64, surprise_clip=CLIP)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_every_form_of_the_memory_stays_finite(activation: str, residual: bool) -> None:
    case = adversarial_case(10_000, 2, torch.float32)
    options = {"activation": activation, "residual": residual, "surprise_clip": CLIP}
    with torch.no_grad():
        assert not diverged(case, chunk_size=128, **options)


def test_steps_larger_than_the_default_stay_finite() -> None:
    case = adversarial_case(10_000, 2, torch.float32, max_step=10.0)
    with torch.no_grad():
        assert not diverged(case, chunk_size=64, surprise_clip=CLIP)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_without_the_clamp_the_same_tokens_diverge(depth: int) -> None:
    case = adversarial_case(4_096, depth, torch.float32)
    with torch.no_grad():
        assert diverged(case, chunk_size=128, surprise_clip=None)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_2048_adversarial_tokens_have_finite_gradients(depth: int) -> None:
    case = adversarial_case(2_048, depth, torch.float32).leaves()
    outputs, state = case.run(memory_scan, chunk_size=128, surprise_clip=CLIP)
    loss = outputs.sum() + sum(x.sum() for x in (*state.weights, *state.momentum))
    inputs = case.tensors()
    for name, gradient in zip(
        inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True
    ):
        assert gradient.isfinite().all(), name


def test_nothing_papers_over_a_value_that_is_not_finite() -> None:
    sources = list(Path(titans_pretrain.__file__).parent.rglob("*.py"))
    assert any(path.name == "memory.py" for path in sources)
    guilty = [path.name for path in sources if "nan_to_num" in path.read_text(encoding="utf-8")]
    assert not guilty


def successor_batch(length: int, generator: torch.Generator) -> Tensor:
    """Four rows in which three of four tokens follow from the one before."""
    tokens = torch.randint(0, 32, (4, length), generator=generator)
    bound = torch.rand(length, generator=generator) < 0.75
    for t in range(1, length):
        if bound[t]:
            tokens[:, t] = (5 * tokens[:, t - 1] + 3) % 32
    return tokens


def train_on_rising_lengths(surprise_clip: float | None) -> list[float]:
    """Losses of an LMM under plain AdamW; a loss or gradient that is not finite ends the run."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = TitansConfig(
        variant="lmm",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=16,
        surprise_clip=surprise_clip,
    )
    model = TitansForCausalLM(config)
    for layer in model.model.layers:
        # the first inner steps as large as they may become in a long training
        torch.nn.init.zeros_(layer.mixer.memory.step_gate.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for length in (64, 128, 256):
        for _ in range(12):
            tokens = successor_batch(length, generator)
            loss = model(input_ids=tokens, labels=tokens).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not (loss.isfinite() and norm.isfinite()):
                return [*losses, float("nan")]
            optimizer.step()
    return losses


def test_an_lmm_trained_on_rising_lengths_learns_and_does_not_diverge() -> None:
    losses = train_on_rising_lengths(CLIP)
    assert all(b < a + 1 for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 1


def test_the_same_training_without_the_clamp_diverges() -> None:
    assert math.isnan(train_on_rising_lengths(None)[-1])
