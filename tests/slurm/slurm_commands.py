"""SLURM's commands as a test uses them: submit jobs, wait for them, read what they wrote."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
}  # fmt: skip
SYSTEM_PATH = "/usr/sbin:/sbin"


class ClusterError(Exception):
    """The test cluster did not do what a test needs of it."""


def until(condition: Callable[[], object], seconds: float = 60.0, what: str = "") -> None:
    """Waits until the condition holds; `seconds` is only the limit of a failure.

    Raises:
        ClusterError: it did not hold in time.
    """
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise ClusterError(f"waited {seconds:g} s in vain for {what or condition}")
        time.sleep(0.05)


class SlurmCommands:
    """The commands, on the cluster that a slurm.conf describes."""

    def __init__(self, conf: Path) -> None:
        self.conf = conf

    @property
    def environment(self) -> dict[str, str]:
        """Our environment for commands on this cluster; an outer job's variables are left out."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_"))
        }
        path = f"{kept.get('PATH', '')}:{SYSTEM_PATH}"
        return kept | {"SLURM_CONF": str(self.conf), "PATH": path}

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in this cluster's environment and directory; its output is text."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            env=self.environment,
            cwd=self.conf.parent if self.conf.parent.is_dir() else None,
            text=True,
            capture_output=True,
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr}")
        return done

    def submit(self, *arguments: object) -> str:
        """`sbatch` with these arguments; the job's id."""
        return self.run("sbatch", "--parsable", *arguments).stdout.strip()

    def jobs(self) -> list[str]:
        """Ids of all jobs of this cluster, ended ones included; an array has one."""
        listed = self.run("squeue", "-h", "-t", "all", "-S", "i", "-o", "%F", check=False)
        return list(dict.fromkeys(listed.stdout.split()))

    def states(self, job: str) -> set[str]:
        """States of a job, of all its elements if it is an array."""
        done = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False)
        return set(done.stdout.split())

    def wait(self, job: str, seconds: float = 120.0) -> set[str]:
        """Waits for the end of a job, of all its elements if it is an array; their states."""
        seen: set[str] = set()

        def ended() -> bool:
            seen.clear()
            seen.update(self.states(job))
            return bool(seen) and seen <= ENDED

        self._until(job, ended, seconds, "to end")
        return seen

    def wait_running(self, job: str, seconds: float = 60.0) -> list[str]:
        """Waits until a job runs; the names of its nodes."""
        self._until(job, lambda: "RUNNING" in self.states(job), seconds, "to run")
        nodes = self.run("squeue", "-h", "-j", job, "-o", "%N").stdout.split()
        return self.run("scontrol", "show", "hostnames", *nodes).stdout.split()

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self.run("squeue", "-h", "-t", "all", "-j", job, "-O", "restartcnt").stdout)

    def log(self, job: str) -> str:
        """What the job's batch script wrote, of an array that of all its elements."""
        shown = self.run("scontrol", "show", "job", "-o", job, check=False).stdout
        files = dict.fromkeys(re.findall(r"StdOut=(\S+)", shown))
        return "".join(
            Path(name).read_text(errors="replace") for name in files if Path(name).is_file()
        )

    def _until(self, job: str, condition: Callable[[], bool], seconds: float, what: str) -> None:
        try:
            until(condition, seconds, f"job {job} {what}")
        except ClusterError as error:
            columns = "%i %j %P %T %R"
            listed = self.run("squeue", "-t", "all", "-j", job, "-o", columns, check=False)
            error.add_note(listed.stdout + listed.stderr + self.log(job)[-4000:])
            raise

    def node_states(self) -> dict[str, str]:
        """`sinfo`'s state of each node: idle, mixed, allocated, down*, ..."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.splitlines()
        return dict(sorted(line.split() for line in lines))
