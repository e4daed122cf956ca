"""A tiny run under ``titans submit``, slow enough to be disturbed, and what it left."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from slurm_cluster import Cluster, until
from tiny import MODEL

from launchers import history
from titans_pretrain import cli
from titans_pretrain.checkpoint.format import newest_good
from titans_pretrain.checkpoint.load import read_tensors

HERE = Path(__file__).parent
CLOCK = ("seconds", "tokens_per_second", "flops_per_second", "mfu")


class Run:
    """One run on the cluster.

    Args:
        cluster: to run on.
        path: the run's directory.
        manifest: of its data.
        steps: of the whole run.
        every: steps between checkpoints.
        asynchronous: whether training goes on while a checkpoint is written.
        hang_seconds: that a step may take.
        job: keys of the section ``job``.
    """

    def __init__(
        self,
        cluster: Cluster,
        path: Path,
        manifest: Path,
        *,
        steps: int,
        every: int,
        asynchronous: bool = True,
        hang_seconds: float = 20,
        **job: Any,
    ) -> None:
        self.cluster, self.path, self.steps = cluster, path, steps
        self._pace = path.with_suffix(".pace")
        self.pace(0)
        search = os.pathsep.join(filter(None, [str(HERE / "pace"), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": search, "TITANS_PACE": str(self._pace)}
        tree = {
            "model": MODEL | {"memory_depth": 2, "num_persistent_tokens": 16},
            "data": {"manifest": str(manifest), "sequence_length": 32, "validation_fraction": 0.05},
            "train": {
                "steps": steps,
                "global_batch_size": 4,
                "learning_rate": 3e-3,
                "warmup_steps": 2,
                "precision": "fp32",
            },
            "checkpoint": {"every": every, "asynchronous": asynchronous},
            "run": {"directory": str(path), "hang_seconds": hang_seconds},
            "job": {"preflight": False, "environment": environment, "time": "30"} | job,
        }
        self.ranks = job.get("nodes", 1) * job.get("ranks_per_node", 1)
        self.config = path.with_suffix(".yaml")
        self.config.write_text(yaml.safe_dump(tree))

    def pace(self, seconds):
        """Make every step last so much longer from now on, the one under way included."""
        temporary = self._pace.with_suffix(".new")
        temporary.write_text(str(seconds))
        temporary.replace(self._pace)

    def submit(self):
        assert cli.main(["submit", str(self.config)]) in (None, 0)

    @contextmanager
    def left_alone(self) -> Iterator[Callable[[], int]]:
        """Train meanwhile without SLURM; waits for the end and gives the exit code."""
        command = [sys.executable, "-m", "titans_pretrain.cli", "train", str(self.config)]
        log = self.path.with_suffix(".log")
        with open(log, "w") as out:
            launcher = subprocess.Popen(
                [*command, "--ranks", str(self.ranks)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=out,
            )
        try:
            yield lambda: launcher.wait(300)
        finally:
            launcher.kill()
            launcher.wait()

    def finish(self, seconds=300):
        """Wait until the run's last job has ended, without any failure."""
        until(lambda: self.attempts and self.attempts[-1].verdict == "done", seconds, "the end")
        assert self.cluster.wait(self.job, seconds) == {"COMPLETED"}

    @property
    def attempts(self):
        return history.attempts(self.path)

    @property
    def job(self):
        """The job that goes on with the run."""
        return self.attempts[-1].job

    @property
    def nodes(self):
        """Of the newest attempt; the first is the batch host's, and that of rank 0."""
        return list(self.attempts[-1].nodes)

    @property
    def step(self):
        """The last step in metrics.jsonl."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def rows(self):
        """The whole rows of metrics.jsonl without what depends on the clock."""
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]

    @property
    def steps_done(self):
        """The steps of metrics.jsonl in order, validations left out."""
        return [row["step"] for row in self.rows() if "loss" in row]

    def tensors(self):
        """Every tensor of the last checkpoint."""
        path, damaged = newest_good(self.path / "checkpoints")
        assert path.name == f"step-{self.steps}"
        assert not damaged
        return dict(read_tensors(path, ""))

    def started(self):
        """Rank to host and process of the latest start."""
        return json.loads((self.path / "ranks.json").read_text())

    def rank_processes(self, rank):
        """This host's pids of a rank, whatever its own process namespace calls them."""
        node = self.nodes[rank * len(self.nodes) // len(self.started())]
        return [pid for pid in self.cluster.node_processes(node) if _is_rank(pid, rank)]


def _is_rank(pid, rank):
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in command and f"SLURM_PROCID={rank}".encode() in environment
