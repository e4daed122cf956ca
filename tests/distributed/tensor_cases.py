"""Tiny models of every variant on tensor ranks, and the same in one process."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn import functional

from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel import devices, tensor
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.replay import Replay

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
ROWS, LENGTH, VOCABULARY = 2, 16, 40


def build_model(fields, dtype, lively=True, seed=0):
    """As training starts it, or with weights so large that every parameter, norms too, matters."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "memory_heads": 4,
        "chunk_size": 4,
        "segment_length": 8,
        "window_size": 6,
        "num_persistent_tokens": 2,
        "initializer_range": 0.2 if lively else 0.02,
    }
    model = TitansForCausalLM(TitansConfig(**(values | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * lively * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    weights = torch.rand(ROWS, LENGTH, generator=generator)
    return tokens[:, :-1], tokens[:, 1:], weights / weights.sum()


def in_one_process(fields, dtype=torch.float64, lively=True, seed=0):
    """Logits, losses and gradients of a weighted mean of the losses."""
    model = build_model(fields, dtype, lively, seed)
    ids, targets, weights = batch()
    logits = model(input_ids=ids, use_cache=False).logits
    full = logits if dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view(targets.shape)
    (losses * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), losses.detach(), gradients


@contextlib.contextmanager
def counting():
    """How often each collective is called inside."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, _counted(counts, name)))
        yield counts


def _counted(counts, name):
    real = getattr(dist, name)

    def call(*arguments, **options):
        counts[name] += 1
        return real(*arguments, **options)

    return call


def on_this_rank(
    groups, fields, dtype=torch.float64, lively=True, checkpointing=False, broken=(), seed=0
):
    """The same as ``in_one_process``, of this rank's parts, and what was communicated when.

    Args:
        broken: places whose layers are treated as if they were the same on every rank.
    """
    model = build_model(fields, dtype, lively, seed)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replay = Replay(checkpointing)
    roles = {place: (tensor._ROLES[place][0], tensor._same) for place in broken}
    with mock.patch.dict(tensor._ROLES, roles):
        tensor.split(model, "", groups, replay)
    ids, targets, weights = batch()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    with replay.recording(0), counting() as forward, model.lm_head.answering(targets):
        losses = model(input_ids=ids, use_cache=False).logits[..., 0]
    with replay.recomputing(0), counting() as backward:
        (losses * weights).sum().backward()
    return {
        "logits": logits,
        "losses": losses.detach(),
        "gradients": {
            name: (parameter.grad, tensor.logical(parameter, groups))
            for name, parameter in model.named_parameters()
        },
        "forward": forward,
        "backward": backward,
    }


def on_ranks(mesh, cases):
    """Runs on a rank: the results of all cases, options by name."""
    groups = Groups(mesh, devices.rank())
    return {name: on_this_rank(groups, **options) for name, options in cases.items()}


def joined(results, name):
    """One case's gradients put together from all ranks, and the names of those that are not cut."""
    whole, same = {}, set()
    for result in results:
        for parameter, (gradient, window) in result[name]["gradients"].items():
            into = whole.setdefault(parameter, torch.full(window.shape, torch.nan).to(gradient))
            part = tuple(
                slice(offset, offset + size)
                for offset, size in zip(window.offsets, window.sizes, strict=True)
            )
            into[part] = gradient
            if window.shape == window.sizes:
                same.add(parameter)
    return whole, same


def wrong(results, name, expected, tolerance):
    """The parameters of a case whose gradients are further off than ``tolerance``."""
    whole, _ = joined(results, name)
    assert whole.keys() == expected.keys()
    return {
        parameter
        for parameter, gradient in expected.items()
        if not (whole[parameter] - gradient).abs().max() <= tolerance
    }
