"""What a step takes in memory: terms that follow from the run, and constants of what it plans."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from measured_step import LiveTensors

from titans_pretrain import config
from titans_pretrain.model import memory as scan
from titans_pretrain.model import memory_coefficients, memory_triton
from titans_pretrain.model.fields import VARIANTS, WITH_MEMORY
from titans_pretrain.model.memory_chunk import MemoryState
from titans_pretrain.parallel import linear_cross_entropy, zero_settings
from titans_pretrain.parallel.construct import skeleton
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import activations, memory, parameters
from titans_pretrain.plan.activations import Span
from titans_pretrain.train import optimizer

MODEL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODEL |= {"intermediate_size": 48}
FIELDS = {variant: {"chunk_size": 8} for variant in WITH_MEMORY} | {"transformer": {}}
FIELDS["mac"] |= {"segment_length": 16}
for windowed in ("mag", "mal"):
    FIELDS[windowed] |= {"window_size": 24}


def run(variant="mag", *, length=64, mesh=None, model=None, **train):
    """A run's configuration."""
    counts = {"steps": 1, "global_batch_size": 8, "learning_rate": 1, "precision": "fp32"}
    return config.resolve(
        {
            "model": {"variant": variant, **MODEL, **FIELDS[variant], **(model or {})},
            "data": {"manifest": "x", "sequence_length": length},
            "mesh": mesh or {},
            "train": counts | train,
            "run": {"directory": "x"},
        },
        source="here",
    )


def test_constants_are_those_of_what_is_planned():
    assert zero_settings.BUCKET_ELEMENTS == memory.BUCKET_ELEMENTS
    settings = zero_settings.deepspeed_settings(run().train, Mesh(), 10**12)["zero_optimization"]
    assert settings["stage3_max_reuse_distance"] == memory.REUSE_ELEMENTS
    assert settings["sub_group_size"] == memory.REUSE_ELEMENTS
    assert linear_cross_entropy.CHUNK_BYTES == memory.LOGITS_BYTES
    assert linear_cross_entropy.ALIGNED == memory.ALIGNED_TOKENS
    assert scan.STRETCH == activations.STRETCH
    assert memory_coefficients.BLOCK == activations.SCAN_BLOCK == memory_triton.LARGEST_BLOCK
    assert memory_triton.DEEPEST == activations.KERNEL_DEPTH
    assert memory_triton.LARGEST_WIDTH == activations.KERNEL_WIDTH


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_the_optimizer_takes_at_once_is_its_larger_group(variant, tied):
    settings = run(variant, model={"tie_word_embeddings": tied})
    made = skeleton(settings.model)
    decayed = optimizer.decayed(made)
    sizes = {name: parameter.numel() for name, parameter in made.named_parameters()}
    groups = [0, 0]
    for name, size in sizes.items():
        groups[name not in decayed] += size
    moment = memory.moments(settings, Mesh())["update"]
    assert moment.update == 3 * 4 * max(groups)


@pytest.mark.parametrize(("precision", "weights"), [("fp32", 4), ("bf16", 2)])
def test_each_parameter_has_weights_gradient_master_moments_and_a_place_in_a_bucket(
    precision, weights
):
    settings = run(precision=precision)
    elements = parameters.count(settings.model)
    for moment in memory.moments(settings, Mesh()).values():
        assert moment.weights == weights * elements
        assert (moment.gradients, moment.optimizer) == (4 * elements, 12 * elements)
        assert moment.communication == 4 * elements
        assert moment.gathered == 0


def test_data_ranks_share_all_but_what_they_gather():
    settings = run(precision="bf16")
    alone, shared = (memory.moments(settings, Mesh(data=ranks))["backward"] for ranks in (1, 4))
    for term in ("weights", "gradients", "optimizer"):
        assert getattr(shared, term) == pytest.approx(getattr(alone, term) / 4, rel=1e-3)
    assert shared.weights + shared.gathered == pytest.approx(alone.weights, rel=1e-3)
    assert (shared.block, shared.kept, shared.states) == (alone.block, alone.kept, alone.states)


def test_of_a_large_model_as_much_is_gathered_as_is_used_again_soon():
    settings = run("transformer", model={"hidden_size": 4096, "num_hidden_layers": 40})
    moment = memory.moments(settings, Mesh(data=8))["backward"]
    assert parameters.count(settings.model) > 2 * memory.REUSE_ELEMENTS
    assert moment.gathered == 4 * (11 * 10**8) * 7 // 8
    assert moment.communication == 2 * 4 * memory.BUCKET_ELEMENTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_ranks_share_states_and_most_activations(variant):
    settings = run(variant, length=512, activation_checkpointing=True)
    alone, shared = (memory.moments(settings, Mesh(tensor=ranks))["backward"] for ranks in (1, 4))
    assert shared.kept == alone.kept
    assert shared.states * 4 == alone.states
    assert alone.block / 4 < shared.block < alone.block


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_checkpointing_blocks_keep_their_inputs_alone(variant, precision):
    size = {"fp32": 4, "bf16": 2}[precision] * 32 * 64 * 2
    settings = run(variant, precision=precision, micro_batch_size=2, activation_checkpointing=True)
    moment = memory.moments(settings, Mesh())["loss"]
    assert moment.kept == 3 * size
    without = memory.moments(run(variant, precision=precision, micro_batch_size=2), Mesh())
    assert without["loss"].kept > 8 * moment.kept


