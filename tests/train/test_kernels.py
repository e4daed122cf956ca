"""Kernels compute the memory's scan only after they agreed with PyTorch."""

import pytest
import torch

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.model import memory, memory_triton
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.train import kernels

CPU = torch.device("cpu")


def model_of(variant: str, **more: object) -> TitansForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"intermediate_size": 48, "chunk_size": 4, "segment_length": 8, "window_size": 6}
    return TitansForCausalLM(TitansConfig(variant=variant, **fields, **more)).eval()


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
    kernels.choose(model, "triton", precision, CPU)
    calls.clear()
    assert torch.equal(model(ids, use_cache=False).logits, wanted)
    assert len(calls) >= model.config.num_hidden_layers


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_kernels_that_do_not_agree_are_refused(kernel, factor):
    kernel(factor)
    with pytest.raises(TitansError, match=r"Triton kernels are .* off what PyTorch computes") as it:
        kernels.choose(model_of("lmm"), "triton", "bf16", CPU)
    assert "train.memory_kernels=torch" in it.value.fix


def test_kernels_off_without_gradients_alone_are_refused(kernel, monkeypatch):
    """Validation and generation compile other kernels than training."""
    kernel()
    scan = memory_triton.memory_scan

    def off(*tokens, **options):
        reads, state = scan(*tokens, **options)
        return (reads if torch.is_grad_enabled() else 2 * reads), state

    monkeypatch.setattr(memory_triton, "memory_scan", off)
    with pytest.raises(TitansError, match=r"off what PyTorch computes"):
        kernels.choose(model_of("lmm"), "triton", "bf16", CPU)


def test_kernels_off_on_persistent_tokens_alone_are_refused(kernel, monkeypatch):
    kernel()
    scan, model = memory_triton.memory_scan, model_of("lmm")

    def off(queries, *rest, **options):
        reads, state = scan(queries, *rest, **options)
        alone = queries.shape[2] == model.config.num_persistent_tokens
        return (2 * reads if alone else reads), state

    monkeypatch.setattr(memory_triton, "memory_scan", off)
    with pytest.raises(TitansError, match=r"off what PyTorch computes"):
        kernels.choose(model, "triton", "bf16", CPU)


def test_kernels_that_do_not_compile_say_how_to_go_on(kernel, monkeypatch):
    kernel()

    def broken(*_, **__):
        raise RuntimeError("in a kernel\nout of resource: shared memory")

    monkeypatch.setattr(memory_triton, "memory_scan", broken)
    with pytest.raises(UserError, match="do not run here: out of resource: shared memory") as it:
        kernels.choose(model_of("lmm"), "triton", "bf16", CPU)
    assert it.value.fix == "use train.memory_kernels=torch"


def test_a_memory_that_separates_documents_is_refused(kernel):
    kernel()
    with pytest.raises(UserError, match="begins anew at documents"):
        kernels.choose(model_of("lmm", remember_across_documents=False), "triton", "bf16", CPU)


def test_where_no_kernel_runs_it_is_said_why():
    with pytest.raises(
        UserError, match=r"triton: (triton is not installed|the tensors are on cpu)"
    ):
        kernels.choose(model_of("lmm"), "triton", "bf16", CPU)


def test_a_model_without_memory_has_no_use_for_them():
    with pytest.raises(UserError, match="the model has no memory"):
        kernels.choose(model_of("transformer"), "triton", "bf16", CPU)


def test_by_default_nothing_changes():
    model = model_of("lmm")
    kernels.choose(model, "torch", "bf16", CPU)
    assert model.model.layers[0].mixer.memory.memory_scan is memory.memory_scan
