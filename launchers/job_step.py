"""The srun line of a step, and the words that run a command in a container. No torch."""

import sys
from collections.abc import Mapping, Sequence

from launchers.job_text import gpus
from titans_pretrain.config_job import ContainerSection, JobSection
from titans_pretrain.errors import UserError

WAIT_SECONDS = 120
OURS = (
    "TITANS_ATTEMPT",
    "TITANS_JOB_END",
    "TITANS_PREEMPT_SECONDS",
    "OMP_NUM_THREADS",
    "PYTHONFAULTHANDLER",
)

OTHERS = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """A batch script's environment without the ranks and meeting point of another start.

    A job inherits the environment of the shell that submits, which may be in a step or have been
    told of one by hand.
    """
    return {name: value for name, value in environment.items() if name not in OTHERS}


def step_command(
    job: JobSection,
    command: Sequence[str],
    *,
    nodes: int,
    tasks_per_node: int,
    options: Sequence[str] = (),
) -> list[str]:
    """The srun that runs a command as so many tasks of this job, in the job's container.

    All GPUs of a node are seen by all its tasks, which take theirs by their local rank. Tasks are
    counted node by node, so that neighbouring ranks share one.

    Args:
        job: what the job asked for.
        command: program and arguments of a task.
        nodes: nodes.
        tasks_per_node: tasks on each.
        options: further options of srun, which go before those here.
    """
    step = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={job.cpus_per_rank}",  # srun takes it from the job no more since 22.05
        "--distribution=block",
        "--kill-on-bad-exit=1",
        f"--wait={WAIT_SECONDS}",
        "--export=ALL",
        "--mpi=none",
    ]
    if job.gpus_per_node:
        # no --gpu-bind: its "none" also takes CUDA_VISIBLE_DEVICES away, and with it the bounds
        step.append(f"--gpus-per-node={gpus(job.gpus_per_node, job.gpu_type)}")
    if job.container is None:
        return [*step, *options, *command]
    if job.container.runtime == "pyxis":
        return [*step, *_pyxis(job, job.container), *options, *command]
    return [*step, *options, *_apptainer(job.container, gpu=job.gpus_per_node > 0), *command]


def stage_launcher(job: JobSection, *, gpu: bool) -> tuple[str, ...]:
    """The words that run a one-task command in the job's container; none without one."""
    if job.container is None:
        return ()
    if job.container.runtime == "pyxis":
        step = ("srun", "--ntasks=1", "--export=ALL", "--mpi=none")
        return (*step, *_pyxis(job, job.container))
    return tuple(_apptainer(job.container, gpu=gpu))


def interpreter(job: JobSection, *, in_step: bool) -> str:
    """The Python of the ranks and stages, or of the batch script that watches them.

    Args:
        job: ``job.python`` is that of the container where there is one.
        in_step: whether it runs where the ranks do.
    """
    if job.container is not None:
        return (job.python or "python3") if in_step else sys.executable
    return job.python or sys.executable


def _pyxis(job: JobSection, container: ContainerSection) -> list[str]:
    """Options of srun; a variable of the image goes before the job's unless it is named."""
    words = [f"--container-image={container.image}"]
    if container.mounts:
        words.append(f"--container-mounts={','.join(map(_mount, container.mounts))}")
    words.append(f"--container-env={','.join(sorted({*OURS, *job.environment}))}")
    return [*words, *container.options]


def _apptainer(container: ContainerSection, *, gpu: bool) -> list[str]:
    words = ["apptainer", "exec", *["--nv"] * gpu]
    for mount in container.mounts:
        words += ["--bind", _mount(mount)]
    return [*words, *container.options, container.image]


def _mount(text: str) -> str:
    if "," in text or ":" not in text:
        raise UserError(
            f"{text!r} is no mount", where="job.container.mounts", fix="write source:target"
        )
    return text
