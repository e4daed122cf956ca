"""Models that tell documents apart, on a mesh and in one process."""

from unittest import mock

import pytest
import torch
from labelled_links import label_messages
from mesh_training_cases import assembled, configuration, part_of, rows
from tensor_cases import VOCABULARY, build_model

from titans_pretrain.data.loader import Batch
from titans_pretrain.model import fields
from titans_pretrain.parallel import devices, loss_head, sequence_comm, tensor
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train import build, self_check
from titans_pretrain.train.passes import Passes

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
LENGTH = 32
# at the start of a span of 4 and of 2 ranks, inside of spans and chunks, and rows with few
BEGINS = ([3, 8, 16, 17, 30], [13])
KINDS = {
    "attention": {"attend_across_documents": False},
    "memory": {"remember_across_documents": False},
    "both": {"attend_across_documents": False, "remember_across_documents": False},
}


def starts_of(begins, time=LENGTH):
    """Document starts (rows, time) from the columns at which documents begin."""
    columns = torch.arange(time)
    first = torch.stack([torch.isin(columns, torch.tensor([0, *row])) for row in begins])
    return torch.where(first, columns, 0).cummax(1).values


def fitting(variant, changes):
    return {name: x for name, x in changes.items() if not fields.unused(variant, [name])}


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (len(BEGINS), LENGTH + 1), generator=generator)


def model_of(form, checkpointing=False):
    model = build_model({"window_size": 11} | form, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def in_one_process(form):
    """Losses (rows, LENGTH) and gradients of their sum."""
    model, ids = model_of(form), tokens()
    out = model(input_ids=ids[:, :-1], document_starts=starts_of(BEGINS), use_cache=False)
    losses = torch.nn.functional.cross_entropy(out.logits.mT, ids[:, 1:], reduction="none")
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def on_ranks(mesh, cases):
    """Of each case (form, checkpointing): losses, this rank's gradients, spans joined."""
    label_messages()
    found = {}
    for name, (form, checkpointing) in cases.items():
        parallel = Parallel(mesh, devices.rank(), activation_checkpointing=checkpointing)
        join = sequence_comm.join_spans
        with mock.patch.object(sequence_comm, "join_spans", side_effect=join) as joined:
            losses, model = one_step(parallel, form, checkpointing)
        gradients = {
            parameter: (value.grad, tensor.logical(value, parallel.groups))
            for parameter, value in model.named_parameters()
        }
        found[name] = losses, gradients, joined.call_count
    return found


def one_step(parallel, form, checkpointing):
    model = model_of(form, checkpointing)
    parallel.apply(model, "")
    ids, starts = parallel.span(tokens()), parallel.span(starts_of(BEGINS))
    with parallel.replay.recording(0), loss_head.find(model).answering(ids[:, 1:]):
        out = model(input_ids=ids[:, :-1], document_starts=starts, use_cache=False)
    losses = out.logits[..., 0]
    with parallel.replay.recomputing(0):
        losses.sum().backward()
    parallel.links.drain()
    return losses.detach(), model


def whole(mesh, ranks, case):
    """Losses and gradients of a case, put together from all ranks."""
    by_rank = [rank[case] for rank in ranks]
    spans = [by_rank[mesh.tensor * mesh.data * index][0] for index in range(mesh.sequence)]
    gradients = {}
    for _, found, _ in by_rank:
        for name, (gradient, window) in found.items():
            into = gradients.setdefault(name, torch.zeros(window.shape, dtype=torch.float64))
            part = tuple(
                slice(offset, offset + size)
                for offset, size in zip(window.offsets, window.sizes, strict=True)
            )
            if gradient is not None:
                # tensor ranks hold the same gradient of what is not cut
                share = mesh.tensor if window.shape == window.sizes else 1
                into[part] += gradient / share
    return torch.cat(spans, 1), gradients


def input_gradients():
    """By variant, the gradient of the last span's loss by this rank's inputs.

    The last span is one document.
    """
    parallel = Parallel(Mesh(sequence=devices.ranks()), devices.rank())
    return {variant: input_gradient(parallel, variant) for variant in VARIANTS}


def input_gradient(parallel, variant):
    model = model_of({"variant": variant} | fitting(variant, KINDS["both"]))
    parallel.apply(model, "")
    ids = parallel.span(tokens())
    starts = parallel.span(starts_of([[LENGTH // 2]] * len(BEGINS)))
    inputs = model.model.embed_tokens(ids[:, :-1]).detach().requires_grad_()
    with loss_head.find(model).answering(ids[:, 1:]):
        out = model(inputs_embeds=inputs, document_starts=starts, use_cache=False)
    (out.logits.sum() * (parallel.links.ranks["next"] is None)).backward()
    parallel.links.drain()
    return inputs.grad


def run_of(variant, sizes=(1, 1, 1), **train):
    config = configuration(variant, sizes, **train)
    apart = fitting(variant, KINDS["both"])
    return config.model_copy(update={"model": config.model | apart})


def run_batch():
    ids, mask = rows(0)
    generator = torch.Generator().manual_seed(4)
    begins = [torch.randperm(LENGTH, generator=generator)[:row].tolist() for row in range(len(ids))]
    return Batch(ids, mask, starts_of(begins))


def plain_step(config):
    """Mean loss and gradients without any of the mesh."""
    model, batch = construct(config.model, config.train.seed).train(), run_batch()
    out = model(batch.tokens[:, :-1], document_starts=batch.document_starts, use_cache=False)
    losses = torch.nn.functional.cross_entropy(out.logits.mT, batch.tokens[:, 1:], reduction="none")
    value = (losses * batch.target_mask).sum() / batch.target_mask.sum()
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


def trained_step(config):
    """By the trainer's own parts: the mean loss, and this rank's parts of the gradients."""
    label_messages()
    tensor_ranks, sequence = config.mesh.tensor, config.mesh.sequence
    mesh = Mesh(tensor_ranks, devices.ranks() // (tensor_ranks * sequence), sequence)
    checkpointing = config.train.activation_checkpointing
    parallel = Parallel(mesh, devices.rank(), activation_checkpointing=checkpointing)
    self_check.check_mesh(config, parallel, torch.device("cpu"))
    engine = build.build_engine(config, parallel, torch.device("cpu"))
    passes, batch = Passes(engine, parallel, config, torch.device("cpu")), run_batch()
    share = len(batch.tokens) // mesh.data
    own = slice(parallel.groups.data_rank * share, (parallel.groups.data_rank + 1) * share)
    with pytest.raises(ValueError, match="the batch does not tell them"):
        passes.train(Batch(batch.tokens[own], batch.target_mask[own]), 1)
    valid = int(batch.target_mask.sum())
    mine = Batch(batch.tokens[own], batch.target_mask[own], batch.document_starts[own])
    summed = passes.train(mine, valid)
    total = devices.all_sum(torch.tensor(sum(summed), dtype=torch.float64)).item()
    engine.gradient_norm()
    parts = [part_of(shard) for shard in engine.gradients()]
    engine.destroy()
    return total / mesh.tensor / valid, parts


def gradients_of(ranks):
    return assembled([part for _, parts in ranks for part in parts], "gradients")
