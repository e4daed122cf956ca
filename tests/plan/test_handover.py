"""Hand-over volumes: those of the real model's tensors, and none that grows with the sequence."""

import pytest
import torch

from titans_pretrain import config
from titans_pretrain.model.boundary import Boundary
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.fields import WITH_MEMORY
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import handover

FIELDS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "chunk_size": 8,
}
SMALL = {
    "lmm": FIELDS,
    "mac": FIELDS | {"segment_length": 8},
    "mag": FIELDS | {"window_size": 7},
    "mal": FIELDS | {"window_size": 7},
    "transformer": {key: value for key, value in FIELDS.items() if key != "chunk_size"},
}


def run(variant, *, length=64, micro=1, mesh=None, stages=(), precision="fp32", **changes):
    """A run's configuration."""
    return config.resolve(
        {
            "model": {"variant": variant, **SMALL[variant], **changes},
            "data": {
                "manifest": "data/manifest.json",
                "sequence_length": length,
                "length_schedule": [
                    {"from_step": step, "length": length} for step, length in stages
                ],
            },
            "mesh": {"sequence": 2} | (mesh or {}),
            "train": {
                "steps": 1,
                "global_batch_size": 12,
                "micro_batch_size": micro,
                "learning_rate": 1,
                "precision": precision,
            },
            "run": {"directory": "runs/x"},
        },
        source="here",
    )


class Counted(Boundary):
    """Adds up the bytes of what a layer would hand on, each message in its widest dtype."""

    def __init__(self):
        self.state = self.halos = 0

    def halo(self, length, tensors, dim):
        self.halos += sum(_bytes(t.narrow(dim, 0, min(length, t.shape[dim]))) for t in tensors)
        return super().halo(length, tensors, dim)

    def leave(self, tied, state):
        widest = max(tensor.element_size() for tensor in state)
        self.state += sum(tensor.numel() for tensor in state) * widest
        return tied


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()


def counted(model, rows, span, dtype):
    """Bytes of a state and of halos that the real model hands on after one span."""
    made = TitansForCausalLM(TitansConfig(**model)).to(dtype)
    boundary = Counted()
    for module in made.modules():
        if hasattr(module, "boundary"):
            module.boundary = boundary
    with torch.no_grad():
        made(input_ids=torch.zeros(rows, span, dtype=torch.long), use_cache=False)
    return boundary.state, boundary.halos


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        *((variant, {}) for variant in WITH_MEMORY),
        ("lmm", {"conv_width": 0}),
        ("lmm", {"conv_width": 1, "memory_depth": 1}),
        ("lmm", {"memory_heads": 2, "memory_depth": 3, "memory_expansion": 2}),
        ("mac", {"conv_width": 0}),
        ("mag", {"conv_width": 0, "window_size": 1}),
        ("mal", {"window_size": 100}),
        ("lmm", {"conv_width": 40}),
    ],
)
def test_a_message_is_as_large_as_what_the_model_hands_on(variant, changes, precision):
    settings = run(variant, micro=3, precision=precision, **changes)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    state, halos = counted(settings.model, rows=3, span=32, dtype=dtype)
    planned = handover.message(settings, 1)
    assert planned.state == state
    assert planned.convolution + planned.window == halos
    assert planned.total == state + halos


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_it_does_not_depend_on_the_sequence_length(variant):
    volumes = {
        handover.message(run(variant, length=length, mesh={"sequence": 4}), boundary)
        for length in (32, 64, 1024, 2**20)
        for boundary in (1, 2, 3)
    }
    assert len(volumes) == 1
    assert handover.free_of_length(run(variant).model) <= 8


def test_a_window_longer_than_a_span_grows_until_the_span_holds_it():
    settings = run("mag", length=64, mesh={"sequence": 4}, window_size=41)
    key = 2 * 16 * 4
    windows = [handover.message(settings, boundary).window for boundary in (1, 2, 3)]
    assert windows == [16 * key, 32 * key, 40 * key]
    assert handover.free_of_length(settings.model) == 40
    longer = run("mag", length=4 * 40, mesh={"sequence": 4}, window_size=41)
    assert handover.message(longer, 1).window == 40 * key


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_tensor_ranks_share_it(variant):
    whole = handover.message(run(variant), 1)
    shared = handover.message(run(variant, mesh={"tensor": 4}), 1)
    for name, value in vars(whole).items():
        assert vars(shared)[name] * 4 == value


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_a_shorter_stage_has_more_sequences_in_a_micro_batch(variant):
    settings = run(variant, stages=[(0, 16), (5, 64)])
    short, full = (handover.message(settings, 1, length) for length in (16, 64))
    assert short.total == 4 * full.total


def test_a_step_hands_every_micro_batch_on_and_its_gradient_back():
    settings = run("lmm", micro=2)
    assert (
        handover.step_bytes(settings, Mesh(data=3, sequence=2), 1)
        == 2 * 2 * handover.message(settings, 1).total
    )


def test_the_state_of_a_memory_is_its_weights_and_momentum_in_float32():
    model = run("lmm", memory_heads=2, memory_expansion=4).model
    elements_of_a_head = 8 * 32 + 32 * 8
    assert handover.state_bytes(model, rows=3, tensor=2) == 2 * elements_of_a_head * 3 * 4


def test_a_transformer_exchanges_heads_instead():
    settings = run("transformer", length=64, micro=3, mesh={"sequence": 4}, precision="bf16")
    assert handover.message(settings, 1).total == 0
    assert handover.exchange_bytes(settings) == 4 * 3 * 16 * 16 * 2 * 3 // 4
    assert handover.exchange_bytes(run("lmm")) == 0


@pytest.mark.parametrize("boundary", [0, 2])
def test_a_boundary_that_is_none_is_refused(boundary):
    with pytest.raises(ValueError, match="not among 2 ranks"):
        handover.message(run("lmm"), boundary)
