"""The jobs of a run: what training, each stage and a sweep ask of SLURM. No torch."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.job_step import interpreter, stage_launcher
from launchers.job_step import step_command as step_command
from launchers.job_text import JobSpec as JobSpec
from launchers.job_text import text as text
from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.config_job import StageName, StageSection
from titans_pretrain.errors import UserError

LONGEST_NAME = 48
OURS = "titans"
SWEEP = "sweep"
STAGE_TIME = "1:00:00"
EVALUATION = "eval-"


def training_spec(config: RunConfig, *, directory: Path, config_path: Path) -> JobSpec:
    """The job that trains a run; it never runs beside another one of the same run.

    Args:
        config: the run.
        directory: of the run.
        config_path: its frozen configuration, which the job reads.
    """
    variables = {"CONFIG": str(config_path), **_python(config, in_step=False)}
    return JobSpec(
        name=job_name(config, directory),
        body="pretrain",
        output=_log(directory, "slurm-%j.log"),
        variables=variables,
        dependency="singleton",
        **_training(config),
    )


def sweep_spec(
    config: RunConfig,
    *,
    directory: Path,
    sweep_path: Path,
    members: Sequence[int],
    at_once: int = 0,
) -> JobSpec:
    """The array job whose elements train the runs of a sweep.

    Args:
        config: what all runs share.
        directory: of the sweep.
        sweep_path: the file that tells which element is which run.
        members: the elements to run.
        at_once: of them, at the same time; 0 sets no bound.
    """
    return JobSpec(
        name=job_name(config, directory, SWEEP),
        body="sweep",
        output=_log(directory, "slurm-%A_%a.log"),
        variables={"SWEEP": str(sweep_path), **_python(config, in_step=False)},
        array=_ids(members) + (f"%{at_once}" if at_once else ""),
        **_training(config),
    )


def stage_spec(
    stage: StageName, config: RunConfig, *, directory: Path, config_path: Path
) -> JobSpec:
    """The job of a stage beside training.

    Args:
        stage: which.
        config: the run.
        directory: of the run.
        config_path: its frozen configuration.

    Raises:
        UserError: the configuration has not what the stage works on.
    """
    body, variables, arguments = _work(stage, config, directory)
    tasks = config.pipeline.data.tasks if stage == "prepare" and config.pipeline.data else 0
    at_once = config.pipeline.data.at_once if config.pipeline.data else 0
    return JobSpec(
        name=job_name(config, directory, stage),
        body=body,
        output=_log(directory, "slurm-%A_%a.log" if tasks else "slurm-%j.log"),
        variables={**variables, **_python(config, in_step=True)},
        arguments=arguments,
        array=(f"0-{tasks - 1}" + (f"%{at_once}" if at_once else "")) if tasks else "",
        **_beside(stage, config),
    )


def evaluation_spec(config: RunConfig, *, directory: Path, config_path: Path, step: int) -> JobSpec:
    """The job that evaluates a checkpoint while the run trains, with the resources of ``eval``.

    Args:
        config: the run.
        directory: of the run.
        config_path: its configuration, as the nodes see it.
        step: of the checkpoint.
    """
    checkpoint = directory / "checkpoints" / f"step-{step}"
    return JobSpec(
        name=job_name(config, directory, evaluation(step)),
        body="eval-checkpoint",
        output=_log(directory, "slurm-%j.log"),
        variables={"CHECKPOINT": str(checkpoint), **_python(config, in_step=True)},
        arguments=("--config", str(config_path)),
        dependency="singleton",
        **_beside("eval", config),
    )


def evaluation(step: int) -> str:
    """The stage that evaluates the checkpoint of a step."""
    return f"{EVALUATION}{step}"


def is_evaluation(stage: str) -> bool:
    """Whether a stage evaluates a checkpoint while the run trains."""
    return re.fullmatch(rf"{EVALUATION}\d+", stage) is not None


def _beside(stage: StageName, config: RunConfig) -> dict[str, Any]:
    """What the job of a stage beside training asks of SLURM, as fields of a JobSpec."""
    job, asked = config.job, stage_section(stage, config)
    elsewhere = bool(asked.partition)  # what belongs to the partition of training stays with it
    return {
        "section": f"pipeline.stages.{stage}",
        "cpus_per_task": asked.cpus or 1,
        "gpus_per_node": asked.gpus or 0,
        "gpu_type": job.gpu_type if asked.gpus and not elsewhere else "",
        "memory": asked.memory,
        "time": asked.time or STAGE_TIME,
        "partition": asked.partition or job.partition,
        "account": job.account,
        "qos": "" if elsewhere else job.qos,
        "constraint": "" if elsewhere else job.constraint,
        "reservation": "" if elsewhere else job.reservation,
        "exclude": () if elsewhere else tuple(job.exclude),
        "modules": tuple(job.modules),
        "environment": dict(job.environment),
        "launcher": stage_launcher(job, gpu=bool(asked.gpus)),
    }


def stage_section(stage: StageName, config: RunConfig) -> StageSection:
    """What a stage asks for: as given, else what training has for those that load its model."""
    job, asked = config.job, config.pipeline.stages.get(stage, StageSection())
    if stage not in ("export", "eval"):
        return asked
    gpus = 1 if stage == "eval" and job.gpus_per_node and not asked.partition else 0
    own = {
        "time": asked.time or job.time,
        "cpus": asked.cpus or job.cpus_per_rank,
        "memory": asked.memory or job.memory_per_node,
        "gpus": gpus if asked.gpus is None else asked.gpus,
    }
    return asked.model_copy(update=own)


def job_name(config: RunConfig, directory: Path, stage: str = "") -> str:
    """The name of a run's job: the same for the same run, whoever submits it, and for no other."""
    place = _place(directory)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", config.run.name or place.name).strip("-.")
    return "-".join(filter(None, (OURS, name[:LONGEST_NAME], _digest(place), stage)))


