"""Runs of stub ranks under `titans attempt`, and what they left."""

import json
import sys
from pathlib import Path

import yaml
from tiny import MODEL

from launchers import history

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class StubRun:
    """One run: its configuration, its job file and its files."""

    def __init__(self, path, *, plays=(), steps=20, every=5, time="5", pipeline=None, **job):
        self.path = path
        jobs = path / "jobs"
        jobs.mkdir(parents=True)
        (path / "logs").mkdir()
        python = jobs / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/stub_rank.py "$@"\n')
        python.chmod(0o755)
        self.job = {"nodes": 2, "ranks_per_node": 2, "preflight": False, "signal_seconds": 60}
        self.job |= {"python": str(python), "time": time} | job
        self.config = jobs / "config.yaml"
        tree = {
            "model": MODEL,
            "data": {"manifest": str(path / "manifest.json"), "sequence_length": 64},
            "train": {"steps": steps, "global_batch_size": 8, "learning_rate": 0.1},
            "checkpoint": {"every": every},
            "run": {"directory": str(path)},
            "job": self.job,
            "pipeline": pipeline or {},
        }
        self.config.write_text(yaml.safe_dump(tree))
        self.script = jobs / "train.sbatch"
        self.script.write_text(self._script())
        named = {str(number): play for number, play in enumerate(plays, 1)}
        (path / "plays.json").write_text(json.dumps(named))

    def _script(self):
        job = self.job
        options = {
            "job-name": f"stub-{self.path.name}",
            "nodes": job["nodes"],
            "ntasks-per-node": job["ranks_per_node"],
            "time": job["time"],
            "signal": f"B:USR1@{job['signal_seconds']}",
            "output": f"{self.path}/logs/slurm-%j.log",
            "open-mode": "append",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
        python = f"PYTHONPATH={ROOT} OMP_NUM_THREADS=1 exec {sys.executable} -P"
        body = f"{python} {HERE}/quick_attempt.py {self.config}"
        return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", body, ""])

    @property
    def attempts(self):
        return history.attempts(self.path)

    @property
    def verdicts(self):
        return [attempt.verdict for attempt in self.attempts]

    @property
    def steps(self):
        """What metrics.jsonl holds, one number a row."""
        rows = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["step"] for row in rows]

    @property
    def log(self):
        return "".join(path.read_text() for path in sorted((self.path / "logs").glob("slurm-*")))

    def environment(self, attempt):
        return json.loads((self.path / f"environment-{attempt}.json").read_text())
