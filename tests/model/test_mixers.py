"""The four ways to use a memory, against loops that follow the paper's Section 4 line by line."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FORMS, tiny_model
from torch import Tensor

from titans_pretrain.model.fields import WITH_MEMORY
from titans_pretrain.model.layers import merge_heads, rotate
from titans_pretrain.model.memory import MemoryState
from titans_pretrain.model.memory_reference import memory_scan as reference_scan
from titans_pretrain.model.mixers import MIXERS

TIME = 27
Pair = tuple[Tensor, Tensor]


def mixer_of(form: dict[str, Any]) -> Any:
    return tiny_model(**form).model.layers[0].mixer


def hidden(seed: int = 0, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, TIME, 32, generator=generator, dtype=torch.float64)


def remember(memory: Any, x: Tensor, persistent: Tensor | None) -> tuple[Tensor, MemoryState]:
    """M(x): what the memory returns for each token of x, and its state afterwards."""
    options = memory.rule._asdict() | {"chunk_size": memory.chunk_size}
    state = memory.start(x)
    if persistent is not None:
        first = memory.project(persistent.expand(len(x), -1, -1), None, {}).tokens
        _, state = reference_scan(*first, state, **options)
    return reference_scan(*memory.project(x, None, {}).tokens, state, **options)


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax attention of one query (B, H, h) over a list of keys and values (B, H, h)."""
    k, v = torch.stack(keys, 2), torch.stack(values, 2)
    scores = (k @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])
    return (scores.softmax(-1)[..., None] * v).sum(2)


def columns(pair: Pair | None, rows: int, first: int = 0, last: int | None = None) -> list[list]:
    """Keys and values (B, H, T, h) as two lists over time."""
    if pair is None:
        return [[], []]
    return [list(x.expand(rows, -1, -1, -1)[:, :, first:last].unbind(2)) for x in pair]


def window_oracle(attention: Any, x: Tensor, prefix: Pair | None) -> Tensor:
    """Fig. 3b: each token attends to the prefix, itself and the window's tokens before it."""
    positions = torch.arange(x.shape[1])
    queries = attention.project.queries(x, positions)
    own = attention.project.keys_values(x, positions)
    always = columns(prefix, len(x))
    outputs = []
    for t in range(x.shape[1]):
        first = 0 if attention.window is None else max(0, t - attention.window + 1)
        recent = columns(own, len(x), first, t + 1)
        outputs.append(
            attend(queries[:, :, t], *(a + b for a, b in zip(always, recent, strict=True)))
        )
    return torch.stack(outputs, 2)


def prefix_of(mixer: Any) -> Pair | None:
    return None if mixer.persistent is None else mixer.attention.project.prefix(mixer.persistent())


def lmm_oracle(mixer: Any, x: Tensor) -> Tensor:
    reads, _ = remember(mixer.memory, x, mixer.persistent and mixer.persistent())
    return mixer.o_proj(mixer.memory.finish(reads) * F.silu(mixer.gate_proj(x)))


def mag_oracle(mixer: Any, x: Tensor) -> Tensor:
    """y = SW-Attn([p] || x), o = y (x) M([p] || x); Eq. 26-28."""
    y = merge_heads(mixer.attention_norm(window_oracle(mixer.attention, x, prefix_of(mixer))))
    reads, _ = remember(mixer.memory, x, mixer.persistent and mixer.persistent())
    return mixer.o_proj(y * F.silu(mixer.memory.finish(reads)))


def mal_oracle(mixer: Any, x: Tensor) -> Tensor:
    """y = M([p] || x), o = SW-Attn(y); Eq. 29-31."""
    reads, _ = remember(mixer.memory, x, mixer.persistent and mixer.persistent())
    y = mixer.memory.finish(reads) * F.silu(mixer.gate_proj(x))
    return mixer.o_proj(merge_heads(window_oracle(mixer.attention, y, None)))


