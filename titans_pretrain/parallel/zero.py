"""DeepSpeed ZeRO-3 behind a small interface; the only module that knows DeepSpeed's insides.

DeepSpeed ignores unknown settings, skips steps and averages over the wrong ranks without a word,
so its settings are made and checked here, and the first step of every process is verified.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.shards import FlatShard

KNOWN_SETTINGS = frozenset(
    {
        "bf16",
        "communication_data_type",
        "data_types",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_allow_untested_optimizer",
        "zero_optimization",
    }
)
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 100_000_000
PERSISTENT_ELEMENTS = 100_000
GRADIENT_TOLERANCE = 1e-3


def deepspeed_settings(train: TrainSection, mesh: Mesh, parameters: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run.

    Args:
        train: the optimization.
        mesh: the grid of ranks.
        parameters: elements of the model; no bucket is larger.
    """
    bucket = min(BUCKET_ELEMENTS, parameters)
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": mesh.accumulation(train),
        "gradient_clipping": train.gradient_clip,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": 10 * BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": 10 * BUCKET_ELEMENTS,
            "sub_group_size": 10 * BUCKET_ELEMENTS,
            "memory_efficient_linear": False,
            "log_trace_cache_warnings": True,
        },
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse top-level keys that DeepSpeed would ignore (it checks nested ones itself).

    Raises:
        TitansError: an unknown key.
    """
    for key in sorted(set(settings) - KNOWN_SETTINGS):
        raise TitansError(
            f"DeepSpeed would ignore the setting {key!r}",
            where="settings for DeepSpeed",
            fix=f"use {', '.join(sorted(KNOWN_SETTINGS))}",
        )


class DataParallelUnit:
    """The ``mpu`` DeepSpeed asks for groups: data-parallel ones only.

    A sequence-parallel group is never offered: DeepSpeed would shard parameters over one group
    and reduce their gradients over another.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        if mesh.tensor != 1:
            raise ValueError("parameters split over tensor ranks are not supported")
        self._ranks = mesh.data_group(rank)
        self._index = mesh.coordinates(rank)[1]
        self._group, _ = dist.new_subgroups_by_enumeration(
            [list(group) for group in mesh.data_groups()]
        )

    def get_data_parallel_group(self) -> Any:
        """The group that shards the parameters and reduces the gradients."""
        return self._group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Its ranks."""
        return list(self._ranks)

    def get_data_parallel_rank(self) -> int:
        """This rank's place in it."""
        return self._index

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return len(self._ranks)

    def get_model_parallel_group(self) -> None:
        """No layer is split."""

    def get_model_parallel_rank(self) -> int:
        """No layer is split."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """No layer is split."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size


