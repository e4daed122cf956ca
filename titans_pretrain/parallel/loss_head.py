"""A head that answers with losses where it is told the targets, and with logits where it is not.

Its module is what runs, in a model's own forward pass, so that whatever is hooked to it, such as
ZeRO's gathering of its weight, happens as ever; only logits of a whole batch never exist.

Shapes: B batch, T time, D width, V vocabulary, R tensor ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.model.causal_lm import CausalLMGenerationMixin
from titans_pretrain.model.layers import full_precision
from titans_pretrain.parallel.linear_cross_entropy import linear_cross_entropy

PROBED = 8  # tokens
PROBE = 1e4  # beyond any bound a model puts on its logits


class Answering(nn.Module):
    """What is added to a linear layer without a bias that gives logits (B, T, V / R)."""

    tp_group: Any = None  # the tensor ranks that share the vocabulary
    targets: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to losses (B, T, 1) while there are targets, else to logits."""
        if self.targets is None:
            logits: Tensor = super().forward(x)
            return logits
        weight: Any = self.weight
        return linear_cross_entropy(x, weight, self.targets, self.tp_group)[..., None]

    @contextmanager
    def answering(self, targets: Tensor) -> Iterator[None]:
        """Answer with the losses of (B, T) token ids in [0, V), in float32 nats or float64."""
        self.targets = targets
        try:
            yield
        finally:
            self.targets = None


class LossHead(Answering, nn.Linear):
    """A whole head."""


def place(unit: nn.Module, name: str) -> None:
    """Make the head in a part of a model, if it is a linear layer, one that can answer with losses.

    Args:
        unit: a part, or a whole model of Hugging Face's kind.
        name: its full name in the model, ``""`` for the whole.
    """
    output: Any = getattr(unit, "get_output_embeddings", lambda: None)
    head = unit if name == "lm_head" else output()
    if type(head) is nn.Linear and head.bias is None:
        head.__class__ = LossHead


def find(model: nn.Module) -> Answering | None:
    """The head that can answer with losses; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, Answering)), None)


def is_passed_on(model: nn.Module, head: Answering, run: Callable[[Tensor], Tensor]) -> bool:
    """Whether what the head gives is what comes out of the model, as it is.

    Some models scale or bound their logits, which would do so to losses. One of this package is
    known not to; another is run once, on a few tokens, with a head that answers with a probe.

    Args:
        model: the head's.
        run: maps ids (1, PROBED) to what comes out, without gradients.
    """
    if isinstance(model, CausalLMGenerationMixin):
        return True
    given: list[Tensor] = []

    def probe(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        like = full_precision(logits[..., :1])
        given.append(torch.linspace(-PROBE, PROBE, like.numel()).to(like).view_as(like))
        return given[-1]

    hook = head.register_forward_hook(probe)
    ids = torch.zeros((1, PROBED), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        out = run(ids)
    except (IndexError, RuntimeError, ValueError):  # it needs logits of its own shape
        return False
    finally:
        hook.remove()
    alike = [out.dtype == one.dtype and torch.equal(out, one) for one in given]
    return alike == [True] and given[0].shape == (1, PROBED, 1)
