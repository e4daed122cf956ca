"""What one node can tell about itself: versions, run directory, memory, GPUs. No torch here."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("titans-pretrain", "torch", "deepspeed", "transformers", "megatron-core")
CODE = ("titans_pretrain", "launchers")
WRITE_SECONDS = 2.0
WRITE_PIECE = 2**20
GPU_SECONDS = 20.0
GPU_QUERY = "name,ecc.errors.uncorrected.volatile.total"
ASK_SITE = "tell the site's administrators"


@dataclass(frozen=True)
class Task:
    """What the batch process asks of each node.

    Attributes:
        directory: of this check, in the run's directory, as all nodes see it.
        config: the run's configuration file.
        seconds: the node may take, from ``begun``.
        begun: the batch host's clock when the step began, in seconds.
        write_bytes: to write in order to measure the rate.
        gpus: on each node; 0 joins one process a node over gloo, else one a GPU over NCCL.
        scratch: node-local directory that must be writable; empty for none.
    """

    directory: str
    config: str
    seconds: float
    begun: float
    write_bytes: int
    gpus: int
    scratch: str


@dataclass
class Facts:
    """What the checks of one node found so far.

    Attributes:
        values: facts by name, for comparison with the other nodes.
        faults: ``{"what", "fix"}`` of what is wrong whatever the others say.
        doing: the check that runs now; empty when all have ended.
    """

    values: dict[str, Any] = field(default_factory=dict)
    faults: list[dict[str, str]] = field(default_factory=list)
    doing: str = "starting"

    def fault(self, what: str, fix: str) -> None:
        """Note what is wrong with this node."""
        self.faults.append({"what": what, "fix": fix})


def collect(task: Task, node: str, facts: Facts) -> None:
    """Run all checks of a node one after another; a check that fails becomes a fault."""
    checks: list[tuple[str, Callable[[], None]]] = [
        ("versions", lambda: _versions(facts)),
        ("code", lambda: facts.values.update(code=code_hash())),
        ("memory", lambda: facts.values.update(memory())),
        ("configuration", lambda: _configuration(task, facts)),
        ("run directory", lambda: _run_directory(task, node, facts)),
        ("local scratch", lambda: _scratch(task, node, facts)),
        ("GPUs", lambda: _gpus(task, facts)),
    ]
    for facts.doing, check in checks:
        try:
            check()
        except OSError as error:
            place = f" {error.filename}" if error.filename else ""
            facts.fault(
                f"{facts.doing}{place}: {error.strerror or error}",
                "make it readable and writable on every node, or leave this one out",
            )
    facts.doing = ""


def _versions(facts: Facts) -> None:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    facts.values["versions"] = versions


def code_hash() -> str:
    """One hash of the names and bytes of all modules that training runs."""
    root = Path(__file__).resolve().parent.parent
    found = hashlib.sha256()
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(content)}\n".encode())
            found.update(content)
    return found.hexdigest()


def memory() -> dict[str, int]:
    """Bytes of memory that the node has, and that are free for programs."""
    sizes = {}
    for row in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = row.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    return {"memory_bytes": sizes["MemTotal"], "memory_free_bytes": sizes["MemAvailable"]}


def _configuration(task: Task, facts: Facts) -> None:
    facts.values["config"] = hashlib.sha256(Path(task.config).read_bytes()).hexdigest()


def _run_directory(task: Task, node: str, facts: Facts) -> None:
    directory = Path(task.directory)
    facts.values["nonce"] = (directory / "nonce").read_text(encoding="ascii")
    facts.values["free_bytes"] = shutil.disk_usage(directory).free
    path = directory / f".write-{node}"
    try:
        facts.values["write_bytes_per_second"] = write_rate(path, task.write_bytes)
    finally:
        path.unlink(missing_ok=True)


def write_rate(path: Path, size: int, *, seconds: float = WRITE_SECONDS) -> float:
    """Bytes a second at which a file is written and synced, at best.

    Syncs cost a shared file system dearly, so each comes after twice as many bytes as the last;
    to write all at once would take a slow one too long.

    Args:
        path: of a file that is made for it.
        size: bytes to write at most.
        seconds: after which no further part is begun.
    """
    piece = os.urandom(min(size, WRITE_PIECE))
    begun, written, part, best = time.perf_counter(), 0, len(piece), 0.0
    with open(path, "wb", buffering=0) as handle:
        while written < size and (not written or time.perf_counter() - begun < seconds):
            part_begun, end = time.perf_counter(), min(size, written + part)
            first = written
            while written < end:
                written += handle.write(piece[: end - written])
            os.fsync(handle.fileno())
            best = max(best, (written - first) / max(time.perf_counter() - part_begun, 1e-6))
            part *= 2
    return best


def _scratch(task: Task, node: str, facts: Facts) -> None:
    if not task.scratch:
        return
    directory = Path(task.scratch)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".titans-write-{node}"
    try:
        write_rate(path, WRITE_PIECE)
    finally:
        path.unlink(missing_ok=True)
    facts.values["scratch_free_bytes"] = shutil.disk_usage(directory).free


def _gpus(task: Task, facts: Facts) -> None:
    """The names of the node's GPUs, and those that had errors no repair could undo."""
    if not task.gpus or shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        facts.fault(f"nvidia-smi does not answer within {GPU_SECONDS:.0f} s", ASK_SITE)
        return
    if done.returncode:
        told = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no word"]
        facts.fault(f"nvidia-smi ended with {done.returncode}: {told[0]}", ASK_SITE)
        return
    rows = [row.rsplit(",", 1) for row in done.stdout.splitlines() if row.strip()]
    facts.values["gpus"] = [name.strip() for name, _ in rows]
    for number, (name, errors) in enumerate(rows):
        if errors.strip().isdigit() and int(errors):
            facts.fault(
                f"GPU {number} ({name.strip()}) had {errors.strip()} uncorrectable memory errors",
                ASK_SITE,
            )
