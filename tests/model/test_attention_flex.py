"""FlexAttention's mask and blocks for a window: what attention by blocks sees, pair by pair.

Compiled kernels need a GPU; here the same function runs as torch's plain code.
"""

import functools
import gc
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as torch_flex

from titans_pretrain.model import attention_flex
from titans_pretrain.model.attention_blocks import by_blocks
from titans_pretrain.model.attention_flex import attend_window, block_mask, by_flex

CPU = torch.device("cpu")
BATCH, HEADS, WIDTH = 2, 2, 16
CASES = {  # slots, keys before them, window, persistent tokens, whether there are documents
    "alone": (300, 0, 70, 0, False),
    "persistent": (300, 0, 70, 5, False),
    "persistent blocks": (256, 0, 128, 256, False),
    "halo": (300, 69, 70, 5, False),
    "short halo": (300, 20, 70, 5, True),
    "blocks exactly": (384, 128, 129, 0, False),
    "wide": (400, 0, 300, 3, False),
    "wide halo": (400, 299, 300, 3, True),
    "all": (260, 0, 1000, 4, False),
    "one": (130, 0, 1, 2, False),
    "few": (5, 3, 4, 1, True),
    "documents": (400, 0, 300, 0, True),
    "documents, persistent": (400, 64, 65, 7, True),
    "whole blocks": (256, 64, 65, 7, True),
}
every_case = pytest.mark.parametrize("case", CASES)


def reach_of(slots, past):
    """Of documents that begin anywhere, the first one before the span where keys are before."""
    generator = torch.Generator().manual_seed(2)
    columns = torch.arange(slots)
    begins = torch.rand(BATCH, slots, generator=generator) < 0.02
    begins[0, slots // 3 :] = False  # a long one
    starts = torch.where(begins, columns, -2 * past).cummax(1).values
    return columns - starts.clamp(min=-2 * past)


def given(slots, past, window, persistent, documents, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)

    def some(batch, length):
        values = torch.randn(batch, HEADS, length, WIDTH, generator=generator, dtype=dtype)
        return values.to(device).requires_grad_()

    tensors = [some(BATCH, slots), some(BATCH, past + slots), some(BATCH, past + slots)]
    front = [some(1, persistent), some(1, persistent)] if persistent else []
    reach = reach_of(slots, past).to(device) if documents else None
    return tensors, front, reach


def call(attend, case, *, tensors, front, reach, **options):
    """Heads, and gradients of a sum that tells every output apart."""
    prefix = tuple(front) if front else None
    heads = attend(*tensors, CASES[case][2], prefix=prefix, reach=reach, **options)
    weights = torch.linspace(-1, 1, heads.numel(), dtype=heads.dtype, device=heads.device)
    wanted = [*tensors, *front]
    return heads.detach(), torch.autograd.grad((heads.flatten() * weights).sum(), wanted)


def by_mask(queries, keys, values, block_mask):
    """What FlexAttention computes, with a mask of every pair."""
    batch, heads, slots, _ = queries.shape
    mask = torch_flex.create_mask(block_mask.mask_mod, batch, heads, slots, keys.shape[2], "cpu")
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@every_case
def test_the_mask_gives_the_heads_and_gradients_of_attention_by_blocks(case):
    tensors, front, reach = given(*CASES[case])
    values = {"tensors": tensors, "front": front, "reach": reach}
    heads, gradients = call(by_flex, case, **values, flex=by_mask)
    expected, expected_gradients = call(by_blocks, case, **values)
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-12)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["halo", "documents, persistent"])
def test_torchs_own_function_takes_the_mask(case):
    tensors, front, reach = given(*CASES[case])
    tensors, front = ([tensor.detach() for tensor in some] for some in (tensors, front))
    prefix = tuple(front) if front else None
    with torch.no_grad():
        options = {"prefix": prefix, "reach": reach}
        heads = by_flex(*tensors, CASES[case][2], **options, flex=torch_flex.flex_attention)
        expected = by_blocks(*tensors, CASES[case][2], **options)
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-12)


