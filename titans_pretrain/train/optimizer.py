"""AdamW with weight decay on the matrices of projections only."""

from collections.abc import Collection

import torch
from torch import nn

from titans_pretrain.config import TrainSection


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that decay: the weights of plain ``nn.Linear`` layers.

    Norms, biases, embeddings, convolutions, persistent tokens, the memory's initial weights and
    its gates (a subclass of ``nn.Linear``) do not decay, nor does a head that is tied to the
    embedding.

    Args:
        model: as it is before a mesh is applied, which replaces its layers; may be on meta.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    linear = {
        id(module.weight)
        for module in model.modules()
        if type(module) is nn.Linear and id(module.weight) not in embeddings
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in linear}


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that decay in another library's model, whose layers are not known.

    Those called ``weight`` with two axes, and those called ``…_proj`` with three: projections, and
    those of all experts of a mixture in one. Norms, biases, convolutions and what a recurrence
    calls by a name of its own (``A_log``) do not decay, nor do embeddings, nor a head that is tied
    to one.

    Args:
        model: may be on meta.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if (name.endswith(".weight") and parameter.dim() == 2 and id(parameter) not in embeddings)
        or (name.endswith("_proj") and parameter.dim() == 3)
    }


def build(model: nn.Module, train: TrainSection, matrices: Collection[str]) -> torch.optim.AdamW:
    """AdamW in two groups, with and without decay.

    Args:
        model: whose parameters are optimized.
        train: the optimization.
        matrices: names of the parameters that decay, see ``decayed`` and ``matrices``.

    Raises:
        ValueError: a name is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(matrices) - parameters.keys()):
        raise ValueError(f"no parameters: {', '.join(unknown)}")
    groups = [
        ([p for name, p in parameters.items() if name in matrices], train.weight_decay),
        ([p for name, p in parameters.items() if name not in matrices], 0.0),
    ]
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for members, decay in groups if members],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
    )
