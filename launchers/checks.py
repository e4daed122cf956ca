"""What is refused at submission, before anything is queued: each with its fix. No torch here."""

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from launchers import job_text, slurm_refusals, slurm_utils
from titans_pretrain.config import RunConfig
from titans_pretrain.config_job import JobSection
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel import mesh
from titans_pretrain.plan import parameters

CHECKPOINT_BYTES = 12  # of a parameter: its float32 value and two moments of AdamW
TAIL_BYTES = 2**16
MODULE_SECONDS = 60


def of_config(config: RunConfig) -> None:
    """Refuse what the configuration alone tells cannot run.

    Raises:
        UserError: ranks and mesh do not fit, more ranks than GPUs, or a time limit in which nothing
            gets done.
    """
    _mesh(config)
    _time(config)


def of_run(config: RunConfig, run: Path, *, proven: bool = False) -> None:
    """Refuse what the run's directory tells cannot go on.

    Args:
        config: the run.
        run: its directory.
        proven: it has gone on under these limits before; one slow save is then no reason to end it.

    Raises:
        UserError: no room for a checkpoint, or a grace in which it cannot be saved.
    """
    _room(config, run)
    if not proven:
        _grace(config, run)


def of_data(config: RunConfig) -> None:
    """Refuse a run whose data is not there.

    Raises:
        UserError: a manifest on a file system that does not exist.
    """
    for manifest, _ in config.data.parts:
        if "://" not in manifest and not Path(manifest).is_file():
            raise UserError(
                f"data.manifest: {manifest} does not exist",
                where="data.manifest",
                fix="prepare the data with titans data prepare, or name it under pipeline.data "
                "and add --pipeline",
            )


def of_host(job: JobSection) -> None:
    """Refuse what this host tells the nodes will lack, as they share files and modules with it.

    Raises:
        UserError: a module, interpreter or image that is not there.
    """
    modules(job)
    _programs(job)


def warnings(config: RunConfig, run: Path) -> Iterator[str]:
    """Sentences about what may end badly, but need not."""
    seconds = save_seconds(config, run)
    grace = preemption_seconds(config.job)
    if grace is not None and seconds is not None and grace < seconds:
        yield (
            f"a preempted job is left {grace:g} s, a save takes {seconds:.0f} s: what was done "
            "since the last checkpoint will be lost; lower checkpoint.every"
        )
    if config.job.on_stop == "requeue" and not config.checkpoint.every:
        yield (
            "checkpoint.every is 0: a node that fails costs all that was done since the last time "
            "limit; set it"
        )


