"""Documents told apart on a mesh: losses and gradients are those of one process."""

import functools

import document_mesh_cases as cases
import pytest
import torch
from ranks import run_ranks

from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.train import self_check

FORMS = {
    f"{variant}, {kind}": {"variant": variant} | changes
    for variant in cases.VARIANTS
    for kind, changes in cases.KINDS.items()
    if changes == cases.fitting(variant, changes)
} | {"mac, gates per chunk": {"variant": "mac", "gate_per": "chunk"} | cases.KINDS["both"]}
FULLY = ["lmm, memory", "mac, both", "mag, both", "mal, both", "transformer, attention"]
MESHES = {
    "sequence 2": (Mesh(sequence=2), [*FORMS]),
    "sequence 4": (Mesh(sequence=4), FULLY),
    "tensor 2": (Mesh(tensor=2), FULLY),
}
expected = functools.cache(lambda form: cases.in_one_process(FORMS[form]))


def recomputed(form):
    return f"{form}, checkpointing"


@functools.cache
def results(name):
    """Of a mesh's forms, some with recomputed blocks too; the ranks are started once."""
    mesh, forms = MESHES[name]
    tried = {form: (FORMS[form], False) for form in forms}
    tried |= {recomputed(form): (FORMS[form], True) for form in FULLY}
    return run_ranks(cases.on_ranks, mesh.ranks, mesh, tried, timeout=240)


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for name, (_, forms) in MESHES.items() for form in forms]
)
def test_a_mesh_gives_the_losses_and_gradients_of_one_process(form, name):
    losses, gradients = expected(form)
    for case in [form, recomputed(form)] if form in FULLY else [form]:
        found, pulled = cases.whole(MESHES[name][0], results(name), case)
        torch.testing.assert_close(found, losses, rtol=0, atol=1e-11)
        for parameter, gradient in gradients.items():
            bound = 1e-10 * max(1.0, float(gradient.abs().max()))
            error = (pulled[parameter] - gradient).abs().max()
            assert error <= bound, f"{case}: {parameter} is off by {error:.2e}"


def test_the_ranks_of_a_sequence_tell_their_documents_once_in_all_layers_and_recomputations():
    for rank in results("sequence 2"):
        assert rank["transformer, attention"][2] == 1
        assert rank[recomputed("transformer, attention")][2] == 1


def test_a_span_that_begins_with_a_document_sends_back_a_zero_gradient():
    first, last = run_ranks(cases.input_gradients, 2)
    for variant in cases.VARIANTS:
        assert float(last[variant].abs().max()) > 1e-6
        assert not first[variant].any(), variant


def test_the_trainers_own_passes_tell_the_documents_to_sequence_and_data_ranks():
    config = cases.run_of("mac", (1, 2, 2), accumulation=2, activation_checkpointing=True)
    loss, gradients = cases.plain_step(config)
    found = run_ranks(cases.trained_step, 4, config, timeout=240)
    assert [value for value, _ in found] == pytest.approx([loss] * 4, abs=1e-6)
    pulled, _ = cases.gradients_of(found)
    for name, gradient in gradients.items():
        torch.testing.assert_close(pulled[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sequence", [2, 4])
def test_in_the_check_at_the_start_spans_begin_with_a_document_on_every_data_rank(sequence):
    mesh = Mesh(data=2, sequence=sequence)
    values = self_check.tiny_fields(cases.run_of("mac").model, mesh)
    starts = self_check._starts(values, self_check._tokens(values, mesh))
    firsts = torch.arange(self_check.SPAN, starts.shape[1], self_check.SPAN)
    begins = starts[:, firsts] == firsts
    assert begins.unflatten(0, (mesh.data, -1)).any(1).all()
    assert not begins.all()