def test_one_graph_serves_the_documents_of_every_batch():
    tensors, front, _ = given(*CASES["documents, persistent"])
    tensors, front = ([tensor.detach() for tensor in some] for some in (tensors, front))
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    flex = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend=compiler)
    for shift in (0, 1, 9):
        options = {"prefix": tuple(front), "reach": reach_of(400, 64).roll(shift, 0) // (shift + 1)}
        with torch.no_grad():
            heads = by_flex(*tensors, 65, **options, flex=flex)
            expected = by_blocks(*tensors, 65, **options)
        torch.testing.assert_close(heads, expected, rtol=0, atol=1e-12)
    assert len(graphs) == 1


@every_case
def test_blocks_are_those_of_the_mask_of_every_pair(case):
    slots, past, window, persistent, documents = CASES[case]
    reach = reach_of(slots, past) if documents else None
    found = block_mask(slots, past, persistent, window, CPU, reach)
    total = persistent + past + slots
    batch = BATCH if documents else 1
    expected = torch_flex.create_block_mask(found.mask_mod, batch, 1, slots, total, "cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, order = (getattr(found, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        other = getattr(expected, f"{kind}_indices")
        for place in counts.cpu().nonzero().tolist():
            listed = slice(int(counts[tuple(place)]))
            assert torch.equal(order[tuple(place)][listed], other[tuple(place)][listed])


def test_layers_of_a_pass_share_a_mask():
    reach, other = reach_of(300, 0), reach_of(300, 0)
    assert block_mask(300, 0, 2, 70, CPU, reach) is block_mask(300, 0, 2, 70, CPU, reach)
    assert block_mask(300, 0, 2, 70, CPU, reach) is not block_mask(300, 0, 2, 70, CPU, other)
    assert block_mask(300, 0, 2, 70, CPU) is block_mask(300, 0, 2, 70, CPU)
    assert block_mask(300, 0, 2, 70, CPU) is not block_mask(300, 0, 2, 71, CPU)


def test_masks_of_earlier_batches_are_let_go():
    batches = []
    for _ in range(6):
        reach = reach_of(300, 0)
        mask = block_mask(300, 0, 2, 70, CPU, reach)
        batches.append(weakref.ref(mask))
        del reach, mask
    gc.collect()
    assert sum(batch() is not None for batch in batches) <= 2


def test_without_a_gpu_attention_goes_by_blocks():
    tensors, front, reach = given(*CASES["whole blocks"])
    prefix = tuple(front)
    with mock.patch.object(attention_flex, "by_flex", side_effect=AssertionError):
        heads = attend_window(*tensors, 65, prefix=prefix, reach=reach)
    assert torch.equal(heads, by_blocks(*tensors, 65, prefix=prefix, reach=reach))


@pytest.fixture
def pretended_gpu():
    """FlexAttention's plain code taken for kernels of a GPU."""
    chosen = [
        mock.patch.object(attention_flex, "_compile", return_value=by_mask),
        mock.patch.object(attention_flex, "_on_gpu", return_value=True),
    ]
    known = [
        attention_flex._runs,
        attention_flex._compiled,
        attention_flex._say_that_blocks_are_cut,
    ]
    for one in known:
        one.cache_clear()
    for one in chosen:
        one.start()
    yield
    for one in chosen:
        one.stop()
    for one in known:
        one.cache_clear()


def half_wide(case):
    tensors, front, reach = given(*CASES[case], dtype=torch.float32)
    return {"tensors": tensors, "front": front, "reach": reach}


@pytest.mark.usefixtures("pretended_gpu")
def test_kernels_that_agree_with_blocks_are_used_in_training_alone():
    values = half_wide("whole blocks")
    with mock.patch.object(attention_flex, "by_flex", side_effect=by_flex) as flexed:
        heads, gradients = call(attend_window, "whole blocks", **values)
        assert flexed.call_count == 2  # the check, and this
        with torch.no_grad():
            frozen = [tensor.detach() for tensor in values["tensors"]]
            attend_window(*frozen, 65)
        assert flexed.call_count == 2
    expected, expected_gradients = call(by_blocks, "whole blocks", **values)
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-5)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-4)


def wrong(queries, keys, values, block_mask):
    return by_mask(queries, keys, values, block_mask) * 1.1


