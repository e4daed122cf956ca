"""Kernels compute the memory's scan only after they agreed with PyTorch."""

import pytest
import torch

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.model import memory, memory_triton
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.train import kernels

CPU = torch.device("cpu")


def section(**fields: str) -> TrainSection:
    return TrainSection(steps=1, global_batch_size=1, learning_rate=1e-3, **fields)


def model_of(variant: str) -> TitansForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"intermediate_size": 48, "chunk_size": 4, "segment_length": 8, "window_size": 6}
    return TitansForCausalLM(TitansConfig(variant=variant, **fields)).eval()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """``kernel(factor)``: kernels that run here, whose reads are off by a factor; counts calls."""
    calls = []

    def install(factor: float = 1.0):
        def scan(*tokens, **options):
            calls.append(options)
            reads, state = memory.memory_scan(*tokens, **options)
            return reads * factor, state

        monkeypatch.setattr(memory_triton, "memory_scan", scan)
        refused = lambda *_, resets=None: None if resets is None else "documents"  # noqa: E731
        monkeypatch.setattr(memory_triton, "supports", refused)
        return calls

    return install


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_that_agree_compute_every_scan(kernel, variant, precision):
    ids = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    model = model_of(variant)
    wanted, calls = model(ids, use_cache=False).logits, kernel()
    kernels.choose(model, section(memory_kernels="triton", precision=precision), CPU)
    calls.clear()
    assert torch.equal(model(ids, use_cache=False).logits, wanted)
    assert len(calls) >= model.config.num_hidden_layers


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_kernels_that_do_not_agree_are_refused(kernel, factor):
    kernel(factor)
    with pytest.raises(TitansError, match=r"Triton kernels are .* off what PyTorch computes") as it:
        kernels.choose(model_of("lmm"), section(memory_kernels="triton"), CPU)
    assert "train.memory_kernels=torch" in it.value.fix


def test_documents_inside_a_sequence_are_scanned_by_pytorch(kernel):
    model, calls = model_of("lmm"), kernel()
    kernels.choose(model, section(memory_kernels="triton"), CPU)
    calls.clear()
    scan = model.model.layers[0].mixer.memory.memory_scan
    inputs = kernels._random(model.model.layers[0].mixer.memory, CPU, torch.float32)
    state = memory.MemoryState(tuple(inputs[6:8]), tuple(inputs[8:]))
    first = torch.zeros(inputs[0].shape[0], inputs[0].shape[2], dtype=torch.bool)
    scan(*inputs[:6], state, chunk_size=4, resets=memory.Resets(first, state))
    assert not calls


def test_where_no_kernel_runs_it_is_said_why():
    with pytest.raises(
        UserError, match=r"triton: (triton is not installed|the tensors are on cpu)"
    ):
        kernels.choose(model_of("lmm"), section(memory_kernels="triton"), CPU)


def test_a_model_without_memory_has_no_use_for_them():
    with pytest.raises(UserError, match="the model has no memory"):
        kernels.choose(model_of("transformer"), section(memory_kernels="triton"), CPU)


def test_by_default_nothing_changes():
    model = model_of("lmm")
    kernels.choose(model, section(), CPU)
    assert model.model.layers[0].mixer.memory.memory_scan is memory.memory_scan
