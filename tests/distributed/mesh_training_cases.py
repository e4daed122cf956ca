"""A few steps on any mesh by the trainer's own parts, and the same in one plain process."""

import itertools

import torch
from labelled_links import label_messages

from titans_pretrain import config as run_config
from titans_pretrain.data.loader import Batch
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train import build, optimizer, schedule
from titans_pretrain.train.passes import Passes

STEPS, ROWS, LENGTH, VOCABULARY = 20, 8, 32, 48
VARIANTS = ("lmm", "mac", "mag", "mal")
SIZES = (1, 2, 4)


def meshes(*products):
    """Every (tensor, data, sequence) over SIZES with one of these products."""
    return [
        sizes
        for sizes in itertools.product(SIZES, repeat=3)
        if sizes[0] * sizes[1] * sizes[2] in products
    ]


def configuration(variant, sizes=(1, 1, 1), accumulation=1, **train):
    """A run on a mesh; ``train`` overrides, ``mesh_interleave`` and model fields by prefix."""
    tensor, data, sequence = sizes
    settings = {
        "steps": STEPS,
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS // data // accumulation,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "gradient_clip": 0.5,
        "precision": "fp32",
    }
    mesh = {"tensor": tensor, "sequence": sequence}
    if "interleave" in train:
        mesh["interleave"] = train.pop("interleave")
    model = {
        "variant": variant,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    if variant != "transformer":
        model |= {"memory_heads": 4, "memory_expansion": 2, "chunk_size": 4}
        model |= {"num_persistent_tokens": 2}
    if variant == "mac":
        model["segment_length"] = 8
    if variant in ("mag", "mal"):
        model["window_size"] = 11
    return run_config.resolve(
        {
            "model": model,
            "data": {"manifest": "/nowhere", "sequence_length": LENGTH},
            "mesh": mesh,
            "train": settings | train,
            "run": {"directory": "/nowhere"},
        },
        source="test",
    )


def rows(step):
    """Tokens (ROWS, LENGTH + 1) and a mask that counts few targets of some rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    return tokens, torch.arange(LENGTH) < lengths


def plain_run(config):
    """Losses, norms, gradients of the first step and last weights, without any of the mesh."""
    train = config.train
    model = construct(config.model, train.seed)
    model.train()
    adam = optimizer.build(model, train, optimizer.decayed(model))
    losses, norms, first = [], [], {}
    for step in range(train.steps):
        tokens, mask = rows(step)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        value = (each * mask.flatten()).sum() / mask.sum()
        adam.zero_grad()
        value.backward()
        if not step:
            first = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)))
        for group in adam.param_groups:
            group["lr"] = schedule.learning_rate(step, train)
        adam.step()
        losses.append(value.item())
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    return losses, norms, first, last


def mesh_run(config, sabotage=None):
    """Losses, norms, parts of the first step's gradients and of the last weights of this rank."""
    train, device = config.train, torch.device("cpu")
    tensor, sequence = config.mesh.tensor, config.mesh.sequence
    mesh = Mesh(tensor, devices.ranks() // (tensor * sequence), sequence)
    parallel = Parallel(
        mesh, devices.rank(), activation_checkpointing=train.activation_checkpointing
    )
    engine = build.build_engine(config, parallel, device)
    passes = Passes(engine, parallel, config, device)
    if sabotage:
        sabotage(engine, parallel)
    own = slice(
        parallel.groups.data_rank * ROWS // mesh.data,
        (parallel.groups.data_rank + 1) * ROWS // mesh.data,
    )
    losses, norms, first = [], [], []
    for step in range(train.steps):
        tokens, mask = rows(step)
        valid = int(mask.sum())
        summed = passes.train(Batch(tokens[own], mask[own]), valid)
        total = devices.all_sum(torch.tensor(sum(summed), dtype=torch.float64)).item()
        losses.append(total / mesh.tensor / valid)
        norms.append(engine.gradient_norm())
        if not step:
            first = [part_of(shard) for shard in engine.gradients()]
        engine.step(schedule.learning_rate(step, train))
    last = [part_of(shard) for shard in engine.shards()]
    engine.destroy()
    return losses, norms, first, last


def mesh_runs(configs, sabotage=None):
    """``mesh_run`` of each, on the ranks that are there; messages are checked on the way."""
    label_messages()
    return [mesh_run(config, sabotage) for config in configs]


def part_of(shard):
    window = (shard.offsets or (0,) * len(shard.shape), shard.sizes or shard.shape)
    return shard.name, shard.shape, window, shard.start, shard.stop, shard.tensor.clone()


def assembled(parts, kind):
    """Whole tensors by name from all ranks' parts, and whether parts held twice are equal bits."""
    whole, equal = {}, True
    held = {}
    for name, shape, (offsets, sizes), start, stop, part in parts:
        if not name.startswith(f"{kind}/"):
            continue
        name = name.removeprefix(f"{kind}/")
        key = (name, tuple(offsets), start, stop)
        if key in held:
            equal = equal and torch.equal(held[key], part)
        held[key] = part
        tensor = whole.setdefault(name, torch.full(shape, float("nan")))
        window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        local = tensor[window].reshape(-1)
        local[start:stop] = part
        tensor[window] = local.view(sizes)
    return whole, equal
