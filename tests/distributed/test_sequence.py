"""Sequences cut into spans over ranks: states, halos and their gradients against one process."""

import pytest
import torch
from labelled_links import label_messages
from ranks import run_ranks

from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel import devices, sequence, sequence_comm
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
ROWS, LENGTH, VOCABULARY = 2, 32, 40


def build_model(variant, **changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "memory_heads": 2,
        "chunk_size": 4,
        "segment_length": 4,
        "window_size": 6,
        "num_persistent_tokens": 2,
        "initializer_range": 0.2,
    }
    config = TitansConfig(variant=variant, **(fields | changes))
    return TitansForCausalLM(config).double()


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)


def span_losses(model, part):
    logits = model(input_ids=part[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
    ).view(part.shape[0], -1)


def gradients_in_one_process(variant, first, form):
    """Losses (rows, LENGTH) and gradients of the sum of those from column ``first`` on."""
    model = build_model(variant, **form)
    model.train()
    losses = span_losses(model, tokens())
    losses[:, first:].sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def gradients_of_spans(variant, last_only, checkpointing, form):
    """This rank's losses, and the gradients summed over ranks."""
    label_messages()
    mesh = Mesh(sequence=devices.ranks())
    parallel = Parallel(mesh, devices.rank(), activation_checkpointing=checkpointing)
    model = build_model(variant, **form)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parallel.apply(model, "")
    with parallel.replay.recording(0):
        losses = span_losses(model, parallel.span(tokens()))
    counted = not last_only or parallel.links.ranks["next"] is None
    sent = sum(parallel.links.bytes_sent.values())
    with parallel.replay.recomputing(0):
        (losses.sum() * float(counted)).backward()
    parallel.links.drain()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = devices.all_sum(gradient.clone())
    return losses.detach(), found, sent, sum(parallel.links.bytes_sent.values())


def compare(variant, count, *, last_only=False, checkpointing=False, **form):
    span = LENGTH // count
    first = LENGTH - span if last_only else 0
    losses, expected = gradients_in_one_process(variant, first, form)
    results = run_ranks(gradients_of_spans, count, variant, last_only, checkpointing, form)
    joined = torch.cat([result[0] for result in results], 1)
    torch.testing.assert_close(joined, losses, rtol=0, atol=1e-11)
    for _, found, *_ in results:
        for name, gradient in expected.items():
            gradient = torch.zeros_like(found[name]) if gradient is None else gradient
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
    return results


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_spans_give_the_losses_and_gradients_of_whole_sequences(variant, count):
    compare(variant, count)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_on_the_last_span_alone_reaches_the_first_as_in_one_process(variant, count):
    compare(variant, count, last_only=True)


def input_gradient(variant):
    """Gradient of the last span's loss by this rank's embedded inputs."""
    parallel = Parallel(Mesh(sequence=devices.ranks()), devices.rank())
    model = build_model(variant)
    model.train()
    parallel.apply(model, "")
    part = parallel.span(tokens())
    inputs = embedded(model, part[:, :-1])
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="sum")
    (losses * (parallel.links.ranks["next"] is None)).backward()
    parallel.links.drain()
    return inputs.grad


def embedded(model, ids):
    return model.model.embed_tokens(ids).detach().requires_grad_()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_spans_inputs_get_the_last_spans_gradient(variant, count):
    model = build_model(variant)
    model.train()
    inputs = embedded(model, tokens()[:, :-1])
    losses = torch.nn.functional.cross_entropy(
        model(inputs_embeds=inputs, use_cache=False).logits.mT, tokens()[:, 1:], reduction="none"
    )
    losses[:, LENGTH - LENGTH // count :].sum().backward()
    found = run_ranks(input_gradient, count, variant)
    assert float(found[0].abs().max()) > 1e-6
    torch.testing.assert_close(torch.cat(found, 1), inputs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_blocks_do_not_communicate_again(variant):
    plain = compare(variant, 2)
    recomputed = compare(variant, 2, checkpointing=True)
    for (*_, forward, both), (*_, forward_again, both_again) in zip(plain, recomputed, strict=True):
        assert (forward, both) == (forward_again, both_again)


FORMS = {
    "windows longer than a span": {"window_size": 14},
    "windows longer than two spans": {"window_size": 20},
    "a convolution wider than a span": {"conv_width": 12, "chunk_size": 2, "segment_length": 2},
    "no convolution": {"conv_width": 0},
    "a convolution of one": {"conv_width": 1},
    "one gate a chunk": {"gate_per": "chunk"},
    "three layers of memory": {"memory_depth": 3},
    "a linear memory": {"memory_depth": 1},
    "spans of one chunk": {"chunk_size": 8, "segment_length": 8},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "no momentum and no forgetting": {"use_momentum": False, "use_forgetting": False},
    "untied embeddings": {"tie_word_embeddings": False},
}
USED = {"windows longer than a span": "mag mal", "windows longer than two spans": "mag mal"}


@pytest.mark.parametrize(
    ("form", "variant"),
    [
        (form, variant)
        for index, form in enumerate(FORMS)
        for variant in USED.get(form, ("lmm mac", "mac mag")[index % 2]).split()
    ],
)
def test_every_form_of_model_can_be_cut(form, variant):
    changes = dict(FORMS[form])
    if variant != "mac":
        changes.pop("segment_length", None)
    compare(variant, 4, **changes)


def gradients_without(sabotage, variant):
    sabotage()
    return gradients_of_spans(variant, True, False, {})


def cut_state_gradients():
    receive = sequence_comm.Links.receive

    def nothing_comes_back(self, side, name, like):
        received = receive(self, side, name, like)
        cut = side == "next" and name.endswith(".state")
        return tuple(tensor * 0 for tensor in received) if cut else received

    sequence_comm.Links.receive = nothing_comes_back


def cut_halo_gradients():
    sequence._add_to_last = lambda tensor, addend, dim: tensor


@pytest.mark.parametrize(
    ("sabotage", "variant"), [(cut_state_gradients, "lmm"), (cut_halo_gradients, "mag")]
)
def test_a_gradient_that_does_not_come_back_is_seen(sabotage, variant):
    _, expected = gradients_in_one_process(variant, LENGTH // 2, {})
    (_, found, *_), _ = run_ranks(gradients_without, 2, sabotage, variant)
    wrong = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert wrong > 1e-6


def gradients_with_other_order():
    send = sequence_comm.Links.send
    held = []

    def swapped(self, side, name, tensors):
        held.append((name, tensors))
        if len(held) == 2:
            for one in reversed(held):
                send(self, side, *one)
            held.clear()

    sequence_comm.Links.send = swapped
    gradients_of_spans("lmm", False, False, {})


def test_messages_in_another_order_are_seen_by_the_labels_of_these_tests():
    with pytest.raises(AssertionError, match="wanted"):
        run_ranks(gradients_with_other_order, 2)
