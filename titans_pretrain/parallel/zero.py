"""DeepSpeed ZeRO-3 behind a small interface.

DeepSpeed ignores unknown settings, skips steps and averages over the wrong ranks without a word,
so its settings are made and checked in ``zero_settings``, and the first step of every process is
verified in ``first_step``. Only these three modules know DeepSpeed's insides.

Per step: forward and backward of every micro-batch, in any order in which a backward pass follows
its forward pass; then ``gradient_norm``; then ``step`` or ``discard``.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError
from titans_pretrain.model.layers import full_precision
from titans_pretrain.parallel import loss_head, tensor
from titans_pretrain.parallel.first_step import FirstStepProbe
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.shards import FlatShard
from titans_pretrain.parallel.zero_settings import (
    DataParallelUnit,
    check_groups,
    check_settings,
    check_taken,
    check_unit,
    deepspeed_settings,
    import_deepspeed,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ELEMENTS = 1 << 20
SUM_ELEMENTS = 1 << 26  # of gradients on the host that are summed at once


class ZeroEngine:
    """A model whose parameters, gradients and Adam moments are sharded over the data ranks.

    Gradients are averaged over data ranks and summed over sequence ranks: a rank's loss is its
    share of the global loss times the number of data ranks (``train/loss.py``). Each optimizer
    step takes ``mesh.accumulation(train)`` micro-batches.

    Args:
        model: a Hugging Face causal language model in float32, with equal weights on every rank;
            or one that ``construct`` has sharded already.
        optimizer: AdamW over the model's parameters.
        train: the optimization.
        parallel: the mesh, applied to the model already.
        device: where this rank computes.

    Raises:
        TitansError: DeepSpeed did not do as planned.
    """

    _backwards: int
    _norm: float | None
    _tracing: bool
    _seen_own: bool

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        train: TrainSection,
        parallel: Parallel,
        device: torch.device,
    ) -> None:
        self._parallel, self._groups, self._device = parallel, parallel.groups, device
        self._mesh = self._groups.mesh
        self._accumulation = self._mesh.accumulation(train)
        if train.activation_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        settings = deepspeed_settings(train, self._mesh, elements)
        check_settings(settings)
        unit = DataParallelUnit(self._groups)
        check_unit(unit)
        deepspeed = import_deepspeed()
        _gather_by_block(model)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config=copy.deepcopy(settings),
            mpu=unit,
            dist_init_required=False,
        )
        self._parameters: dict[str, Any] = dict(self._engine.module.named_parameters())
        self._head = loss_head.find(model)
        self._head_is_known = False
        check_taken(settings, self._engine)
        check_groups(self._parameters, unit.get_data_parallel_group_ranks())
        self._own_steps()
        self._create_moments()
        self._counted = [self._gradients[start:stop] for start, stop in self._counted_ranges()]
        self._begin_step()
        self._probe: FirstStepProbe | None = FirstStepProbe(self, fresh=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        micro_batch: int = 0,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (batch, time, vocabulary / tensor ranks) of token ids (batch, time).

        Args:
            input_ids: this rank's span.
            micro_batch: which of the step's; its backward pass must name the same.
            document_starts: of the span's tokens, for a model that separates documents: the column
                in its whole row of the first token of each token's document.
        """
        training = self._engine.module.training and torch.is_grad_enabled()
        if not (training and self._tracing):
            self._coordinator.reset_step()
            self._tracing = training
        with torch.set_grad_enabled(training), self._place("forward", micro_batch, training):
            told = {} if document_starts is None else {"document_starts": document_starts}
            out = self._engine(input_ids=input_ids, use_cache=False, **told)
        logits: torch.Tensor = out.logits
        return logits

    def losses(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        micro_batch: int = 0,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of every target, (batch, time), in float32 nats (float64 of such a model).

        The head computes them, over chunks of tokens; logits exist only in a model that changes
        them after its head, or has a head that is more than a matrix.

        Args:
            targets: (batch, time) token ids in [0, vocabulary).
            input_ids, micro_batch, document_starts: see ``forward``.
        """
        head = self._loss_head()
        if head is not None:
            with head.answering(targets):
                return self.forward(input_ids, micro_batch, document_starts)[..., 0]
        logits = full_precision(self.forward(input_ids, micro_batch, document_starts))
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape)

    def train(self, mode: bool = True) -> None:
        """Train mode, or evaluation."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor, micro_batch: int = 0) -> None:
        """Add the gradients of one micro-batch's loss."""
        if self._backwards == self._accumulation:
            raise TitansError(f"more than {self._accumulation} micro-batches before a step")
        # DeepSpeed counts micro-batches in forward, which may come before another one's backward.
        self._zero.clear_backward_seen_flag()
        self._zero.micro_step_id = self._backwards
        with self._place("backward", micro_batch, True):
            self._engine.backward(loss, scale_wrt_gas=False)
        self._backwards += 1

    def gradient_norm(self) -> float:
        """Reduce the step's gradients fully; the global norm before clipping, inf if not finite.

        Every element counts once, whatever ranks hold it. The same on all ranks, to the last bit.

        Raises:
            TitansError: micro-batches are missing, or the first step failed its check.
        """
        if self._norm is None:
            if self._backwards != self._accumulation:
                raise TitansError(
                    f"{self._backwards} of {self._accumulation} micro-batches at a step"
                )
            self._parallel.links.drain()
            self._sum_over_sequence()
            if self._probe:
                self._probe.check_gradient()
            self._norm = self._global_norm()
        return self._norm

    def step(self, learning_rate: float) -> float:
        """Update the parameters; returns ``gradient_norm()``.

        A norm that is not finite means that nothing has changed.

        Raises:
            TitansError: see ``gradient_norm``.
        """
        norm = self.gradient_norm()
        if norm == float("inf"):
            self.discard()
            return norm
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed clips by it: a norm of its own could differ from rank to rank in its last bit,
        # and drive replicas apart.
        self._zero._get_norm_groups = lambda: [torch.tensor(norm)]
        self._zero.step()
        self._begin_step()
        if self._probe:
            self._probe.check_update(learning_rate)
            self._probe = None
        return norm

    def discard(self) -> None:
        """Forget the step's gradients; parameters, moments and Adam's step stay as they are."""
        self.gradient_norm()
        self._forget_step()
        self._gather_persistent()
        if self._probe:
            self._probe.remove()
            self._probe = FirstStepProbe(self, fresh=self._probe.fresh)

    def gradients(self) -> list[FlatShard]:
        """This rank's parts of the reduced gradients, float32; from ``gradient_norm`` to a step."""
        if self._norm is None:
            raise ValueError("the gradients are not reduced yet: call gradient_norm() first")
        return [self.part("gradients", name) for name in self._parameters]

    def own_gradient_finite(self) -> bool:
        """Whether the gradients this rank itself had in the newest step, unreduced, were finite."""
        return bool(torch.isfinite(self._own_sum))

    def shards(self) -> list[FlatShard]:
        """This rank's parts of parameters and moments: float32 views of the live state."""
        return [
            self.part(kind, name) for name in self._parameters for kind in ("parameters", *MOMENTS)
        ]

    def restore(self, step: int) -> None:
        """Go on from state that was read into ``shards()``.

        Args:
            step: optimizer steps it has behind it.
        """
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(step)
        self._forget_step()
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            # The working copy follows the float32 master only after a step.
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()
        if self._probe:
            self._probe.remove()
        self._probe = FirstStepProbe(self, fresh=step == 0)

    def part(self, kind: str, name: str) -> FlatShard:
        """This rank's part of one tensor, a view of the live one.

        Args:
            kind: ``"parameters"``, ``"exp_avg"``, ``"exp_avg_sq"`` or ``"gradients"``.
            name: of the parameter.
        """
        parameter = self._parameters[name]
        group, first, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        if kind == "gradients":
            whole = self._gradient_groups[group]
        else:
            whole = flat if kind == "parameters" else self._zero.optimizer.state[flat][kind]
        elements = parameter.ds_numel
        start = min(self._groups.data_rank * size, elements)
        stop = min(start + size, elements)
        part = whole.detach()[first : first + stop - start]
        shape, offsets, sizes = tensor.logical(parameter, self._groups)
        return FlatShard(f"{kind}/{name}", shape, start, stop, part, offsets, sizes)

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the model and let go of its buffers."""
        if self._probe:
            self._probe.remove()
        for hook in self._own_hooks:
            hook.remove()
        self._engine.destroy()

    def _loss_head(self) -> loss_head.Answering | None:
        """The head if its answers come out as they are; found out before the first losses."""
        if self._head is not None and not self._head_is_known:
            self._head_is_known = True
            with torch.no_grad():
                if not loss_head.is_passed_on(self._engine.module, self._head, self.forward):
                    self._head = None
        return self._head

    def _own_steps(self) -> None:
        """Take over what DeepSpeed would do by counting forward passes."""
        from deepspeed.runtime.zero import partitioned_param_coordinator

        self._engine.set_gradient_accumulation_boundary(False)  # ``step`` is the boundary
        # One trace a step, not a forward pass: passes of other micro-batches may lie between.
        self._zero.parameter_offload.fwd_pre_hook.remove()
        self._coordinator = self._zero.parameter_offload.get_param_coordinator()
        # DeepSpeed compares with global rank 0; sequence ranks rightly differ from each other.
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = functools.partial(
            check_same_trace, self._groups.data
        )
        self._gradients: torch.Tensor = self._zero.grad_partitions_flat_buffer
        sizes = [flat.numel() for flat in self._zero.fp32_partitioned_groups_flat]
        self._gradient_groups = self._gradients.split(sizes)
        if self._zero.offload_optimizer:
            for flat, part in zip(
                self._zero.fp32_partitioned_groups_flat, self._gradient_groups, strict=True
            ):
                flat.grad = part  # where DeepSpeed would copy it to at a boundary
        self._own_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        self._own_hooks = [
            parameter.register_hook(self._add_own) for parameter in self._parameters.values()
        ]

    def _add_own(self, gradient: torch.Tensor) -> None:
        """One read of a gradient, without waiting for the device."""
        if not self._backwards and not self._seen_own:
            self._own_sum.zero_()
            self._seen_own = True
        self._own_sum += gradient.sum(dtype=torch.float32)

    def _forget_step(self) -> None:
        """What DeepSpeed does at a norm that is not finite, without its warning.

        All parameters are given up, as those that are gathered would keep their old values.
        """
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero._overflow_clean_up(None)
        self._begin_step()

    def _begin_step(self) -> None:
        self._gradients.zero_()  # a parameter may have no gradient on this rank
        self._backwards = 0
        self._norm = None
        self._tracing = self._seen_own = False

    def _create_moments(self) -> None:
        """Adam's state now instead of at the first step, so that it can be restored into."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self._zero.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)

    def _counted_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the gradient buffer that this rank counts in the norm.

        Sequence ranks hold the same gradients, tensor ranks those of parameters not split.
        """
        ranges: list[tuple[int, int]] = []
        if self._groups.sequence_rank:
            return ranges
        stop = 0
        for group in self._zero.fp16_groups:
            for parameter in group:
                start, stop = stop, stop + parameter.partition_numel()
                split = getattr(parameter, "tensor_model_parallel", False)
                if not (split or self._groups.tensor_rank == 0):
                    continue
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, stop))
        return ranges

    def _sum_over_sequence(self) -> None:
        """THE reduction over sequence ranks: once a step, of the gradients as sharded.

        Those on the host are summed on the device, as ranks exchange host tensors slowly.
        """
        if self._mesh.sequence == 1:
            return
        parts = self._gradients.split(SUM_ELEMENTS)
        for part in parts if self._zero.offload_optimizer else (self._gradients,):
            summed = part.to(self._device)
            dist.all_reduce(summed, group=self._groups.sequence)
            part.copy_(summed)

    def _global_norm(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._gradients.device)
        for part in self._counted:
            whole = part.numel() // NORM_ELEMENTS * NORM_ELEMENTS
            for rows in (part[:whole].view(-1, NORM_ELEMENTS), part[None, whole:]):
                total += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        dist.all_reduce(total)
        norm = float(total.sqrt().float())
        return norm if norm < float("inf") else float("inf")

    def _gather_persistent(self) -> None:
        """Small parameters stay gathered; DeepSpeed does so after a step of its own."""
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @contextlib.contextmanager
    def _place(self, phase: str, micro_batch: int, training: bool) -> Iterator[None]:
        """Tell the watch where the rank is, and what a recomputed block received in forward."""
        if not training:
            yield
            return
        replay = self._parallel.replay
        kept = replay.recording if phase == "forward" else replay.recomputing
        self._parallel.whereabouts.enter(phase, micro_batch=micro_batch)
        with kept(micro_batch):
            yield


def check_same_trace(group: Any, trace: Sequence[int]) -> None:
    """Refuse ranks that walk the model in different orders: their gathers would be mixed up.

    Raises:
        TitansError: on all ranks of the group alike.
    """
    traces: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(traces, list(trace), group=group)
    if any(other != traces[0] for other in traces):
        raise TitansError(
            "the ranks that shard the parameters together call the model's layers in different "
            f"orders: {', '.join(str(len(other)) for other in traces)} calls",
            where=f"check of the first steps, ranks {dist.get_process_group_ranks(group)}",
            fix="give all data ranks the same number of micro-batches of one shape",
        )


def _gather_by_block(model: nn.Module) -> None:
    """Gather a block's parameters at once, not those of each small module when it is called.

    DeepSpeed reduces such a block's gradients in each of its backward passes: one that a model
    calls several times in a forward pass must not be gathered so.
    """
    if getattr(model, "repeats_blocks", False):
        return
    from deepspeed.utils import set_z3_leaf_modules

    names: Sequence[str] = getattr(model, "_no_split_modules", None) or ()
    blocks = {type(module) for module in model.modules() if type(module).__name__ in names}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))