def save_seconds(config: RunConfig, run: Path) -> float | None:
    """How long a checkpoint takes to write: as measured, else by the storage's rate, else None."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return float(json.loads((run / "last_save.json").read_text(encoding="utf-8"))["seconds"])
    rate = config.job.storage_bytes_per_second
    return checkpoint_bytes(config) / rate if rate else None


def checkpoint_bytes(config: RunConfig) -> int:
    """About how large a checkpoint is."""
    return CHECKPOINT_BYTES * parameters.count(config.model)


def preemption_seconds(job: JobSection) -> float | None:
    """How long a preempted job is left before it is killed, the least of its partitions.

    None where no job is preempted, or the site does not tell.
    """
    if job.preempt_seconds is not None:
        return job.preempt_seconds
    try:
        if "none" in slurm_utils.settings().get("PreemptType", "none").lower():
            return None
        graces = [slurm_utils.grace_seconds(name, qos=job.qos) for name in _preempted(job)]
    except TitansError:
        return None
    return min((float(grace) for grace in graces if grace is not None), default=None)


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _mesh(config: RunConfig) -> None:
    job = config.job
    asked = f"job.nodes {job.nodes} * job.ranks_per_node {job.ranks_per_node}"
    try:
        mesh.plan(job.ranks, config.mesh, config.train)
    except UserError as error:
        fix = f"{error.fix} (job.nodes * job.ranks_per_node)"
        raise UserError(error.what, where=f"{asked} = {job.ranks} ranks", fix=fix) from None
    if job.gpus_per_node and job.ranks_per_node > job.gpus_per_node:
        raise UserError(
            f"job.ranks_per_node: {job.ranks_per_node} ranks for {job.gpus_per_node} GPUs a node",
            where="job.gpus_per_node",
            fix=f"use job.ranks_per_node={job.gpus_per_node}, one rank a GPU",
        )


def _time(config: RunConfig) -> None:
    job = config.job
    limit = job.minutes * 60
    if limit <= job.signal_seconds:
        raise UserError(
            f"job.time: {job.time} is no longer than job.signal_seconds {job.signal_seconds}: "
            "the run would be asked to stop as it starts",
            where="job.time",
            fix=f"use a longer time, or job.signal_seconds={max(1, int(limit // 4))}",
        )


def _preempted(job: JobSection) -> list[str]:
    """The partitions of a job in which jobs are preempted."""
    return [
        name
        for name, facts in slurm_refusals.partitions().items()
        if facts.get("PreemptMode") != "OFF"
        and (name in job.partition.split(",") if job.partition else facts.get("Default") == "YES")
    ]


def _room(config: RunConfig, run: Path) -> None:
    needed = checkpoint_bytes(config)
    free = shutil.disk_usage(existing(run)).free
    if free < needed:
        raise UserError(
            f"{free / 1e9:.1f} GB are free, a checkpoint takes about {needed / 1e9:.1f} GB",
            where=f"run.directory: {run}",
            fix="free space, or choose a directory with more",
        )


def _grace(config: RunConfig, run: Path) -> None:
    """The signal before the time limit must leave time for a step and a save after it."""
    job, seconds = config.job, save_seconds(config, run)
    if seconds is None:
        return
    step = _step_seconds(run)
    needed = math.ceil(seconds + step)
    if job.signal_seconds < needed:
        raise UserError(
            f"job.signal_seconds: {job.signal_seconds} is too short: a step takes {step:.0f} s "
            f"and a save {seconds:.0f} s",
            where="job.signal_seconds",
            fix=f"use job.signal_seconds={math.ceil(1.5 * needed)}",
        )
    limit = job.minutes * 60
    if limit < job.signal_seconds + needed:
        raise UserError(
            f"job.time: {job.time} leaves no time to train: loading a checkpoint takes about "
            f"{seconds:.0f} s, and job.signal_seconds {job.signal_seconds} are kept for the end",
            where="job.time",
            fix=f"use job.time={math.ceil(2 * (job.signal_seconds + needed) / 60)} or more",
        )


def doubt(config: RunConfig, run: Path, rate: float = 0.0) -> str:
    """What ``of_run`` would refuse, also if checkpoints were written at a rate measured once.

    Args:
        config: the run.
        run: its directory.
        rate: measured, in bytes a second; 0 if the configured one counts.

    Returns:
        The complaint with its fix; empty where there is none.
    """
    measured = {"storage_bytes_per_second": rate} if rate else {}
    job = config.job.model_copy(update=measured)
    try:
        _grace(config.model_copy(update={"job": job}), run)
    except UserError as error:
        return f"{error.what}; {error.fix}"
    return ""


def _step_seconds(run: Path) -> float:
    """The median of the last steps in ``metrics.jsonl``; 0 where there is none.

    The first one after a start is slow, and no measure of those before a stop.
    """
    try:
        with open(run / "metrics.jsonl", "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = handle.read().splitlines()
    except OSError:
        return 0.0
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            found.append(float(json.loads(line)["seconds"]))
    return statistics.median(found) if found else 0.0


def has_modules() -> bool:
    """Whether this host has the command ``module``."""
    return not _shell("type module >/dev/null 2>&1")


def modules(job: JobSection) -> None:
    """Load the modules here as a job does, if this host has the command.

    The nodes answer for themselves.

    Raises:
        UserError: one cannot be loaded after those before it.
    """
    if not job.modules or not has_modules():
        return
    words = {"MODULES": " ".join(job.modules)}
    if said := _shell(f"{job_text.module_functions()}\nload_modules", words):
        fix = "see module avail and, where modules come in a hierarchy, module spider"
        raise UserError(f"job.modules: {said}", where="job.modules", fix=fix)


def _shell(command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a login shell, which is where ``module`` is made, says of a failure; "" of none."""
    try:
        done = subprocess.run(
            ["bash", "-lc", command],  # noqa: S607 - the user's
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=MODULE_SECONDS,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise TitansError(
            f"a login shell did not load modules in {MODULE_SECONDS} s",
            where="login shell",
            fix="see what your shell's start files wait for",
        ) from None
    if not done.returncode:
        return ""
    told = re.findall(r"^error: (.+)$", done.stderr.decode(errors="replace"), re.MULTILINE)
    return str(told[-1]) if told else f"exit code {done.returncode}"


def _programs(job: JobSection) -> None:
    """The interpreter and the image, where they are files."""
    if job.container is not None:
        image = Path(job.container.image)
        if image.is_absolute() and not image.exists():
            raise UserError(
                f"job.container.image: {image} does not exist",
                where="job.container.image",
                fix="build it, or give its place on a file system that the nodes see, too",
            )
    elif job.python.startswith("/") and not os.access(job.python, os.X_OK):
        raise UserError(
            f"job.python: {job.python} is no program here",
            where="job.python",
            fix="give an interpreter on a file system that the nodes see, too",
        )
