"""The Triton kernels are the memory's equations: on a GPU, and in Triton's interpreter without one.

The interpreter has to be asked for before Triton is imported, so that the last test here runs the
others in a process of their own where no GPU is.
"""

import os
import subprocess
import sys

import pytest
import torch
from memory_cases import Case, assert_near, flat, random_case
from torch import Tensor

from titans_pretrain.model import memory_triton
from titans_pretrain.model.memory import MemoryState, Resets
from titans_pretrain.model.memory_reference import memory_scan as reference_scan
from titans_pretrain.model.memory_triton import INSTALLED, memory_scan, supports

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = INSTALLED and torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
NOT_INSTALLED = "triton is not installed: pip install 'titans-pretrain[gpu]'"
NO_GPU = "no GPU: run in the interpreter by this file's last test"
KERNELS = pytest.mark.skipif(
    not (INSTALLED and (GPU or INTERPRETED)), reason=NO_GPU if INSTALLED else NOT_INSTALLED
)
# of a tensor's largest entry; products of bfloat16 operands keep eight bits
FLOAT32, BFLOAT16 = 2e-5, 4e-2


def random_gradients(case: Case, result: tuple[Tensor, MemoryState]) -> dict[str, Tensor]:
    """Gradients of a scalar that weighs every output differently, by every input."""
    generator = torch.Generator().manual_seed(99)
    outputs = list(flat(result).values())
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    found = torch.autograd.grad(outputs, list(case.tensors().values()), weights)
    return {f"gradient of {name}": g for name, g in zip(case.tensors(), found, strict=True)}


def assert_equals_reference(
    case: Case,
    relative: float = FLOAT32,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> None:
    """Reads, last state and all gradients are those of the reference in float64."""
    low = case.map(lambda x: x.to(DEVICE, torch.float32))
    tokens = {name: getattr(low, name).to(dtype) for name in ("queries", "keys", "values")}
    low = low.but(**tokens).leaves()
    high = low.map(lambda x: x.cpu().double()).leaves()
    found, wanted = low.run(memory_scan, **options), high.run(reference_scan, **options)
    assert found[0].dtype == dtype
    assert all(w.dtype == torch.float32 for w in found[1].weights)
    assert_near(on_cpu(flat(found)), flat(wanted), relative)
    pulled = on_cpu(random_gradients(low, found))
    assert_near(pulled, random_gradients(high, wanted), relative)
    with torch.no_grad():
        assert_near(flat(low.run(memory_scan, **options)), flat(found), relative)


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """float32 inputs are multiplied as float32 in these tests."""
    assert torch.get_float32_matmul_precision() == "highest"


@KERNELS
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("activation", "residual"), [("gelu", True), ("silu", False)])
@pytest.mark.parametrize("depth", [1, 2])
def test_kernels_equal_the_reference(
    depth: int, activation: str, residual: bool, clip: float | None
) -> None:
    case = random_case(seed=depth, batch=1, depth=depth, time=7, dim=5)
    options = {"activation": activation, "residual": residual, "surprise_clip": clip}
    assert_equals_reference(case, chunk_size=4, **options)


@KERNELS
@pytest.mark.parametrize(("time", "chunk_size"), [(1, 1), (3, 1), (16, 16), (17, 16), (20, 64)])
@pytest.mark.parametrize("depth", [1, 2])
def test_kernels_equal_the_reference_at_every_length(
    depth: int, time: int, chunk_size: int
) -> None:
    case = random_case(seed=time, batch=1, heads=1, depth=depth, time=time)
    assert_equals_reference(case, chunk_size=chunk_size, surprise_clip=1.0)


