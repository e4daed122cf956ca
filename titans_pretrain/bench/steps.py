"""A whole model's training step as a contender; built in a process of its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.bench.ceilings import DTYPES
from titans_pretrain.model.layers import full_precision
from titans_pretrain.parallel import loss_head
from titans_pretrain.parallel.construct import construct
from titans_pretrain.train import kernels


def build(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """Pass ``training``: forward, loss of every next token, backward; gradients made anew.

    Args:
        options: ``model`` (resolved fields, or another library's keys), ``length``, ``rows``,
            ``checkpointing``, ``memory_kernels``, ``device``, ``dtype``.

    Raises:
        UserError, TitansError: see ``kernels.choose``.
    """
    device, dtype = torch.device(options["device"]), DTYPES[options["dtype"]]
    model = construct(options["model"], 0)
    model.to(device=device, dtype=dtype)
    kernels.choose(model, options["memory_kernels"], options["dtype"], device)
    model.train()
    if options["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    shape = options["rows"], options["length"] + 1
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)

    losses = _losses(model)

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    def training() -> None:
        forget()
        losses(tokens[:, :-1], tokens[:, 1:]).mean().backward()

    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    return facts, {"training": training, "forget": forget}


def _losses(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Maps inputs and targets (B, T) to losses, as the trainer does: by the head where it can."""

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    loss_head.place(model, "")
    head = loss_head.find(model)
    with torch.no_grad():
        answers = head is not None and loss_head.is_passed_on(model, head, logits)

    def losses(ids: Tensor, targets: Tensor) -> Tensor:
        if head is None or not answers:
            flat = full_precision(logits(ids)).flatten(0, 1)
            return F.cross_entropy(flat, targets.flatten(), reduction="none")
        with head.answering(targets):
            return logits(ids)

    return losses
