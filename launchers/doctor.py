"""``titans doctor``: whether this login node and its cluster are fit for a run. No torch here."""

import itertools
import json
import netrc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launchers import checks, pipeline, slurm_refusals, slurm_utils, submit
from launchers.slurm_command import call
from titans_pretrain import config as run_config
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.config_job import JobSection, minutes
from titans_pretrain.errors import TitansError

OLDEST = (20, 11)
IMPORT_SECONDS = 300
PACKAGES = ("torch", "deepspeed", "megatron.core", "titans_pretrain", "launchers")
OWN_DISK = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"})
MOUNTS = Path("/proc/mounts")
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
GPU = re.compile(r"gpu:(?:([^:,()]+):)?(\d+)")
NO_ANSWER = (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError, AttributeError)
IMPORTS = """
import importlib, json, sys
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found[name] = str(getattr(module, "__version__", "here"))
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        found[name] = f"! {type(error).__name__}: {lines[0]}"
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        level: ``fail`` keeps a run from going, ``warn`` may.
        what: what was looked at, and what was found.
        fix: what to do about it; empty where all is well.
    """

    level: Literal["ok", "warn", "fail"]
    what: str
    fix: str = ""


def doctor(config_path: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Print what was found, a line each; 0, or 1 if something keeps runs from going.

    Args:
        config_path: a run's YAML, to look at what it needs; None looks at the cluster alone.
        overrides: ``section.key=value``.

    Raises:
        UserError: the configuration is bad.
    """
    config = run_config.load(config_path, overrides) if config_path else None
    found = []
    for finding in _findings(config):
        found.append(finding)
        print(f"{finding.level:4}  {finding.what}", flush=True)
        if finding.fix:
            print(f"      fix: {finding.fix}", flush=True)
    failed, warned = (sum(one.level == level for one in found) for level in ("fail", "warn"))
    print(f"{len(found)} looked at: {failed} fail, {warned} warn")
    return errors.FAILED if failed else errors.DONE


def _findings(config: RunConfig | None) -> Iterator[Finding]:
    job = config.job if config else JobSection()
    yield from _slurm(job, asked=config is not None)
    yield from _python(job)
    yield from _container(job)
    yield from _no_modules(job)
    if config is not None:
        yield from _asked_of(config)
        yield from _directory(Path(config.run.directory).absolute())
        yield from _wandb(config)
    yield from _ports()


def _slurm(job: JobSection, *, asked: bool) -> Iterator[Finding]:
    """Commands, controller and partitions."""
    if not slurm_utils.available():
        fix = "run this on a login node, or load its slurm module"
        yield Finding("fail", "SLURM: no sbatch and scontrol on PATH", fix)
        return
    try:
        yield _version()
        settings = slurm_utils.settings()
        yield Finding("ok", f"controller: answers for cluster {settings.get('ClusterName', '?')}")
        yield _preemption(settings)
        partitions = slurm_refusals.partitions()
        gpus = _gpus()
    except TitansError as error:
        yield Finding("fail", f"SLURM: {error.what}", error.fix)
        return
    for name, facts in partitions.items():
        yield Finding("ok", _described(name, facts, gpus.get(name, {})))
    if asked:
        yield from _profile(job, partitions, gpus)


def _version() -> Finding:
    found = slurm_utils.version()
    told = f"SLURM: {found[0]}.{found[1]:02d}"
    if found < OLDEST:
        oldest = f"{OLDEST[0]}.{OLDEST[1]:02d}"
        return Finding("warn", told, f"tested from {oldest} on: expect options to be refused")
    return Finding("ok", told)


def _preemption(settings: dict[str, str]) -> Finding:
    """Whether and how the site preempts; a requeued job goes on by itself."""
    kind, mode = settings.get("PreemptType", ""), settings.get("PreemptMode", "")
    if "none" in kind.lower() or not kind:
        return Finding("ok", "preemption: none")
    user_signal = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    told = "sends the job's own signal" if user_signal else "sends SIGTERM to the ranks"
    found = f"preemption: {kind}, mode {mode}; {told}"
    if "CANCEL" in mode.upper():
        return Finding("warn", found, "a preempted job does not come back: submit with --resume")
    return Finding("ok", found)


def _described(name: str, facts: dict[str, str], gpus: dict[str, int]) -> str:
    told = [
        f"{facts.get('TotalNodes', '?')} nodes",
        f"time at most {facts.get('MaxTime', '?')}",
        f"grace {facts.get('GraceTime', '?')} s",
        f"preempted jobs: {facts.get('PreemptMode', '?').lower()}",
        facts.get("State", "?").lower(),
    ]
    told += [
        f"{count} GPUs a node" + (f" ({kind})" if kind else "") for kind, count in gpus.items()
    ]
    default = " (default)" if facts.get("Default") == "YES" else ""
    return f"partition {name}{default}: {', '.join(told)}"


def _gpus() -> dict[str, dict[str, int]]:
    """Of each partition its GPUs by type, the most on a node."""
    found: dict[str, dict[str, int]] = {}
    for line in call(["sinfo", "--noheader", "--format=%R|%G"]).splitlines():
        name, _, listed = line.partition("|")
        of = found.setdefault(name, {})
        for kind, count in GPU.findall(listed):
            of[kind] = max(int(count), of.get(kind, 0))
    return found


def _profile(
    job: JobSection, partitions: dict[str, dict[str, str]], gpus: dict[str, dict[str, int]]
) -> Iterator[Finding]:
    """The keys of ``job`` against the partitions it names."""
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    names = job.partition.split(",") if job.partition else default
    if not names:
        fix = f"set job.partition to one of {', '.join(partitions)}"
        yield Finding("fail", "job.partition: none given, and the site has no default", fix)
    found = {
        name: list(_fits(job, name, partitions[name], gpus.get(name, {})))
        for name in names
        if name in partitions
    }
    for name in names:
        if name not in partitions:
            yield Finding("fail", f"job.partition: no {name!r}", errors.nearest(name, partitions))
    one_will_do = any(all(one.level != "fail" for one in told) for told in found.values())
    for one in itertools.chain(*found.values()):
        yield replace(one, level="warn") if one_will_do and one.level == "fail" else one


def _fits(
    job: JobSection, name: str, facts: dict[str, str], gpus: dict[str, int]
) -> Iterator[Finding]:
    """One partition against time, nodes and GPUs of the job."""
    longest, nodes = facts.get("MaxTime", ""), facts.get("TotalNodes", "")
    before = []
    if longest not in ("", "UNLIMITED") and job.minutes > minutes(longest):
        told = f"job.time: {job.time} exceeds {longest} of {name}"
        if job.qos:
            fix = f"see whether qos {job.qos} allows more: sacctmgr show qos {job.qos}"
            before.append(Finding("warn", told, fix))
        else:
            before.append(Finding("fail", told, f"use job.time={longest} or less"))
    if nodes.isdigit() and job.nodes > int(nodes):
        told = f"job.nodes: {job.nodes}, {name} has {nodes}"
        before.append(Finding("fail", told, f"use job.nodes={nodes} or fewer"))
    if facts.get("State", "UP") != "UP":
        told = f"job.partition: {name} is {facts['State'].lower()}"
        before.append(Finding("warn", told, "choose another, or wait"))
    most = gpus.get(job.gpu_type, 0) if job.gpu_type else max(gpus.values(), default=0)
    if job.gpus_per_node > most:
        told = f"job.gpus_per_node: {job.gpus_per_node} {job.gpu_type}".rstrip()
        have = ", ".join(f"{count} {kind}".rstrip() for kind, count in gpus.items()) or "none"
        before.append(Finding("fail", f"{told}, a node of {name} has {have}", "ask for those"))
    yield from before or [Finding("ok", f"job: fits partition {name}")]


def _python(job: JobSection) -> Iterator[Finding]:
    """What the interpreter of the nodes imports, asked of it here."""
    if job.container is not None:
        yield Finding("ok", "python: in the container; its packages show when the job starts")
        return
    program = job.python or sys.executable
    if shutil.which(program) is None:
        fix = "give job.python an interpreter that login and compute nodes see"
        yield Finding("fail", f"job.python: {program} is no program here", fix)
        return
    try:
        done = subprocess.run(
            [program, "-P", "-c", IMPORTS, *PACKAGES],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=IMPORT_SECONDS,
            check=False,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        version = found.pop("python")
    except NO_ANSWER as error:
        fix = "give job.python a Python 3.11 or newer with this package installed"
        yield Finding("fail", f"{program}: cannot be asked: {type(error).__name__}", fix)
        return
    yield Finding("ok", f"python: {version} ({program})")
    for name, told in found.items():
        if told.startswith("! "):
            fix = f"install it for {program}"
            yield Finding("fail", f"{name}: {told[2:]}", fix)
        else:
            yield Finding("ok", f"{name}: {told}")


def _container(job: JobSection) -> Iterator[Finding]:
    if job.container is None:
        return
    if job.container.runtime == "apptainer":
        if shutil.which("apptainer"):
            yield Finding("ok", "container: apptainer is here")
        else:
            fix = "load its module under job.modules if the nodes lack it, too"
            yield Finding("warn", "container: no apptainer on this host", fix)
        return
    try:
        known = "--container-image" in call(["srun", "--help"])
    except TitansError:
        known = False
    if known:
        yield Finding("ok", "container: srun knows pyxis")
    else:
        fix = "ask the site for pyxis, or use job.container.runtime: apptainer"
        yield Finding("fail", "container: srun has no --container-image", fix)


def _no_modules(job: JobSection) -> Iterator[Finding]:
    if job.modules and not checks.has_modules():
        fix = "leave job.modules out if the nodes have no such command either"
        yield Finding("warn", "job.modules: no command `module` on this host", fix)


def _asked_of(config: RunConfig) -> Iterator[Finding]:
    """What ``titans submit`` refuses."""
    run = Path(config.run.directory)
    looks: list[tuple[str, Callable[[], list[str] | None]]] = [
        ("mesh and time: fit", lambda: checks.of_config(config)),
        ("room and grace: enough for a checkpoint", lambda: checks.of_run(config, run)),
        ("modules, interpreter, image: there", lambda: checks.of_host(config.job)),
    ]
    if config.pipeline.data is None:
        looks.append(("data: there", lambda: checks.of_data(config)))
    if slurm_utils.available():
        looks.append(
            ("job: SLURM would run it", lambda: submit.ask([pipeline.training(config, run)]))
        )
    for what, look in looks:
        yield from _tried(what, look)
    for sentence in checks.warnings(config, run):
        yield Finding("warn", sentence)


def _tried(what: str, look: Callable[[], list[str] | None]) -> Iterator[Finding]:
    try:
        told = look() or []
        yield from [Finding("warn", sentence) for sentence in told] or [Finding("ok", what)]
    except TitansError as error:
        yield Finding("fail", error.what, error.fix)


def _directory(run: Path) -> Iterator[Finding]:
    """Where the run's files go: writable, room, and whether nodes may see it."""
    place = checks.existing(run)
    kind = _file_system(place)
    free = shutil.disk_usage(place).free / 1e9
    told = f"run.directory: {place} on {kind or 'an unknown file system'}, {free:,.0f} GB free"
    if not (place.is_dir() and os.access(place, os.W_OK)):
        yield Finding("fail", f"run.directory: {place} cannot be written", "choose another")
    elif kind in OWN_DISK:
        fix = "choose one that all nodes mount, unless they share it; only a job can tell"
        yield Finding("warn", f"{told}: looks like this host's own disk", fix)
    else:
        yield Finding("ok", f"{told}; only a job can tell whether the nodes see it")


def _file_system(place: Path) -> str:
    """The type of the file system that holds a path, "" if it cannot be told."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    resolved = place.resolve()
    for line in lines:
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        if resolved.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def _wandb(config: RunConfig) -> Iterator[Finding]:
    """Whether a key is set; it is never shown."""
    if config.run.wandb_project is None:
        return
    if os.environ.get("WANDB_API_KEY") or _in_netrc():
        yield Finding("ok", "wandb: a key is set")
    else:
        fix = "wandb login, or export WANDB_API_KEY before titans submit"
        yield Finding("warn", "wandb: no key, the run logs offline", fix)


def _in_netrc() -> bool:
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2]
        return netrc.netrc().authenticators(host.rstrip("/")) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _ports() -> Iterator[Finding]:
    """Whether ranks' ports may be taken by outgoing connections."""
    try:
        text = PORT_RANGE.read_text(encoding="ascii")
        first = int(text.split()[0])
    except (OSError, ValueError, IndexError):
        return
    last = slurm_utils.FIRST_PORT + slurm_utils.PORTS - 1
    told = f"ports: ranks meet at {slurm_utils.FIRST_PORT} to {last}, outgoing begin at {first}"
    if first > last:
        yield Finding("ok", told)
    else:
        fix = "net.ipv4.ip_local_port_range from 32768 keeps them apart"
        yield Finding("warn", f"{told}: a start may find its port taken", fix)