def test_offloaded_state_is_not_on_the_device():
    moment = memory.moments(run(offload_optimizer=True), Mesh())["update"]
    assert (moment.optimizer, moment.gradients, moment.update) == (0, 0, 0)
    assert moment.weights > 0


def test_interleaved_micro_batches_are_kept_together():
    mesh = {"sequence": 4}
    settings = run(mesh=mesh, length=256)
    one_by_one = run(mesh=mesh | {"interleave": False}, length=256)
    kept, once = (
        memory.moments(one, Mesh(sequence=4))["loss"].kept for one in (settings, one_by_one)
    )
    assert kept == 4 * once
    assert memory.moments(run(length=64), Mesh())["loss"].kept == pytest.approx(once, rel=0.05)


@pytest.mark.parametrize("variant", ["lmm", "mag", "mal"])
def test_states_are_kept_before_each_stretch_and_by_kernels_before_each_chunk(variant):
    model = run(variant, model={"num_persistent_tokens": 0}).model
    span = Span(model, rows=2, tokens=1024, tensor=1, activation=4)
    of_row = 2 * 4 * (2 * 8 * 32) * 4  # weights and momentum, heads, 8 to 32 to 8, float32
    assert span.state == of_row
    assert activations.kept(span).states == (2 * 1024 // 256 + 1) * of_row
    by_kernels = replace(span, kernels=True)
    assert activations.kept(by_kernels).states == (2 * (1024 // 8 + 1) + 1) * of_row


@pytest.mark.parametrize(
    "changes", [{"memory_depth": 3}, {"remember_across_documents": False}, {"hidden_size": 1024}]
)
def test_memories_that_no_kernel_supports_are_planned_as_torch_scans_them(changes):
    model = run("mag", model=changes).model
    span = Span(model, rows=2, tokens=1024, tensor=1, activation=4)
    by_kernels = replace(span, kernels=True)
    assert activations.kept(by_kernels) == activations.kept(span)
    assert activations.scan(by_kernels) == activations.scan(span)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    settings, size = run(activation_checkpointing=True), 5e7
    most = memory.largest_micro_batch(settings, Mesh(), size, 64)
    assert most > 4
    sizes = [
        memory.total(
            run(activation_checkpointing=True, micro_batch_size=n, global_batch_size=n), Mesh()
        )
        for n in (most, most + 1)
    ]
    assert sizes[0] <= size < sizes[1]
    assert memory.largest_micro_batch(settings, Mesh(), 1e5, 64) == 0


def test_a_pass_is_fullest_at_the_loss_or_in_a_block_and_a_small_one_at_the_update():
    wide = memory.moments(run("lmm", model={"vocab_size": 50_000}), Mesh())
    assert wide["loss"].total > wide["backward"].total
    long = memory.moments(run("lmm", length=4096, activation_checkpointing=True), Mesh())
    assert long["backward"].total > max(long["loss"].total, long["update"].total)


class NoKernel:
    """Stands for a Triton kernel: takes what it is launched with and computes nothing."""

    def __getitem__(self, grid):
        return lambda *buffers, **constants: None


@pytest.fixture
def kernels_that_do_nothing(monkeypatch):
    names = {
        "memory_triton_kernels": ("coefficients_forward", "coefficients_backward"),
        "memory_triton_shallow": ("scan_forward_1", "scan_backward_1"),
        "memory_triton_deep": ("scan_forward_2",),
        "memory_triton_deep_backward": ("scan_backward_2",),
    }
    for module, functions in names.items():
        stub = ModuleType(module)
        for function in functions:
            setattr(stub, function, NoKernel())
        monkeypatch.setitem(sys.modules, f"titans_pretrain.model.{module}", stub)
    monkeypatch.setattr(memory_triton, "supports", lambda *_, **__: None)


@pytest.mark.parametrize("chunk", [16, 64, 256])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_buffers_of_kernels_are_those_planned(kernels_that_do_nothing, chunk, depth):
    model = {"chunk_size": chunk, "memory_depth": depth, "num_persistent_tokens": 0}
    settings = run("lmm", model=model | {"hidden_size": 64})
    span = Span(settings.model, rows=2, tokens=1024, tensor=1, activation=2, kernels=True)
    layers = parameters.memory_layers(settings.model)
    tokens = [torch.zeros(2, 1024, 4, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    gates = [torch.zeros(2, 4, 1024) for _ in range(3)]
    state = MemoryState(*(tuple(torch.zeros(2, 4, *shape) for shape in layers) for _ in range(2)))
    leaves = [tensor.requires_grad_() for tensor in (*tokens, *gates)]
    with LiveTensors() as tensors:
        for tensor in (*leaves, *state.weights, *state.momentum):
            tensors.take(tensor)
        before = tensors.live
        reads, final = memory_triton.memory_scan(*leaves, state, chunk_size=chunk)
        reads_and_state = sum(x.numel() * x.element_size() for x in (reads, *final[0], *final[1]))
        kept = tensors.live - before - reads_and_state
        tensors.mark()
        before = tensors.live
        reads.backward(torch.zeros_like(reads))
        needed = tensors.peak - before
    states = activations.kept(span).states - span.state  # one more for a start without rows
    assert kept == pytest.approx(states, rel=0.1)
    assert needed == pytest.approx(activations.scan(span), rel=0.15)
