"""What DeepSpeed is told: its JSON, its process groups, and checks of what it would ignore."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titans_pretrain.config import TrainSection
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.mesh import Mesh

BUCKET_ELEMENTS = 100_000_000
PERSISTENT_ELEMENTS = 100_000
# All keys that may be set, and where DeepSpeed's engine keeps what it took. Of
# ``zero_optimization`` DeepSpeed knows more; hpZ's ``zero_hpz_partition_size`` would mix tensor
# ranks, as its groups are consecutive ranks.
KNOWN_SETTINGS: Mapping[str, Any] = {
    "bf16": {"enabled": "_config.bfloat16_config.enabled"},
    "communication_data_type": "optimizer.communication_data_type",
    "data_types": {"grad_accum_dtype": "optimizer.grad_partitions_flat_buffer.dtype"},
    "gradient_accumulation_steps": "optimizer.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.clip_grad",
    "steps_per_print": "_config.steps_per_print",
    "train_batch_size": "_config.train_batch_size",
    "train_micro_batch_size_per_gpu": "_config.train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer": "_config.zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "_config.zero_force_ds_cpu_optimizer",
    "zero_optimization": {
        "contiguous_gradients": "optimizer.contiguous_gradients",
        "log_trace_cache_warnings": "optimizer.parameter_offload.log_trace_cache_warnings",
        "memory_efficient_linear": "_config.zero_config.memory_efficient_linear",
        "offload_optimizer": {
            "device": "_config.zero_config.offload_optimizer.device",
            "pin_memory": "optimizer.offload_optimizer_pin_memory",
        },
        "overlap_comm": "_config.zero_config.overlap_comm",
        "reduce_bucket_size": "optimizer.reduce_bucket_size",
        "reduce_scatter": "optimizer.reduce_scatter",
        "stage": "_config.zero_config.stage",
        "stage3_max_live_parameters": (
            "optimizer.parameter_offload._max_available_parameters_in_numel"
        ),
        "stage3_max_reuse_distance": "optimizer.parameter_offload._max_reuse_distance_in_numel",
        "stage3_param_persistence_threshold": (
            "optimizer.parameter_offload.param_numel_persistence_threshold"
        ),
        "stage3_prefetch_bucket_size": "optimizer.parameter_offload._prefetch_bucket_sz",
        "sub_group_size": "optimizer.sub_group_size",
    },
}
DTYPES: Mapping[Any, torch.dtype] = {"fp32": torch.float32}
FORBIDDEN_NAMES = ("initialize_sequence_parallel", "get_sequence_")


def deepspeed_settings(
    train: TrainSection, mesh: Mesh, parameters: int = BUCKET_ELEMENTS
) -> dict[str, Any]:
    """DeepSpeed's JSON for a run.

    Args:
        train: the optimization.
        mesh: the grid of ranks.
        parameters: elements of the model; no bucket is larger.
    """
    bucket = min(BUCKET_ELEMENTS, parameters)
    zero: dict[str, Any] = {
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
        "offload_optimizer": {
            "device": "cpu" if train.offload_optimizer else "none",
            "pin_memory": train.offload_optimizer and torch.cuda.is_available(),
        },
    }
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": mesh.accumulation(train),
        "gradient_clipping": train.gradient_clip,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW has to be compiled
        "bf16": {"enabled": train.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }


def check_settings(settings: Mapping[str, Any], known: Mapping[str, Any] = KNOWN_SETTINGS) -> None:
    """Refuse keys, nested ones too, that DeepSpeed would ignore or that no mesh here can have.

    Raises:
        TitansError: an unknown key.
    """
    for key, value in settings.items():
        if key not in known:
            raise TitansError(
                f"the setting {key!r} is none that DeepSpeed may be given here",
                where="settings for DeepSpeed",
                fix=f"use {', '.join(sorted(known))}",
            )
        if isinstance(value, Mapping):
            check_settings(value, known[key])


def check_taken(
    settings: Mapping[str, Any], engine: Any, known: Mapping[str, Any] = KNOWN_SETTINGS
) -> None:
    """Compare every setting with what DeepSpeed made of it: it keeps its own in place of some.

    Args:
        settings: as planned.
        engine: DeepSpeed's.

    Raises:
        TitansError: they differ, or DeepSpeed no longer keeps one where it did.
    """
    for key, place in known.items():
        if isinstance(place, Mapping):
            check_taken(settings.get(key, {}), engine, place)
            continue
        asked = settings.get(key)
        try:
            taken = attrgetter(place)(engine)
        except AttributeError as error:
            taken = str(error)
        if taken != DTYPES.get(asked, asked):
            raise TitansError(
                f"DeepSpeed was asked for {key} = {asked} and has {taken}",
                where="start of training",
                fix="use the deepspeed version in pyproject.toml",
            )


class DataParallelUnit:
    """The ``mpu`` DeepSpeed asks for groups: data and tensor ranks.

    A sequence-parallel group is never offered: DeepSpeed would shard parameters over one group
    and reduce their gradients over another.

    Args:
        groups: the rank's process groups.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> Any:
        """The group that shards the parameters and reduces the gradients."""
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Its ranks."""
        return list(self._groups.mesh.data_group(self._groups.rank))

    def get_data_parallel_rank(self) -> int:
        """This rank's place in it."""
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return self._groups.mesh.data

    def get_model_parallel_group(self) -> Any:
        """The group that shares layers; None where no one does."""
        return self._groups.tensor

    def get_model_parallel_rank(self) -> int:
        """This rank's place in it."""
        return self._groups.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Its size."""
        return self._groups.mesh.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_world_size(self) -> int:
        """No model is cut by depth."""
        return 1


def check_unit(unit: object) -> None:
    """Refuse an ``mpu`` whose mere method names would change what DeepSpeed reduces.

    Raises:
        TitansError: it names sequence ranks.
    """
    for name in dir(unit):
        if name.startswith(FORBIDDEN_NAMES):
            raise TitansError(
                f"DeepSpeed would not sum gradients over sequence ranks for an mpu with {name}",
                where="start of training",
                fix="take that method away",
            )


def check_groups(parameters: Mapping[str, nn.Parameter], planned: Sequence[int]) -> None:
    """Compare the ranks that DeepSpeed shards each parameter over with the planned ones.

    Raises:
        TitansError: they differ.
    """
    for name, parameter in parameters.items():
        group: Any = parameter.ds_process_group  # type: ignore[attr-defined]
        found = dist.get_process_group_ranks(group)
        if found != list(planned):
            raise TitansError(
                f"DeepSpeed shards {name} over ranks {found}, planned are {list(planned)}",
                where="start of training",
                fix="use the deepspeed version in pyproject.toml",
            )


def partitioner(train: TrainSection, groups: Groups) -> Callable[[nn.Module], None]:
    """What shards a part of a model over the data ranks, as ``construct`` wants it.

    In bf16 the weights are rounded to it first, as the float32 master begins with rounded weights
    in any case. All ranks of a data group must hold the same weights: each keeps its share of
    those of the first one.
    """
    settings = deepspeed_settings(train, groups.mesh)
    check_settings(settings)
    unit = DataParallelUnit(groups)
    check_unit(unit)
    deepspeed = import_deepspeed()

    def partition(module: nn.Module) -> None:
        if train.precision == "bf16":
            module.to(torch.bfloat16)
        # DeepSpeed takes no group from the mpu here, but all ranks.
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=groups.data,
            config_dict_or_path=settings,
            mpu=unit,
        )

    return partition


def import_deepspeed() -> Any:
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