def is_name_of(name: str, directory: Path) -> bool:
    """Whether a job's name is one that the run of a directory has, alone or in a sweep.

    Whatever the run's own name is: another one may have been given since.
    """
    place = _place(directory)
    own, of_sweep = _digest(place), _digest(place.parent)
    return bool(re.fullmatch(rf"{OURS}-(.*-)?({own}(-[a-z]+(-[0-9]+)?)?|{of_sweep}-{SWEEP})", name))


def _place(directory: Path) -> Path:
    """The directory without symbolic links: a run has one name by whatever path it is reached."""
    return Path(os.path.realpath(directory))


def _digest(place: Path) -> str:
    return hashlib.sha256(str(place).encode()).hexdigest()[:8]


def _training(config: RunConfig) -> dict[str, Any]:
    """What ``job`` asks of SLURM, as fields of a JobSpec."""
    job = config.job
    return {
        "nodes": job.nodes,
        "tasks_per_node": job.ranks_per_node,
        "cpus_per_task": job.cpus_per_rank,
        "gpus_per_node": job.gpus_per_node,
        "gpu_type": job.gpu_type,
        "memory": job.memory_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "reservation": job.reservation,
        "exclude": tuple(job.exclude),
        "signal": f"B:USR1@{job.signal_seconds}",
        "options": tuple(job.options),
        "modules": tuple(job.modules),
        "environment": dict(job.environment),
    }


def _work(
    stage: StageName, config: RunConfig, directory: Path
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Ready file, its variables and further arguments of a stage."""
    export, evaluation = config.pipeline.export, config.pipeline.eval
    model = export.directory or str(directory / "model")
    if stage == "export":
        variables = {"CHECKPOINT": str(directory), "OUT": model}
        return "export", variables, ("--dtype", export.dtype)
    if stage == "eval":
        if config.data.manifest is None:
            raise UserError(
                "one data set is evaluated, and the run trains on a mixture",
                where="data.mixture",
                fix="submit without --pipeline; then titans export and titans eval --data MANIFEST",
            )
        output = evaluation.output or str(directory / "eval")
        variables = {"MODEL": model, "OUT": output, "DATA": config.data.manifest}
        chosen: tuple[str, ...] = ()
        if evaluation.sequences:
            chosen = ("--sequences", str(evaluation.sequences))
        if foreign.package(str(config.model.get(foreign.KEY))):
            chosen += ("--trust-remote-code",)  # whoever wrote the configuration named the package
        return "eval", variables, chosen
    data, manifest = config.pipeline.data, config.data.manifest
    if data is None or manifest is None:
        raise UserError(
            "there is no data to prepare",
            where="pipeline.data",
            fix="give pipeline.data.input and data.manifest, or leave the stage out",
        )
    variables = {"DATA_JOB": stage, "OUTPUT": str(Path(manifest).parent)}
    if stage != "plan":
        return "prepare", variables, ()
    words = ["--tokenizer", data.tokenizer, "--tasks", str(data.tasks), *data.options]
    source = ["--input", *data.input] if data.input else []
    return "prepare", variables, (*source, *words)


def _python(config: RunConfig, *, in_step: bool) -> dict[str, str]:
    return {"TITANS_PYTHON": interpreter(config.job, in_step=in_step)}


def _log(directory: Path, name: str) -> str:
    """A file in the run's logs; SLURM reads % in a path as a pattern."""
    return f"{str(directory).replace('%', '%%')}/logs/{name}"


def _ids(members: Sequence[int]) -> str:
    """Numbers as an array's ids, such as 0-3,7."""
    spans: list[list[int]] = []
    for number in sorted(set(members)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
