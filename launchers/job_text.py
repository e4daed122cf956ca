"""A batch job as data, and its script: #SBATCH lines, exports, the body of a ready file. No torch.

No line of a script is built from a user's text but quoted, and after its form was checked.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titans_pretrain.errors import UserError

READY = Path(__file__).resolve().parent
BODY_BEGINS = "set -euo pipefail\n"
OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.+)?")
PLAIN = re.compile(r"[\w.,:@%+/=()\[\]&|*-]+", re.ASCII)
UNQUOTABLE = re.compile(r"[\x00-\x1f\x7f\"'\\]")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSW(OR)?D|CREDENTIALS?)(_|$)", re.IGNORECASE
)
GIVEN_BY_SLURM = re.compile(
    r"(SLURM|SBATCH|SRUN)_\w+|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_PORT|"
    r"TITANS_(ATTEMPT|JOB_END|PREEMPT_SECONDS)"
)
WHERE = {"job-name": "run.name", "output": "run.directory", "exclude": "job.exclude"}
NEVER = frozenset(
    {
        "--array",
        "--chdir",
        "--clusters",
        "--dependency",
        "--error",
        "--exclude",
        "--export-file",
        "--gid",
        "--help",
        "--input",
        "--nodefile",
        "--nodelist",
        "--no-requeue",
        "--ntasks",
        "--parsable",
        "--signal",
        "--test-only",
        "--uid",
        "--usage",
        "--version",
        "--wait",
        "--wrap",
    }
)


@dataclass(frozen=True)
class JobSpec:
    """One batch job.

    Attributes:
        name: job name; jobs of the same name and user can wait for each other as singletons.
        body: the ready file whose commands it runs, without .sbatch.
        output: file of what it prints, with SLURM's patterns such as %j.
        variables: what the body reads, by name.
        arguments: of the body's command, after its own.
        section: of the configuration that its wishes come from, for messages.
        nodes: nodes.
        tasks_per_node: ranks on each.
        cpus_per_task: cores of a rank.
        gpus_per_node: GPUs of a node, 0 for none.
        gpu_type: type of GPU, empty for any.
        memory: of a node, in SLURM's form; empty for the site's default.
        time: limit, in SLURM's form.
        partition: empty for the site's default; so with the next four.
        account: who pays.
        qos: quality of service.
        constraint: features of the nodes.
        reservation: to run in.
        exclude: nodes to leave out.
        array: ids of an array, such as 0-7%2; empty for a job that is none.
        dependency: what it waits for, in SLURM's form.
        signal: what it is sent before its limit, in SLURM's form.
        options: further options of sbatch.
        modules: environment modules to load.
        environment: variables for all its processes.
        launcher: words put before the body's command, such as those of a container.
    """

    name: str
    body: str
    output: str
    variables: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    section: str = "job"
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    memory: str = ""
    time: str = "1:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: tuple[str, ...] = ()
    array: str = ""
    dependency: str = ""
    signal: str = ""
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()


def text(spec: JobSpec) -> str:
    """The batch script of a job.

    Raises:
        UserError: a value that cannot stand in it, or an option that another key sets.
    """
    _check_environment(spec)
    head = [
        _directive(name, value, WHERE.get(name, spec.section)) for name, value in _options(spec)
    ]
    head += _further(spec)
    return "\n".join(["#!/bin/bash", *head, "", *_exports(spec), "", body(spec.body)])


def body(name: str) -> str:
    """The commands of a ready file, without its header."""
    whole = (READY / f"{name}.sbatch").read_text(encoding="utf-8")
    return whole[whole.index(BODY_BEGINS) :]


def module_functions() -> str:
    """The functions of a ready file that load the modules in $MODULES."""
    whole = body("pretrain")
    return whole[whole.index("fail() {") : whole.index("\nload_modules\n")]


def gpus(count: int, kind: str) -> str:
    """The value of --gpus-per-node."""
    return f"{kind}:{count}" if kind else str(count)


def _options(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Long names of sbatch's options, and values; "" is an option without one."""
    yield "job-name", spec.name
    yield "output", spec.output
    yield "open-mode", "append"
    yield "nodes", str(spec.nodes)
    yield "ntasks-per-node", str(spec.tasks_per_node)
    yield "cpus-per-task", str(spec.cpus_per_task)
    if spec.gpus_per_node:
        yield "gpus-per-node", gpus(spec.gpus_per_node, spec.gpu_type)
    yield "time", spec.time
    yield "requeue", ""
    yield "kill-on-invalid-dep", "yes"
    yield "export", "ALL"
    for name, value in (
        ("mem", spec.memory),
        ("partition", spec.partition),
        ("account", spec.account),
        ("qos", spec.qos),
        ("constraint", spec.constraint),
        ("reservation", spec.reservation),
        ("exclude", ",".join(spec.exclude)),
        ("array", spec.array),
        ("dependency", spec.dependency),
        ("signal", spec.signal),
    ):
        if value:
            yield name, value


def _further(spec: JobSpec) -> Iterator[str]:
    """The lines of ``job.options``."""
    taken = {f"--{name}" for name, _ in _options(spec)} | NEVER
    for option in spec.options:
        name, _, value = option.partition("=")
        if not OPTION.fullmatch(option):
            raise UserError(
                f"{option!r} is no option of sbatch",
                where=f"{spec.section}.options",
                fix="write --name or --name=value, one an entry",
            )
        if full := next((one for one in sorted(taken) if one.startswith(name)), ""):
            raise UserError(  # sbatch takes the beginning of a name for the whole
                f"{name}: {full} is set already, or cannot be in a batch script",
                where=f"{spec.section}.options",
                fix="use the section's own key for it, or leave it out",
            )
        yield _directive(name.removeprefix("--"), value, f"{spec.section}.options")


def _directive(name: str, value: str, where: str) -> str:
    """One #SBATCH line; sbatch splits it as a shell would, and # begins a comment there."""
    if not value:
        return f"#SBATCH --{name}"
    if UNQUOTABLE.search(value):
        raise UserError(
            f"--{name}={value!r} cannot stand in a batch script",
            where=where,
            fix="leave out quotes, backslashes and line ends",
        )
    return f"#SBATCH --{name}=" + (value if PLAIN.fullmatch(value) else f'"{value}"')


def _check_environment(spec: JobSpec) -> None:
    where = "job.environment"
    for name in spec.environment:
        if not VARIABLE.fullmatch(name):
            raise UserError(
                f"{name!r} is no name of a variable", where=where, fix="use letters, digits and _"
            )
        if name in spec.variables or GIVEN_BY_SLURM.fullmatch(name):
            raise UserError(f"{name} is set by the job itself", where=where, fix="leave it out")
        if SECRET.search(name):
            raise UserError(
                f"{name} looks like a secret, and job files can be read by others",
                where=where,
                fix=f"leave it out; export {name} in the shell that submits, jobs inherit it",
            )


def _exports(spec: JobSpec) -> Iterator[str]:
    for name, value in (*spec.environment.items(), *spec.variables.items()):
        yield f"export {name}={shlex.quote(value)}"
    yield f"export MODULES={shlex.quote(' '.join(spec.modules))}"
    if "${launcher[@]}" in body(spec.body):
        yield f"launcher=({shlex.join(spec.launcher)})"
    if spec.arguments:
        yield f"set -- {shlex.join(spec.arguments)}"
