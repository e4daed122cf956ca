"""megatron-core's tensor-parallel layers as a Titans model uses them; all of megatron is here.

The layers are given their process group, so that megatron's global state stays unused. Importing
takes seconds, and is left to runs that split layers.

Shapes: B batch, T time, D width, R tensor ranks.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titans_pretrain.parallel.linear_cross_entropy import check_ids
from titans_pretrain.parallel.loss_head import Answering
from titans_pretrain.parallel.tensor_comm import Exchange

with warnings.catch_warnings():
    # it tells of every optional package that is not installed
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        linear_with_grad_accumulation_and_async_allreduce,
        set_tensor_model_parallel_attributes,
    )

# it asks for CUDA_DEVICE_MAX_CONNECTIONS=1, which only orders an overlap
linear_with_grad_accumulation_and_async_allreduce.warned = True

mark: Callable[..., None] = set_tensor_model_parallel_attributes

# layers take over the weights of those they replace
_WITHOUT_WEIGHTS = torch.device("meta")


def _options(group: Any) -> dict[str, Any]:
    """What every layer is made with."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    return {"config": config, "init_method": nn.Identity(), "tp_group": group}


class _Named:
    """Parameters under their own names only: megatron's linear layers add an empty extra entry."""

    get_extra_state: ClassVar[Any] = nn.Module.get_extra_state
    set_extra_state: ClassVar[Any] = nn.Module.set_extra_state


class Column(_Named, ColumnParallelLinear):
    """A linear layer with this rank's share of the outputs.

    Args:
        linear: the layer it takes the place of.
        group: the tensor ranks.
        sums_gradient: whether the input's gradient is summed over ranks here, and not where the
            input entered.
    """

    def __init__(self, linear: nn.Linear, group: Any, *, sums_gradient: bool = False) -> None:
        with _WITHOUT_WEIGHTS:
            super().__init__(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                gather_output=False,
                disable_grad_reduce=not sums_gradient,
                **_options(group),
            )
        self._load_state_dict_pre_hooks.clear()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) to (B, T, out / R)."""
        output: Tensor = super().forward(x)[0]
        return output


class Head(Answering, Column):
    """A head with this rank's share of the vocabulary: its logits, or losses of the whole.

    Args:
        linear: the layer it takes the place of, without a bias.
        group: the tensor ranks.
    """

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__(linear, group, sums_gradient=True)


class Row(_Named, RowParallelLinear):
    """A linear layer with this rank's share of the inputs; the outputs are summed.

    A recomputation multiplies again, as what it saves must be the same, but does not sum again.

    Args:
        linear: the layer it takes the place of.
        exchange: sums the outputs.
    """

    def __init__(self, linear: nn.Linear, exchange: Exchange) -> None:
        with _WITHOUT_WEIGHTS:
            super().__init__(
                linear.in_features,
                linear.out_features,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                **_options(exchange.group),
            )
        self._load_state_dict_pre_hooks.clear()
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in / R) to (B, T, out)."""
        partial = linear_with_grad_accumulation_and_async_allreduce(
            x,
            self.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        return self.exchange.total(partial)


class Embedding(VocabParallelEmbedding):
    """An embedding with this rank's share of the vocabulary; refuses ids outside of it all.

    Args:
        embedding: the layer it takes the place of.
        group: the tensor ranks.
    """

    def __init__(self, embedding: nn.Embedding, group: Any) -> None:
        with _WITHOUT_WEIGHTS:
            super().__init__(embedding.num_embeddings, embedding.embedding_dim, **_options(group))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, D)."""
        check_ids(ids, self.num_embeddings)
        embedded: Tensor = super().forward(ids)
        return embedded
