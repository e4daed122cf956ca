"""What is kept of a step that is ended from outside, before it is. No torch here."""

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launchers.slurm_utils import Allocation
from titans_pretrain.train.directory import RunDirectory

COMMAND_SECONDS = 20.0
STACKS = (
    "command -v py-spy >/dev/null || { echo 'no py-spy on this node'; exit 0; }; "
    "for pid in $(pgrep -f 'titans_pretrain[.]cli train'); do "
    'echo "process $pid"; py-spy dump --nonblocking --pid "$pid"; done'
)


def save(run: RunDirectory, allocation: Allocation, place: Path, why: str) -> None:
    """Keep the ranks' records, what SLURM says of the job and its nodes, and stacks.

    Args:
        run: whose ranks they are.
        allocation: the job.
        place: a new directory; what cannot be had or written is left out.
        why: the reason for the end.
    """
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        (place / "why.txt").write_text(f"{why}\n", encoding="utf-8")
    for source in (run.heartbeat, run.hang):
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(source, place / source.name, dirs_exist_ok=True)
    nodes = ",".join(allocation.nodes)
    commands = {
        "job.txt": ("scontrol", "show", "job", allocation.job),
        "nodes.txt": ("scontrol", "show", "node", nodes),
        "stacks.txt": _stacks(allocation),
    }
    for name, command in commands.items():
        with contextlib.suppress(OSError):
            (place / name).write_text(_told(command), encoding="utf-8")


def _stacks(allocation: Allocation) -> tuple[str, ...]:
    """Python's stacks of all ranks, by py-spy, which need not be there; beside the step."""
    nodes = str(len(allocation.nodes))
    step = (
        "srun",
        "--overlap",
        f"--jobid={allocation.job}",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
    )
    return (*step, "--ntasks-per-node=1", "--mem=0", "--label", "bash", "-c", STACKS)


def _told(command: Sequence[str]) -> str:
    """What a command prints, within a time limit."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return f"{output.decode(errors='replace')}\nno answer in {COMMAND_SECONDS:g} s\n"
    except OSError as error:
        return f"{command[0]}: {error.strerror}\n"
    return done.stdout.decode(errors="replace")