@KERNELS
@pytest.mark.parametrize(("time", "chunk_size"), [(61, 36), (40, 32), (35, 1000)])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_chunk_of_several_blocks_equals_the_reference(
    depth: int, time: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Surprise is taken where the chunk begins, not where a block does."""
    monkeypatch.setattr(memory_triton, "LARGEST_BLOCK", 16)
    case = random_case(batch=1, heads=1, depth=depth, time=time, max_step=0.05)
    case = case.but(forget=0.1 * case.forget)
    assert_equals_reference(case, chunk_size=chunk_size, surprise_clip=1.0)


@KERNELS
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_at_and_between_their_ends_equal_the_reference(
    depth: int, clip: float | None
) -> None:
    """Logarithms and quotients of cumulative products would be infinite or undefined here."""
    case = random_case(seed=3, batch=1, heads=2, depth=depth, time=24, max_step=0.05)
    forget, momentum = case.forget.round(), case.momentum.round()
    forget[:, 1], momentum[:, 1] = 0, 1
    step = case.step * (case.step > 0.02)
    case = case.but(forget=forget, momentum=momentum, step=step)
    assert_equals_reference(case, chunk_size=16, surprise_clip=clip)


@KERNELS
@pytest.mark.parametrize("depth", [1, 2])
def test_widths_beyond_one_tile_equal_the_reference(depth: int) -> None:
    """Neither the head nor the hidden units are a power of two, and these are in two tiles."""
    case = random_case(batch=1, heads=1, depth=depth, time=18, dim=33, expansion=3)
    assert_equals_reference(case, chunk_size=16, surprise_clip=1.0)


@KERNELS
@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16_products_are_close_to_the_reference(depth: int) -> None:
    case = random_case(batch=1, heads=2, depth=depth, time=24, dim=16)
    options = {"chunk_size": 16, "surprise_clip": 1.0}
    assert_equals_reference(case, BFLOAT16, torch.bfloat16, **options)


@KERNELS
@pytest.mark.parametrize("depth", [1, 2])
def test_zero_surprise_has_the_reference_s_finite_gradients(depth: int) -> None:
    """Zero keys and values surprise nothing; a norm's slope at zero counts as zero."""
    case = random_case(batch=1, heads=1, depth=depth, time=9)
    zero = torch.zeros_like(case.keys)
    case = case.but(keys=zero, values=zero)
    assert_equals_reference(case, chunk_size=4, surprise_clip=1.0)


@KERNELS
def test_a_split_at_a_chunk_s_end_and_views_change_nothing() -> None:
    case = random_case(depth=2, time=12, dtype=torch.float32).map(lambda x: x.to(DEVICE))
    options = {"chunk_size": 4, "surprise_clip": 1.0}
    whole = case.run(memory_scan, **options)
    left, state = case.between(0, 8, case.state).run(memory_scan, **options)
    right, state = case.between(8, 12, state).run(memory_scan, **options)
    assert_near(flat((torch.cat([left, right], 2), state)), flat(whole), 1e-6)


@KERNELS
def test_a_second_derivative_is_refused_not_wrong() -> None:
    case = random_case(batch=1, heads=1, time=5, dtype=torch.float32)
    case = case.map(lambda x: x.to(DEVICE)).leaves()
    outputs, _ = case.run(memory_scan, chunk_size=4)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(outputs.sum(), case.keys, create_graph=True)


@KERNELS
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"depth": 3}, "3 layers deep"),
        ({"dim": 129, "depth": 1}, "129 wide"),
        ({"time": 0}, "no token"),
    ],
)
def test_what_kernels_do_not_support_is_said_and_refused(changes: dict, why: str) -> None:
    shape = {"batch": 1, "heads": 1, "time": 3, "dtype": torch.float32} | changes
    case = random_case(**shape).map(lambda x: x.to(DEVICE))
    assert why in str(supports(case.queries, case.state))
    with pytest.raises(ValueError, match=why):
        case.run(memory_scan, chunk_size=4)


@KERNELS
def test_documents_are_not_supported_and_plain_scans_are() -> None:
    case = random_case(time=3, dtype=torch.float32).map(lambda x: x.to(DEVICE))
    resets = Resets(torch.zeros(2, 3, dtype=torch.bool), case.state)
    assert "documents" in str(supports(case.queries, case.state, resets=resets))
    assert supports(case.queries, case.state) is None


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({"keys": torch.zeros(2, 2, 4, 4)}, {}, "keys is .* expected"),
        ({"forget": torch.zeros(2, 2, 1)}, {}, "forget is .* expected"),
        ({"state": random_case(time=3, dim=5).state}, {}, "do not continue a layer of width 4"),
        ({}, {"chunk_size": 0}, "chunk_size 0 is below 1"),
        ({}, {"activation": "relu"}, "activation 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_a_kernel_reads_it(
    changes: dict, options: dict, why: str
) -> None:
    case = random_case(time=3, dim=4, dtype=torch.float32).but(**changes)
    with pytest.raises(ValueError, match=why):
        case.run(memory_scan, **{"chunk_size": 4} | options)


def test_a_machine_without_triton_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_triton, "INSTALLED", False)
    case = random_case(time=3, dtype=torch.float32)
    assert "triton is not installed" in str(supports(case.queries, case.state))
    with pytest.raises(ValueError, match="triton is not installed"):
        case.run(memory_scan, chunk_size=4)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not INSTALLED, reason=NOT_INSTALLED)
@pytest.mark.skipif(INTERPRETED or GPU, reason="the kernels ran in this process")
def test_the_kernels_in_the_interpreter_equal_the_reference() -> None:
    case = random_case(time=3, dtype=torch.float32)
    assert "not on a GPU" in str(supports(case.queries, case.state))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
