"""megatron-core's tensor-parallel layers as a Titans model uses them; all of megatron is here.

The layers are given their process group, so that megatron's global state stays unused. Importing
takes seconds, and is left to runs that split layers.

Shapes: B batch, T time, D width, V vocabulary, R tensor ranks.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

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
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

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
        _check_ids(ids, self.num_embeddings)
        embedded: Tensor = super().forward(ids)
        return embedded


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """An id no rank holds would count as zeros. On a GPU this does not wait for the result."""
    known = ((ids >= 0) & (ids < vocabulary)).all()
    torch._assert_async(known, f"token ids outside of [0, {vocabulary})")


class CrossEntropy(Function):
    """Loss of each target from logits split by vocabulary, in float32 (float64 stays).

    megatron's own function of 0.16 finds its group in global state; this one is made of the same
    parts, with a given group.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Any) -> Tensor:
        """(B, T, V / R) logits of this rank and (B, T) token ids to (B, T) losses."""
        share = logits.shape[-1]
        first = group.rank() * share
        _check_ids(targets, share * group.size())
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # a copy, as the parts below overwrite it
        full = logits.to(dtype, copy=True, memory_format=torch.contiguous_format)
        largest = full.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        elsewhere, columns, predicted, denominator, exponentials = (
            VocabParallelCrossEntropy.calculate_predicted_logits(
                full, targets, largest, first, first + share
            )
        )
        both = torch.stack([predicted, denominator])
        dist.all_reduce(both, group=group)
        softmax, losses = VocabParallelCrossEntropy.calculate_cross_entropy_loss(
            exponentials, *both
        )
        ctx.dtype = logits.dtype
        ctx.save_for_backward(softmax, elsewhere, columns)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Once only: the saved softmax becomes the gradient."""
        softmax, elsewhere, columns = ctx.saved_tensors
        by_token, rows, here, gradient = (
            VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, elsewhere)
        )
        gradient = VocabParallelCrossEntropy.calculate_gradients(
            by_token, rows, columns, here, gradient, grads[0]
        )
        return gradient.to(ctx.dtype), None, None
