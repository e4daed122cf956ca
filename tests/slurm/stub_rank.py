"""A rank without torch: what `titans train` leaves in a run's directory, with made-up failures.

`plays.json` in the run's directory names what each attempt plays; without a name it trains.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.files import read_json, write_json
from titans_pretrain.train import heartbeat
from titans_pretrain.train.directory import RunDirectory

if "eval-checkpoint" in sys.argv:
    from stub_evaluation import evaluate

    sys.exit(evaluate(Path(sys.argv[sys.argv.index("eval-checkpoint") + 1])))

ATTEMPT = int(os.environ["TITANS_ATTEMPT"])
RANK, RANKS = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
HOST = socket.gethostname()
asked: list[str] = []


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
    config = run_config.load(next(word for word in sys.argv if word.endswith(".yaml")))
    run = RunDirectory(Path(config.run.directory))
    play = (read_json(run.path / "plays.json") or {}).get(str(ATTEMPT), "train")
    steps = layout.steps(run.checkpoints)
    begun = run.path / f"environment-{ATTEMPT}.json"
    if RANK == 0:
        run.create()
        run.outcome.unlink(missing_ok=True)
        run.error.unlink(missing_ok=True)
        write_json(begun, dict(os.environ))
    while not begun.exists():  # rank 0 has removed what earlier attempts told
        time.sleep(0.05)
    return Rank(run, config, max(steps, default=0)).play(play)


class Rank:
    def __init__(self, run: RunDirectory, config: run_config.RunConfig, step: int) -> None:
        self.run, self.config, self.step = run, config, step

    def play(self, name: str) -> int:
        if name == "mute":
            time.sleep(600)
        self.beat()
        if name == "nothing":
            return 0
        if name == "silent":
            time.sleep(600)
        if name == "refuse":
            return self.fail(2, "the data is not there")
        if name == "linger":
            self.fail(75, "step 2 hangs")
            self.only_beat()
        if name == "deaf":
            self.go_on(6, heed=False)
            self.only_beat()
        if name == "crash once evaluated":
            self.go_on(7)
            while not (self.run.path / "evaluations" / "step-5.json").exists():
                self.beat()
                time.sleep(0.1)
            return self.fail(1, "RuntimeError: made up")
        self.go_on(2 if name != "train" else 10**9, slowly=name == "slow")
        if name == "hang":
            return self.fail(75, f"step {self.step} hangs: rank {RANKS - 1} is silent")
        if name == "crash":
            return self.fail(1, "RuntimeError: made up")
        if name == "killed" and RANK == RANKS - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if name != "train":  # a stop is agreed by all ranks, so not after one was killed
            self.go_on(10**9, slowly=True, heed=name != "killed")
        return self.code

    code = 0

    def go_on(self, count: int, *, heed: bool = True, slowly: bool = False) -> None:
        """Steps, at most so many; ends the process when the run ends or is to stop."""
        for _ in range(count):
            if self.told():
                sys.exit(self.code)
            if self.step >= self.config.train.steps:
                self.end("done", "", 0)
            if heed and asked and RANK == 0:
                self.end("stopped", "signal", 75)
            if self.run.stop.exists() and RANK == 0:
                self.run.stop.unlink()
                self.end("stopped", "file", 75)
            time.sleep(0.5 if slowly else 0.1)
            self.beat()
            if RANK == 0:
                self.step += 1
                row = {"step": self.step, "loss": 1 / self.step}
                with open(self.run.metrics, "a") as handle:
                    handle.write(json.dumps(row) + "\n")
                every = self.config.checkpoint.every
                if every and self.step % every == 0:
                    self.save()

    def only_beat(self) -> None:
        while True:
            self.beat()
            time.sleep(0.5)

    def told(self) -> bool:
        """Whether another rank told the end of this attempt."""
        for record in (read_json(self.run.outcome), read_json(self.run.error)):
            if record is not None and record["attempt"] == ATTEMPT and RANK:
                self.code = record["exit_code"]
                return True
        return False

    def end(self, outcome: str, by: str, code: int) -> None:
        if RANK == 0:
            self.save()
            record = {"start": "s", "attempt": ATTEMPT, "outcome": outcome, "asked_by": by}
            record |= {"reason": f"{outcome} {' '.join(asked)}", "step": self.step}
            record |= {"saved_step": self.step, "saved": "now", "seconds": 0.1}
            write_json(self.run.outcome, record | {"exit_code": code})
            sys.exit(code)

    def fail(self, code: int, what: str) -> int:
        """The last rank tells it; the others, as real ones, leave only then."""
        if RANK == RANKS - 1:
            record = {"start": "s", "attempt": ATTEMPT, "rank": RANK, "host": HOST, "what": what}
            write_json(self.run.error, record | {"exit_code": code, "where": "", "fix": ""})
        deadline = time.monotonic() + 20
        while (read_json(self.run.error) or {}).get("attempt") != ATTEMPT:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return code

    def save(self) -> None:
        path = self.run.checkpoints / layout.step_name(self.step)
        if path.exists():
            return
        place = path.with_name(f".{path.name}.{ATTEMPT}.tmp")
        place.mkdir(parents=True)
        index = {"format": layout.FORMAT, "files": [], "tensors": {}}
        files = [manifest.write_file(place, layout.TENSORS, json.dumps(index).encode())]
        facts = {"format": layout.FORMAT, "step": self.step, "tensors": {}}
        manifest.write(place, files, facts)
        place.rename(path)
        write_json(self.run.last_save, {"step": self.step, "seconds": 0.1, "bytes": 100})

    def beat(self) -> None:
        now = {"start": "s", "attempt": ATTEMPT, "rank": RANK, "host": HOST, "pid": os.getpid()}
        heartbeat.write(
            self.run, now | {"time": time.time(), "phase": "forward", "step": self.step, "told": ""}
        )


if __name__ == "__main__":
    sys.exit(main())