class ZeroEngine:
    """A model whose parameters, gradients and Adam moments are sharded over the data ranks.

    Gradients are averaged over data ranks: a rank's loss is its share of the global loss times
    the number of data ranks (``train/loss.py``). Each optimizer step is
    ``mesh.accumulation(train)`` times ``forward`` and ``backward``, then ``step``.

    Args:
        model: a Hugging Face causal language model in float32, with equal weights on every rank.
        optimizer: AdamW over the model's parameters.
        train: the optimization.
        mesh: the grid of ranks.
        device: where this rank computes.

    Raises:
        TitansError: DeepSpeed did not do as planned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        train: TrainSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self._accumulation = mesh.accumulation(train)
        self._backwards = 0
        self._device = device
        self._probe: _FirstStepProbe | None = None
        if train.activation_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elements = sum(parameter.numel() for parameter in model.parameters())
        settings = deepspeed_settings(train, mesh, elements)
        check_settings(settings)
        unit = DataParallelUnit(mesh, devices.rank())
        deepspeed = _import_deepspeed()
        _gather_by_block(model)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config=settings,
            mpu=unit,
            dist_init_required=False,
        )
        self._parameters = dict(self._engine.module.named_parameters())
        self._data_rank, self._data_ranks = mesh.coordinates(devices.rank())[1], mesh.data
        self._check_groups(unit.get_data_parallel_group_ranks())
        self._create_moments()
        self._probe = _FirstStepProbe(self, fresh=True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocabulary) of token ids (batch, time)."""
        training = self._engine.module.training
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            logits: torch.Tensor = self._engine(input_ids=input_ids, use_cache=False).logits
        return logits

    def train(self, mode: bool = True) -> None:
        """Train mode, or evaluation."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's loss."""
        if self._backwards == self._accumulation:
            raise TitansError(f"more than {self._accumulation} micro-batches before a step")
        self._engine.backward(loss, scale_wrt_gas=False)
        self._backwards += 1
        if self._backwards < self._accumulation:
            self._engine.step()  # counts the micro-batch; updates nothing

    def step(self, learning_rate: float) -> float:
        """Update the parameters; returns the global gradient norm before clipping.

        A norm that is not finite means that no parameter has changed.

        Raises:
            TitansError: micro-batches are missing, or the first step failed its check.
        """
        if self._backwards != self._accumulation:
            raise TitansError(f"{self._backwards} of {self._accumulation} micro-batches at a step")
        self._backwards = 0
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._probe:
            self._probe.check_gradient()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            return float("inf")
        if self._probe:
            self._probe.check_update(learning_rate)
            self._probe = None
        return norm

    def shards(self) -> list[FlatShard]:
        """This rank's parts of parameters and moments: float32 views of the live state."""
        return [
            self._shard(prefix, name)
            for name in self._parameters
            for prefix in ("parameters", *MOMENTS)
        ]

    def restore(self, step: int) -> None:
        """Go on from state that was read into ``shards()``.

        Args:
            step: optimizer steps it has behind it.
        """
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(step)
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            # The working copy follows the float32 master only after a step.
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        if self._probe:
            self._probe.remove()
        self._probe = _FirstStepProbe(self, fresh=step == 0)

    def _shard(self, prefix: str, name: str) -> FlatShard:
        parameter = self._parameters[name]
        key = None if prefix == "parameters" else prefix
        part = self._zero.get_local_fp32_param(parameter, key).detach()
        size, elements = parameter.ds_tensor.ds_numel, parameter.ds_numel
        start = min(self._data_rank * size, elements)
        stop = min(start + size, elements)
        return FlatShard(
            f"{prefix}/{name}", tuple(parameter.ds_shape), start, stop, part[: stop - start]
        )

    def _create_moments(self) -> None:
        """Adam's state now instead of at the first step, so that it can be restored into."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self._zero.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)

    def _check_groups(self, planned: Sequence[int]) -> None:
        for name, parameter in self._parameters.items():
            found = dist.get_process_group_ranks(parameter.ds_process_group)
            if found != list(planned):
                raise TitansError(
                    f"DeepSpeed shards {name} over ranks {found}, planned are {list(planned)}",
                    where="start of training",
                    fix="use the deepspeed version in pyproject.toml",
                )


class _FirstStepProbe:
    """Follows one parameter through the first step of the real engine.

    Its reduced gradient must be the mean of the ranks' own gradients, taken by a hook and reduced
    by hand, and the step must take it into Adam's moments and, where it can be seen, change it.
    """

    def __init__(self, engine: ZeroEngine, *, fresh: bool) -> None:
        self._engine, self._fresh = engine, fresh
        names = sorted(engine._parameters, key=lambda name: engine._parameters[name].ds_numel)
        vectors = [name for name in names if len(engine._parameters[name].ds_shape) == 1]
        self._name = (vectors or names)[0]
        parameter = engine._parameters[self._name]
        self._own = torch.zeros(
            tuple(parameter.ds_shape), dtype=torch.float32, device=engine._device
        )
        self._before = engine._shard("parameters", self._name).tensor.clone()
        self._moment = engine._shard("exp_avg", self._name).tensor.clone()
        self._moved = 0.0
        self._hook = parameter.register_hook(self._add_own)

    def _add_own(self, gradient: torch.Tensor) -> None:
        self._own += gradient.float()

    def remove(self) -> None:
        self._hook.remove()

    def check_gradient(self) -> None:
        self.remove()
        engine = self._engine
        parameter = engine._parameters[self._name]
        dist.all_reduce(self._own, group=parameter.ds_process_group)
        part = engine._shard("parameters", self._name)
        mean = self._own.flatten()[part.start : part.stop] / engine._data_ranks
        found = engine._zero.get_local_fp32_grad_for_param(parameter).flatten()
        found = found[: part.stop - part.start]
        scale = float(self._own.abs().max()) / engine._data_ranks
        wrong = bool((found - mean).abs().gt(GRADIENT_TOLERANCE * scale).any())
        self._moved = scale
        if any(devices.gather_objects(wrong)):
            raise TitansError(
                f"the reduced gradient of {self._name} is not the mean over the data ranks",
                where="check of the first step",
                fix="use the deepspeed version in pyproject.toml; nothing was trained or saved",
            )

    def check_update(self, learning_rate: float) -> None:
        engine = self._engine
        weights = engine._shard("parameters", self._name).tensor
        moment = engine._shard("exp_avg", self._name).tensor
        changed = bool((weights != self._before).any())
        taken = bool((moment != self._moment).any())
        found = devices.gather_objects((changed, taken, self._is_visible(learning_rate)))
        changed, taken, visible = (any(column) for column in zip(*found, strict=True))
        if self._moved > 0 and (not taken or (visible and not changed)):
            raise TitansError(
                f"the optimizer step did not change {self._name} though it has a gradient",
                where="check of the first step",
                fix="use the deepspeed version in pyproject.toml; nothing was saved",
            )

    def _is_visible(self, learning_rate: float) -> bool:
        """Whether Adam's first update, about the learning rate, exceeds the weights' spacing."""
        largest = float(self._before.abs().max()) if self._before.numel() else 0.0
        spacing = torch.finfo(torch.float32).eps * largest
        epsilon = self._engine._zero.optimizer.param_groups[0]["eps"]
        return self._fresh and learning_rate > 8 * spacing and self._moved > 1e3 * epsilon


def _gather_by_block(model: nn.Module) -> None:
    """Gather a block's parameters at once, not those of each small module when it is called."""
    from deepspeed.utils import set_z3_leaf_modules

    names: Sequence[str] = getattr(model, "_no_split_modules", None) or ()
    blocks = {type(module) for module in model.modules() if type(module).__name__ in names}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, with nothing to compile."""
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build for inference
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    return deepspeed
