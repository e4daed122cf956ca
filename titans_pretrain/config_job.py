"""How a run becomes jobs of a cluster: the sections ``job`` and ``pipeline``. No torch here."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from titans_pretrain.config_section import Section

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def _checked(pattern: str, meaning: str) -> AfterValidator:
    def check(value: str) -> str:
        if value and not re.fullmatch(pattern, value):
            raise ValueError(meaning)
        return value

    return AfterValidator(check)


def minutes(text: str) -> float:
    """A time limit in minutes.

    Args:
        text: SLURM's ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``,
            ``days-hours:minutes`` or ``days-hours:minutes:seconds``.

    Raises:
        ValueError: it is none of them.
    """
    match = TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time limit; write hours:minutes:seconds or days-hours")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, mins, seconds = (*parts, 0, 0)[:3]
        return int(match["days"]) * 1440.0 + hours * 60 + mins + seconds / 60
    if len(parts) == 3:
        return parts[0] * 60.0 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0.0)


def _time(value: str) -> str:
    if minutes(value) <= 0:
        raise ValueError("give a time above zero")
    return value


Name = Annotated[str, _checked(r"[\w.@+-]+", "use letters, digits and . _ @ + - only")]
Names = Annotated[str, _checked(r"[\w.@+,&|*()\[\]:=-]+", "spaces and quotes are not allowed")]
Memory = Annotated[str, _checked(r"\d+[KMGT]?", "write a number and K, M, G or T, or 0 for all")]
Option = Annotated[str, _checked(r"--[a-z][a-z0-9-]*(=[^\r\n]*)?", "write --name or --name=value")]
Variable = Annotated[str, _checked(r"[A-Za-z_]\w*", "use letters, digits and _ only")]
Module = Annotated[str, _checked(r"[\w.@+/-]+", "give a module's name")]
Line = Annotated[str, _checked(r"[^\r\n\0]*", "give one line")]
Time = Annotated[str, AfterValidator(_time)]


class ContainerSection(Section):
    """The image in which the ranks run."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis (enroot, as options of srun) or apptainer (as a command)."""
    image: Annotated[Line, Field(min_length=1)]
    """What the runtime takes: a .sqsh or .sif file, or a registry's name."""
    mounts: list[Line] = []
    """Directories to mount, each as source:target."""
    options: list[Option] = []
    """Further options of the runtime, each --name or --name=value."""


class JobSection(Section):
    """The job that trains: what it asks of SLURM and how it goes on after an end."""

    cluster: str = ""
    """Profile in configs/cluster, or a YAML file: defaults of this section's keys."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of the job."""
    ranks_per_node: int = Field(default=1, ge=1)
    """Ranks on each node, one a GPU; nodes x ranks_per_node is the mesh's number of ranks."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs on each node; 0 asks for none."""
    gpu_type: Name = ""
    """Type of GPU in SLURM's words; empty takes any."""
    cpus_per_rank: int = Field(default=1, ge=1)
    """CPU cores of a rank."""
    memory_per_node: Memory = ""
    """Memory of a node, such as 900G; 0 takes all, empty the site's default."""
    time: Time = "1:00:00"
    """Time limit of one job; the run goes on in the next one."""
    partition: Names = ""
    """Partition, or several with commas; empty takes the site's default."""
    account: Name = ""
    """Account that is charged."""
    qos: Name = ""
    """Quality of service."""
    constraint: Names = ""
    """Features that nodes must have."""
    reservation: Name = ""
    """Reservation to run in."""
    exclude: list[Names] = []
    """Nodes to leave out."""
    options: list[Option] = []
    """Further options of sbatch, each --name or --name=value."""
    modules: list[Module] = []
    """Environment modules to load."""
    environment: dict[Variable, Line] = {}
    """Variables for the ranks, such as those of NCCL."""
    container: ContainerSection | None = None
    """Image in which the ranks run; null runs them on the nodes themselves."""
    python: Line = ""
    """Interpreter on the nodes; empty takes the one that submits."""
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    """Seconds before the time limit at which the run is asked to save and stop."""
    preempt_seconds: float | None = Field(default=None, ge=0)
    """Seconds a preempted job is left; null asks SLURM for the partition's grace time."""
    on_stop: Literal["requeue", "exit"] = "requeue"
    """What follows a time limit, a preemption or a failure: the same job again, or its end."""
    restarts: int = Field(default=3, ge=1)
    """Attempts in a row that may fail without a newer checkpoint."""
    preflight: bool = True
    """Check the nodes and their network before each attempt."""
    preflight_seconds: int = Field(default=60, ge=5)
    """Most that the check may take."""
    slow_factor: float = Field(default=3.0, gt=1)
    """A node that much slower than the median is bad."""
    start_seconds: int = Field(default=1800, ge=10)
    """Most that the ranks may take until they tell where they are."""
    storage_bytes_per_second: float = Field(default=0.0, ge=0)
    """Rate at which all nodes together write checkpoints; 0 takes what is measured."""
    local_directory: Line = ""
    """Scratch directory of a node."""
    stage_data: bool = False
    """Read data through a cache in local_directory."""

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def minutes(self) -> float:
        """``time`` in minutes."""
        return minutes(self.time)


class PrepareSection(Section):
    """The data to prepare before training, into the directory of data.manifest."""

    input: list[Line] = []
    """Files or globs, as ``titans data plan --input`` takes them; or none and --dataset=NAME."""
    tokenizer: Annotated[Line, Field(min_length=1)]
    """The sentencepiece model."""
    tasks: int = Field(default=1, ge=1)
    """Tasks of the array job."""
    at_once: int = Field(default=0, ge=0)
    """Tasks that run at the same time; 0 sets no bound."""
    options: list[Option] = []
    """Further options of ``titans data plan``, each --name or --name=value."""


class ExportSection(Section):
    """The Hugging Face directory made after training."""

    directory: Line = ""
    """Where; empty: model in the run's directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""


class EvalSection(Section):
    """The evaluation of the exported model, and of checkpoints while the run trains."""

    sequences: int = Field(default=1024, ge=0)
    """Held-out sequences to score, at most; 0 takes all."""
    output: Line = ""
    """Where, after training; empty: eval in the run's directory."""
    every: int = Field(default=0, ge=0)
    """Steps between checkpoints that are evaluated while the run trains; 0 none."""
    at_once: int = Field(default=4, ge=1)
    """Such checkpoints, at most, that are kept until their jobs are done."""
    tasks: list[Name] = []
    """Tasks they are scored on besides held-out data, as ``titans eval --tasks`` takes them."""
    options: list[Option] = []
    """Options of ``titans eval`` for these tasks, each --name or --name=value."""


class StageSection(Section):
    """What a stage's job asks of SLURM; what is not given follows from the stage."""

    time: Time | None = None
    """Time limit; null: that of training for export and eval, an hour for the others."""
    partition: Names = ""
    """Partition; empty takes that of training."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores; null: those of a rank for export and eval, one for the others."""
    memory: Memory = ""
    """Memory; empty: that of a node of training for export and eval, the site's default else."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs; null: one for eval in the partition of training if that has any, else none."""


StageName = Literal["plan", "prepare", "merge", "export", "eval"]


class PipelineSection(Section):
    """What ``titans submit --pipeline`` does before and after training."""

    data: PrepareSection | None = None
    """Data to prepare; null where it is there."""
    export: ExportSection = ExportSection()
    """Export of the last checkpoint."""
    eval: EvalSection = EvalSection()
    """Evaluation of the export."""
    stages: dict[StageName, StageSection] = {}
    """What the jobs beside training ask of SLURM, by stage."""
