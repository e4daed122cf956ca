"""How fast a run is: tokens and model FLOPs a second, and the share of what its GPUs can do."""

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.plan import flops, hardware


class Speed:
    """The figures of a step's row that depend on the clock.

    Args:
        config: the run.
        ranks: of the whole run.
        device: of this rank; all ranks are taken to have the like.
    """

    def __init__(self, config: RunConfig, ranks: int, device: torch.device) -> None:
        self._config, self._ranks = config, ranks
        self._tokens = config.train.global_batch_size * config.data.sequence_length
        self._peak = peak(device, config.train.precision)
        self._flops: dict[int, int] = {}

    def row(self, length: int, seconds: float) -> dict[str, float]:
        """``tokens_per_second`` of the run; ``flops_per_second`` of a rank and ``mfu`` where known.

        Args:
            length: tokens of the step's sequences.
            seconds: that the step took.
        """
        row = {"tokens_per_second": self._tokens / seconds}
        if flops.is_counted(self._config.model):
            if length not in self._flops:
                self._flops[length] = flops.step(self._config, length)
            row["flops_per_second"] = self._flops[length] / seconds / self._ranks
            if self._peak is not None:
                row["mfu"] = row["flops_per_second"] / self._peak
        return row | {"seconds": seconds}


def peak(device: torch.device, precision: str) -> float | None:
    """FLOPs a second that matrix products of a run's precision reach at most; None if unknown."""
    if device.type != "cuda":
        return None
    numbers = precision
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        numbers = "tf32"
    return hardware.peak_flops(torch.cuda.get_device_name(device), numbers)
