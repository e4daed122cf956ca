"""Writing a checkpoint: whole or not at all, whatever dies when."""

import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.checkpoint import agreement, manifest, retention
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.planner import ShardSavePlanner
from titans_pretrain.checkpoint.storage import ShardWriter
from titans_pretrain.errors import TitansError
from titans_pretrain.files import TEMPORARY_SUFFIX, atomic_file, sync_directory
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard

log = logging.getLogger(__name__)
_FIX = "mend that (a full disk: free space) and resume; earlier checkpoints are untouched"


def save(
    root: Path,
    step: int,
    shards: Sequence[FlatShard],
    *,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep: int,
) -> Path:
    """Write ``root/step-N``; collective over the default process group, or alone without one.

    Every rank writes and syncs what it holds into ``root/.step-N.tmp``; a manifest with the sha256
    of every file comes last; then the directory gets its name, ``latest`` moves, and checkpoints
    older than the newest ``keep`` go. Room for ``keep + 1`` of them is needed.

    Args:
        root: directory of the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done. A damaged checkpoint of that step is replaced.
        shards: this rank's parts; together the ranks' parts cover every tensor. What several ranks
            hold alike is written once. float32 or bfloat16.
        state: rank 0's further state, values that JSON returns unchanged.
        files: rank 0's further files, plain names.
        keep: how many of the newest checkpoints stay, at least 1.

    Returns:
        The checkpoint's directory.

    Raises:
        TitansError: on all ranks alike, naming rank, file and cause; nothing is left of the
            attempt. Also if a checkpoint of that step is there already that is good, or that
            cannot be read now.
    """
    target = root / layout.step_name(step)
    temporary = root / f".{target.name}{TEMPORARY_SUFFIX}"
    doing = f"saving {target.name}"

    agreement.on_first(doing, lambda: _prepare(target, temporary, files, keep), fix=_FIX)
    try:
        writer = _write_tensors(temporary, shards, doing)
        records = agreement.on_all(doing, lambda: writer.records, fix=_FIX)
        written = [record for rank in records for record in rank]
        agreement.on_first(
            doing,
            lambda: _complete(temporary, target, step, written, writer.tensors, state, files),
            fix=_FIX,
        )
    except BaseException:
        if devices.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    agreement.on_first(doing, lambda: _publish(target, step, keep), fix=_FIX)
    return target


def _prepare(target: Path, temporary: Path, files: Mapping[str, bytes], keep: int) -> None:
    if keep < 1:
        raise ValueError(f"keep is {keep}, must be at least 1")
    for name in files:
        if name in layout.RESERVED or Path(name).name != name or name.startswith((".", "rank-")):
            raise ValueError(f"{name!r} cannot be the name of a checkpoint's file")
    target.parent.mkdir(parents=True, exist_ok=True)
    retention.remove_leftovers(target.parent)
    if target.exists() and not layout.verify(target):
        raise TitansError("a good checkpoint of this step is there already", where=str(target))
    temporary.mkdir()


def _write_tensors(temporary: Path, shards: Sequence[FlatShard], doing: str) -> ShardWriter:
    writer = ShardWriter(temporary)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = ShardSavePlanner(shards)
            state_dict_saver.save({}, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        raise agreement.translate(doing, error, fix=_FIX) from None
    return writer


def _complete(
    temporary: Path,
    target: Path,
    step: int,
    written: list[manifest.FileRecord],
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Add the plain files and the manifest, then give the directory its name."""
    plain = {**files, layout.STATE: layout.state_bytes(state)}
    records = written + [
        manifest.write_file(temporary, name, contents) for name, contents in plain.items()
    ]
    facts = {
        "format": layout.FORMAT,
        "step": step,
        "tensors": tensors,
        "torch": str(torch.__version__),
    }
    manifest.write(temporary, records, facts)
    sync_directory(temporary)
    if target.exists():
        os.rename(target, _aside(target))
        log.warning("%s was damaged and is replaced", target)
    os.rename(temporary, target)
    sync_directory(target.parent)


def _publish(target: Path, step: int, keep: int) -> None:
    """Move ``latest``, then delete what is no longer kept."""
    with atomic_file(target.parent / layout.LATEST, "w") as handle:
        handle.write(f"{target.name}\n")
    shutil.rmtree(_aside(target), ignore_errors=True)
    retention.prune(target.parent, step, keep)


def _aside(target: Path) -> Path:
    """Where a damaged checkpoint waits until its successor is in place."""
    return target.with_name(f".{target.name}.damaged{TEMPORARY_SUFFIX}")
