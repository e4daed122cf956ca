"""A run's directory as trainer, attempts and submissions leave it, and a SLURM that is told."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from launchers import run_state, slurm_command, slurm_jobs, slurm_utils
from launchers.history import Attempt
from launchers.slurm_jobs import Job

NAME = "titans-demo-01234567"


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class RunFiles:
    """What stands in a run's directory; every method adds or replaces one thing."""

    def __init__(self, path: Path, *, steps: int = 100) -> None:
        self.path = path
        (path / "checkpoints").mkdir(parents=True)
        (path / "logs").mkdir()
        config = {"run": {"directory": str(path), "name": ""}, "train": {"steps": steps}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))

    def metrics(self, last: int, *, seconds: float = 2.0) -> None:
        rows = [
            {
                "step": step,
                "loss": 5 - step / 100,
                "learning_rate": 0.1,
                "tokens_per_second": 1500.0,
                "seconds": seconds,
            }
            for step in range(1, last + 1)
        ]
        lines = [json.dumps(row) + "\n" for row in [*rows, {"step": last, "validation_loss": 1.0}]]
        (self.path / "metrics.jsonl").write_text("".join(lines))

    def start(self, name: str, ranks: int = 2, *, age: float = 3.0) -> None:
        """Ranks that gave a sign of life so many seconds ago."""
        places = {
            str(rank): {"host": f"node{rank}", "pid": 7, "start": name} for rank in range(ranks)
        }
        write(self.path / "ranks.json", places)
        write(self.path / ".lock", {"start": name, "attempt": 1, "job": "7"})
        for rank in range(ranks):
            self.beat(name, rank, age=age)

    def beat(self, start: str, rank: int, *, age: float) -> None:
        place = {"start": start, "rank": rank, "host": f"node{rank}", "time": time.time() - age}
        write(
            self.path / "heartbeat" / f"rank-{rank}.json", place | {"step": 1, "phase": "forward"}
        )

    def error(self, start: str) -> None:
        told = {"rank": 3, "host": "node1", "time": "2026-01-01T00:00:00+0000", "where": "rank 3"}
        told |= {
            "what": "out of GPU memory",
            "fix": "use more ranks",
            "traceback": ["in forward\n"],
        }
        write(self.path / "error.json", told | {"start": start, "traceback": ["in forward\n"]})

    def outcome(self, start: str, outcome: str) -> None:
        write(self.path / "outcome.json", {"start": start, "outcome": outcome})

    def attempt(self, number: int, **fields) -> None:
        values = {"job": "7", "restart": 0, "host": "node0", "nodes": ("node0", "node1")}
        attempt = Attempt(number=number, **(values | {"begun": 100.0} | fields))
        write(self.path / "attempts" / f"attempt-{number}.json", asdict(attempt))

    def job(self, job: str, stage: str = "train", *, name: str = NAME) -> None:
        script = self.path / "jobs" / f"{stage}.sbatch"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/bash\n#SBATCH --job-name={name}\n")
        row = {"time": "", "stage": stage, "job": job, "depends": [], "script": str(script)}
        with open(self.path / "jobs" / "jobs.jsonl", "a") as handle:
            handle.write(json.dumps(row) + "\n")

    def save(self, step: int) -> None:
        (self.path / "checkpoints" / f"step-{step}").mkdir()


def job(id_: str, state: str, name: str = NAME, *, reason: str = "", left: int = 0) -> Job:
    """What SLURM tells of a job."""
    array, element, _ = id_.partition("_")
    return Job(
        id=id_, number=id_, array=array if element else "", name=name, user="me", state=state,
        reason=reason, restarts=0, nodelist="", partition="main", submitted=0.0, start_time=None,
        end_time=None, seconds_left=left or None, dependency="", batch_host="",
    )  # fmt: skip


class ToldSlurm:
    """A SLURM that knows the jobs it is told, and remembers what it is asked to cancel.

    Attributes:
        jobs: all that it knows.
        answers: whether it does.
        cancelled: ids, in order.
        beginning: of these jobs that wait, each runs as soon as it is to be cancelled.
        coming: jobs that come into the queue with the first cancel.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Job] = []
        self.answers, self.cancelled = True, []
        self.beginning, self.coming = [], []
        patch.setattr(slurm_command, "available", lambda: True)
        patch.setattr(slurm_command, "run", self._run)
        patch.setattr(slurm_jobs, "jobs", self._known)
        patch.setattr(slurm_utils, "cancel", self._cancel)

    def _run(self, command, **_):
        assert command == ["scontrol", "ping"]
        return slurm_command.Answer(0 if self.answers else 1, b"", "")

    def _known(self, ids):
        return [one for one in self.jobs if run_state.base(one.id) in ids]

    def _cancel(self, one, *, waiting=False):
        begun = {one for one in self.jobs if one.id in self.beginning}
        self.jobs = [replace(a, state="RUNNING") if a in begun else a for a in self.jobs]
        named = [job for job in self.jobs if one in (job.id, run_state.base(job.id))]
        ended = [job for job in named if not (waiting and job.running)]
        self.cancelled += [one] if ended else []
        self.jobs = [job for job in self.jobs if job not in ended] + self.coming
        self.coming = []
