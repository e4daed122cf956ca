"""Models made part by part: equal weights on any mesh, and never more than a part too much."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from zero_cases import fields, settings

from titans_pretrain.parallel import devices
from titans_pretrain.parallel.construct import construct, skeleton
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.zero_settings import partitioner

M_MMAP_THRESHOLD = -3  # of malloc.h
VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")


def sharded(values, train, tensor=1, sequence=1):
    mesh = Mesh(tensor, devices.ranks() // (tensor * sequence), sequence)
    parallel = Parallel(mesh, devices.rank())
    return construct(values, 3, parallel, partitioner(train, parallel.groups)), parallel


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_the_values_its_layer_asks_for(variant, tied):
    values = fields(variant, hidden_size=128, tie_word_embeddings=tied)
    model = construct(values, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight or not tied
    expected = skeleton(values)
    assert dict(model.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.device.type == "cpu"
        assert bool(parameter.isfinite().all()), name
    spread = model.model.layers[0].feed_forward.up_proj.weight.std().item()
    assert spread == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(128))


def test_layers_differ_from_each_other_and_between_seeds_and_random_numbers_go_on_as_before():
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first, second = construct(fields(), 3), construct(fields(), 4)
    assert torch.equal(torch.rand(2), expected)
    weights = [layer.feed_forward.up_proj.weight for layer in first.model.layers]
    assert not torch.equal(*weights)
    assert not torch.equal(weights[0], second.model.layers[0].feed_forward.up_proj.weight)
    assert not torch.equal(
        weights[0].flatten()[:16], first.model.layers[0].feed_forward.gate_proj.weight[0]
    )


def test_making_weights_seeds_no_gpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    construct(fields(), 3)
    assert not seeded


def parts(values, train, mesh):
    """Which parameters differ from those of one process."""
    from titans_pretrain.parallel import tensor

    linear = F.linear
    model, parallel = sharded(values, train, **mesh)
    assert F.linear is linear
    whole = dict(construct(values, 3).named_parameters())
    named, wrong = dict(model.named_parameters()), []
    assert named.keys() == whole.keys()
    for name, parameter in named.items():
        shape, offsets, sizes = tensor.logical(parameter, parallel.groups)
        window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        size, rank = parameter.ds_tensor.ds_numel, parallel.groups.data_rank
        expected = whole[name].detach()[window].flatten()[rank * size :][:size]
        expected = expected.to(torch.bfloat16 if train.precision == "bf16" else torch.float32)
        held = parameter.ds_tensor[: expected.numel()]
        same = shape == tuple(whole[name].shape) and torch.equal(held, expected)
        if not same or parameter.numel() or size * parallel.mesh.data < expected.numel():
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("count", "mesh", "tied", "precision"),
    [
        (2, {}, False, "fp32"),
        (2, {"tensor": 2}, True, "bf16"),
        (4, {"tensor": 2, "sequence": 2}, True, "fp32"),
        pytest.param(1, {}, True, "fp32", marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2}, False, "fp32", marks=pytest.mark.slow),
        pytest.param(4, {}, True, "bf16", marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_of_one_process_on_any_mesh(count, mesh, tied, precision):
    values = fields("mac", tie_word_embeddings=tied)
    train = settings(precision=precision)
    assert run_ranks(parts, count, values, train, mesh) == [[]] * count


def resident(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024


def memory_of_a_construction(values, train):
    """MiB: the growth of the peak, the whole model, a block."""
    # What is freed goes back at once, as it does of the larger tensors of real models.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    sharded(fields("transformer"), train)  # what is loaded and made once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model, _ = sharded(values, train)
    peak = resident("VmHWM") - before
    sizes = {name: parameter.ds_numel / 2**18 for name, parameter in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return peak, sum(sizes.values()), layer


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_peak_of_host_memory_is_the_shards_and_about_a_part(count):
    values = fields(
        "transformer", hidden_size=512, intermediate_size=1024, num_hidden_layers=20, vocab_size=64
    )
    for peak, whole, layer in run_ranks(memory_of_a_construction, count, values, settings()):
        shards = whole / count
        assert whole > 12 * layer
        assert peak < shards + 1.5 * layer


def test_buffers_are_refused_as_nothing_would_fill_them(monkeypatch):
    from titans_pretrain.model.modeling_titans import TitansBlock

    made = TitansBlock.__init__

    def with_buffer(self, *arguments):
        made(self, *arguments)
        self.register_buffer("table", torch.zeros(2))

    monkeypatch.setattr(TitansBlock, "__init__", with_buffer)
    with pytest.raises(ValueError, match=r"model\.layers\.0 has buffers"):
        construct(fields(), 3)