def mac_oracle(mixer: Any, x: Tensor) -> Tensor:
    """Eq. 21-25, every segment from the first token on, so that nothing is carried over."""
    memory, project = mixer.memory, mixer.attention.project
    attended, outputs = x[:, :0], []
    asked, _ = memory.queries(x, None, None)
    for first in range(0, TIME, mixer.segment):
        last = min(first + mixer.segment, TIME)
        cells = torch.arange(last - first)
        before = remember(memory, attended, None)[1] if first else memory.start(x)
        recalled = memory.retrieve(asked[:, :, first:last], before.weights)  # Eq. 21
        context = [
            columns(prefix_of(mixer), len(x)),
            columns(project.keys_values(recalled, cells), len(x)),
            columns(project.keys_values(x[:, first:last], cells), len(x)),
        ]
        queries = project.queries(x[:, first:last], cells)
        rows = []
        for i in range(last - first):  # Eq. 22-23: a token sees reads and tokens up to its own
            persistent, reads, own = context
            keys, values = (
                persistent[part] + reads[part][: i + 1] + own[part][: i + 1] for part in (0, 1)
            )
            rows.append(attend(queries[:, :, i], keys, values))
        y = merge_heads(mixer.attention_norm(torch.stack(rows, 2)))
        attended = torch.cat([attended, y], 1)
        returned, _ = remember(memory, attended, None)  # Eq. 24
        outputs.append(y * F.silu(memory.finish(returned[:, :, first:last])))  # Eq. 25
    return mixer.o_proj(torch.cat(outputs, 1))


ORACLES = {"lmm": lmm_oracle, "mac": mac_oracle, "mag": mag_oracle, "mal": mal_oracle}


def test_every_variant_with_a_memory_has_an_oracle() -> None:
    assert set(ORACLES) == set(WITH_MEMORY) == set(MIXERS) - {"transformer"}


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("transformer")])
def test_the_mixer_is_the_paper_s(name: str) -> None:
    mixer, x = mixer_of(FORMS[name]), hidden()
    with torch.no_grad():
        found, _ = mixer(x)
        wanted = ORACLES[FORMS[name]["variant"]](mixer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [1, 2, 6, 26, 27, 100])
@pytest.mark.parametrize(
    ("variant", "field"), [("mag", "window_size"), ("transformer", "attention_window")]
)
def test_a_window_reaches_its_size_and_no_further(window: int, variant: str, field: str) -> None:
    attention, x = mixer_of({"variant": variant, field: window}).attention, hidden(rows=1)
    with torch.no_grad():
        before, _ = attention(x)
        x[:, 0] += 1
        after, _ = attention(x)
    moved = (before != after).any(-1).any(1)[0]
    assert moved.tolist() == [t < window for t in range(TIME)]


def test_the_baseline_attends_to_all_before() -> None:
    mixer, x = mixer_of({"variant": "transformer"}), hidden()
    with torch.no_grad():
        found, _ = mixer(x)
        wanted = mixer.o_proj(merge_heads(window_oracle(mixer.attention, x, None)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def product(i: int, j: int) -> Tensor:
        turned = (rotate(x, torch.tensor([t]), 4, 10000.0) for x, t in ((q, i), (k, j)))
        a, b = turned
        return (a * b).sum()

    torch.testing.assert_close(product(5, 3), product(1005, 1003), rtol=1e-9, atol=1e-9)
    assert not torch.isclose(product(5, 3), product(6, 3))


def test_persistent_tokens_are_seen_from_everywhere_alike() -> None:
    """They have no position: a lone prefix adds the same to a token wherever it stands."""
    mixer = mixer_of({"variant": "mag", "window_size": 1, "partial_rotary_factor": 0.5})
    x = hidden(rows=1)[:, :1].expand(-1, TIME, -1)
    with torch.no_grad():
        heads, _ = mixer.attention(x, mixer.persistent())
        bare, _ = mixer.attention(x)
    torch.testing.assert_close(heads, heads[:, :, :1].expand_as(heads), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(heads, bare)