def broken(queries, keys, values, block_mask):
    raise RuntimeError("out of shared memory")


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    ("kernel", "why"), [(wrong, "off attention by blocks"), (broken, "out of shared memory")]
)
def test_kernels_that_fail_their_check_are_not_used_and_it_is_said_once(kernel, why):
    values = half_wide("whole blocks")
    with mock.patch.object(attention_flex, "_compile", return_value=kernel):
        with pytest.warns(UserWarning, match=why):
            heads, _ = call(attend_window, "whole blocks", **values)
        assert torch.equal(heads, call(attend_window, "whole blocks", **values)[0])
    assert torch.equal(heads, call(by_blocks, "whole blocks", **values)[0])


@pytest.mark.usefixtures("pretended_gpu")
def test_the_check_draws_no_random_number_and_can_be_made_in_a_checkpointed_block():
    tensors, front, reach = given(*CASES["whole blocks"], dtype=torch.float32)
    state = torch.get_rng_state()
    runs = []

    def block(queries, keys, values):
        runs.append(1)
        return attend_window(queries.sin(), keys, values, 65, prefix=tuple(front), reach=reach)

    heads = torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=False)
    assert len(runs) == 1
    heads.sum().backward()
    assert len(runs) == 2
    assert torch.equal(torch.get_rng_state(), state)


def attend_to(slots):
    """Whether FlexAttention attended to so many tokens."""
    tensors = given(slots, 0, 8, 0, False, dtype=torch.float32)[0]
    with mock.patch.object(attention_flex, "by_flex", side_effect=by_flex) as flexed:
        attend_window(*tensors, 8)
    return any(made.args[0] is tensors[0] for made in flexed.call_args_list)  # not the check's


@pytest.mark.usefixtures("pretended_gpu")
def test_each_length_of_whole_blocks_is_compiled_for_whatever_came_before():
    lengths = [128 * count for count in range(1, 11)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert all(attend_to(slots) for slots in [*lengths, *lengths])
    assert attention_flex._compile.call_count == 1 + len(lengths)  # one for the check
    assert ["more than 8 shapes" in str(one.message) for one in said] == [True]


@pytest.mark.usefixtures("pretended_gpu")
def test_other_lengths_go_by_blocks_whatever_came_before_and_it_is_said_once():
    assert attend_to(256)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not any(attend_to(slots) for slots in (100, 300, 100))
    assert ["no multiple of 128" in str(one.message) for one in said] == [True]


def test_torch_counts_what_it_compiles_for_each_shape_by_itself():
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plainly = functools.partial(torch.compile, backend=compiler)
    limit = torch._dynamo.config.patch(recompile_limit=1)
    with mock.patch.object(torch, "compile", plainly), limit, torch.no_grad():
        for slots in (20, 21):
            tensors = [tensor.detach() for tensor in given(slots, 0, 8, 0, False)[0]]
            heads = by_flex(*tensors, 8, flex=attention_flex._compile())
            torch.testing.assert_close(heads, by_blocks(*tensors, 8), rtol=0, atol=1e-12)
    assert len(graphs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_case
def test_compiled_kernels_give_what_blocks_give(case, dtype):
    tensors, front, reach = given(*CASES[case], dtype=dtype, device="cuda")
    exact = [[t.detach().double().requires_grad_() for t in some] for some in (tensors, front)]
    flex = attention_flex._compile()
    heads, gradients = call(by_flex, case, tensors=tensors, front=front, reach=reach, flex=flex)
    expected, expected_gradients = call(
        by_blocks, case, tensors=exact[0], front=exact[1], reach=reach
    )
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for found, wanted in zip((heads, *gradients), (expected, *expected_gradients), strict=True):
        assert float((found.double() - wanted).norm()) < bound * float(wanted.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_takes_compiled_kernels():
    tensors, front, reach = given(*CASES["whole blocks"], dtype=torch.bfloat16, device="cuda")
    with mock.patch.object(attention_flex, "by_blocks", side_effect=by_blocks) as blocks:
        call(attend_window, "whole blocks", tensors=tensors, front=front, reach=reach)
        assert blocks.call_count <= 1  # in the check
