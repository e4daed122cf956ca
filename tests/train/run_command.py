"""The ``titans train`` command as a process of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Run:
    """A run's file and directory, and the command that trains it."""

    file: Path
    directory: Path

    def start(self, *arguments, **environment):
        """The running command; its output is read by ``end``."""
        return subprocess.Popen(
            [sys.executable, "-m", "titans_pretrain.cli", "train", str(self.file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def train(self, *arguments, timeout=240, **environment):
        """Run the command to its end: exit code, standard output, standard error."""
        return end(self.start(*arguments, **environment), timeout)

    def train_by(self, program, **environment):
        """Run a Python program with the command's arguments to its end; like ``train``."""
        process = subprocess.Popen(
            [sys.executable, "-c", program, "train", str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        return end(process)

    def rows(self):
        """Whole rows of metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def timeless(self):
        """Its rows without what depends on the clock."""
        clock = ("seconds", "tokens_per_second", "flops_per_second", "mfu")
        return [{k: v for k, v in row.items() if k not in clock} for row in self.rows()]

    def steps_saved(self):
        return sorted(
            int(path.name.removeprefix("step-"))
            for path in (self.directory / "checkpoints").glob("step-*")
        )

    def wait_for_step(self, step, process, timeout=240):
        deadline = time.monotonic() + timeout
        while not any(row["step"] >= step for row in self.rows()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.05)

    def processes(self):
        """The ranks' process numbers."""
        ranks = json.loads((self.directory / "ranks.json").read_text())
        return [ranks[str(rank)]["pid"] for rank in range(len(ranks))]


def end(process, timeout=240):
    try:
        out, complaints = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, complaints
