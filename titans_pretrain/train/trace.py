"""A profile of one step, for Perfetto or chrome://tracing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from titans_pretrain.files import TEMPORARY_SUFFIX


@contextlib.contextmanager
def traced(path: Path, device: torch.device) -> Iterator[None]:
    """Write what the block does on this rank to ``path``; hand-overs are ranges with names."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as taken:
        yield
    temporary = path.with_name(f"{path.stem}{TEMPORARY_SUFFIX}.json")
    taken.export_chrome_trace(str(temporary))
    temporary.replace(path)
