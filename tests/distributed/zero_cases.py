"""Tiny models trained by a ZeRO engine on a mesh, and by plain PyTorch in one process."""

import torch
import torch.nn.functional as F

from titans_pretrain.config import TrainSection
from titans_pretrain.parallel import devices, zero, zero_settings
from titans_pretrain.parallel.construct import construct, skeleton
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.wavefront import order
from titans_pretrain.train import loss, optimizer, schedule

STEPS, BATCH, LENGTH, VOCABULARY = 20, 8, 16, 48


def settings(**changes):
    values = {
        "steps": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": 1,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "gradient_clip": 0.5,
        "precision": "fp32",
    }
    return TrainSection(**(values | changes))


def fields(variant="mac", **changes):
    values = {
        "variant": variant,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "memory_heads": 2,
        "chunk_size": 4,
        "segment_length": 4,
        "window_size": 5,
        "num_persistent_tokens": 2,
    }
    return values | changes


def batch(step):
    """Tokens (BATCH, LENGTH + 1) and a mask that counts few targets of some rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
    return tokens, torch.arange(LENGTH) < lengths


def plain_loss(model, step):
    tokens, mask = batch(step)
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.token_loss_sum(losses.view(mask.shape), mask) / mask.sum()


def plain_losses(train, **form):
    model = construct(fields(**form), 0)
    adam = optimizer.build(model, train, optimizer.decayed(model))
    losses, norms = [], []
    for step in range(train.steps):
        value = plain_loss(model, step)
        adam.zero_grad()
        value.backward()
        bound = train.gradient_clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), bound)))
        for group in adam.param_groups:
            group["lr"] = schedule.learning_rate(step, train)
        adam.step()
        losses.append(value.item())
    return losses, norms


def engine_for(train, form=None, tensor=1, sequence=1):
    mesh = Mesh(tensor, devices.ranks() // (tensor * sequence), sequence)
    checkpointing = train.activation_checkpointing
    parallel = Parallel(mesh, devices.rank(), activation_checkpointing=checkpointing)
    form = fields(**(form or {}))
    model = construct(form, 0, parallel, zero_settings.partitioner(train, parallel.groups))
    adam = optimizer.build(model, train, optimizer.decayed(skeleton(form)))
    return zero.ZeroEngine(model, adam, train, parallel, torch.device("cpu")), parallel


def passes(engine, parallel, train, step, interleaved=True):
    """All forward and backward passes of a step; the global loss."""
    tokens, mask = batch(step)
    mesh, groups, rows = parallel.mesh, parallel.groups, train.micro_batch_size
    first = groups.data_rank * (BATCH // mesh.data)
    valid, total = int(mask.sum()), torch.zeros((), dtype=torch.float64)
    summed = {}
    count = mesh.accumulation(train)
    for kind, micro in order(groups.sequence_rank, mesh.sequence, count, interleaved=interleaved):
        part = slice(first + micro * rows, first + (micro + 1) * rows)
        span, counted = parallel.span(tokens[part]), parallel.span(mask[part])
        if kind == "forward":
            losses = engine.losses(span[:, :-1], span[:, 1:], micro)
            summed[micro] = loss.token_loss_sum(losses, counted)
            total += summed[micro].item() / mesh.tensor
        else:
            engine.backward(loss.rank_loss(summed.pop(micro), valid, mesh.data), micro)
    return devices.all_sum(total).item() / valid


def engine_step(engine, parallel, train, step, interleaved=True):
    value = passes(engine, parallel, train, step, interleaved)
    return value, engine.step(schedule.learning_rate(step, train))


def sharded_losses(train, form=None, mesh=None):
    engine, parallel = engine_for(train, form, **(mesh or {}))
    interleaved = (form or {}).get("variant") != "transformer"
    return [engine_step(engine, parallel, train, step, interleaved) for step in range(train.steps)]


def same_state(one, other):
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(one, other, strict=True))
