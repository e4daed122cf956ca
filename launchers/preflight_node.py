"""One node's part of a preflight: ``python -m launchers.preflight_node TASK``. No torch here.

It checks its node while its child processes (``launchers.fabric``) join the other nodes, and tells
by one file how far it came, in time for the batch process to read it.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from launchers import slurm_utils
from launchers.fabric import PHASES, Place
from launchers.preflight_facts import Facts, Task, collect

MARK = "titans-preflight"
PARTS = {"node", "ended", "first", "last", "doing", "values", "faults", "processes"}
IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SHARE = 0.85
FABRIC = (sys.executable, "-P", "-m", "launchers.fabric")


class Child:
    """A process of the fabric and what it has told.

    Args:
        number: among those of its node.
        process: its process.
        rows: the reading end of its pipe.
    """

    def __init__(self, number: int, process: "subprocess.Popen[bytes]", rows: int) -> None:
        self.number = number
        self.process = process
        self.rows = rows
        self.phase = PHASES[0]
        self.found: dict[str, Any] = {"pairs": []}
        self.heard = time.monotonic()
        self._rest = b""

    def read(self) -> bool:
        """Take in what has been written; whether there may be more."""
        data = os.read(self.rows, 65536)
        self.heard = time.monotonic()
        *rows, self._rest = (self._rest + data).split(b"\n")
        for row in rows:
            told = json.loads(row)
            self.phase = told.pop("phase", self.phase)
            if "pair" in told:
                self.found["pairs"].append(told["pair"])
            else:
                self.found |= told
        return bool(data)


class Node:
    """The checks of one node.

    Args:
        task: what is asked.
        environment: of the step, with SLURM's variables.
    """

    def __init__(self, task: Task, environment: Mapping[str, str]) -> None:
        self._task = task
        self._environment = environment
        self._name = environment["SLURMD_NODENAME"]
        self._facts = Facts()
        self._children: list[Child] = []
        self._first = time.time()
        late = min(max(self._first - task.begun, 0.0), task.seconds / 2)
        self._deadline = time.monotonic() + task.seconds * SHARE - late

    def run(self) -> None:
        """Check until all is known or time is up, and tell."""
        checks = threading.Thread(
            target=collect, args=(self._task, self._name, self._facts), daemon=True
        )
        checks.start()
        self._start_children()
        told = False
        with selectors.DefaultSelector() as waiting:
            for child in self._children:
                waiting.register(child.rows, selectors.EVENT_READ, child)
            while time.monotonic() < self._deadline and (waiting.get_map() or checks.is_alive()):
                for key, _ in waiting.select(0.1):
                    if not key.data.read():
                        waiting.unregister(key.fileobj)
                if not told and not checks.is_alive():
                    told = self._tell()
        self._tell(ended=True)
        for child in self._children:
            child.process.kill()

    def _start_children(self) -> None:
        environment, count = self._environment, max(1, self._task.gpus)
        hosts = slurm_utils.hostnames(environment["SLURM_STEP_NODELIST"])
        port = environment.get("MASTER_PORT") or slurm_utils.master_port(environment)
        for local in range(count):
            reading, writing = os.pipe()
            place = Place(
                node=int(environment["SLURM_NODEID"]),
                nodes=int(environment["SLURM_STEP_NUM_NODES"]),
                local=local,
                locals=count,
                address=environment.get("MASTER_ADDR") or hosts[0],
                port=int(port),
                seconds=self._task.seconds,
                cuda=self._task.gpus > 0,
                pipe=writing,
            )
            arguments = json.dumps(dataclasses.asdict(place))
            process = subprocess.Popen([*FABRIC, arguments], pass_fds=(writing,))
            os.close(writing)
            self._children.append(Child(local, process, reading))

    def _tell(self, *, ended: bool = False) -> bool:
        """Write the file, and say so at the terminal where that may be impossible."""
        now = time.monotonic()
        answer = {
            "node": self._name,
            "ended": ended,
            "first": self._first,
            "last": time.time(),
            "doing": self._facts.doing,
            "values": dict(self._facts.values),
            "faults": list(self._facts.faults),
            "processes": [
                {
                    "phase": child.phase,
                    "silent": now - child.heard,
                    "exit": child.process.poll(),
                    **child.found,
                }
                for child in self._children
            ],
        }
        if ended:
            phase = min((child.phase for child in self._children), key=PHASES.index)
            doing = f" in {self._facts.doing}" if self._facts.doing else ""
            print(f"{MARK} {self._name} {phase}{doing}", flush=True)
        path = Path(self._task.directory) / f"{self._name}.json"
        try:
            write(path, answer)
        except OSError as error:
            print(f"{MARK} {self._name} unwritable {error}"[:500], flush=True)
        return True


def write(path: Path, value: object) -> None:
    """Write JSON, whole or not at all. It is of use for seconds, so nothing is synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle: IO[str]
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "w", encoding="ascii") as handle:
            json.dump(value, handle)
        os.replace(temporary, path)


def main() -> None:
    """Check this node. A signal that asks to save finds nothing to save here."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Node(Task(**json.loads(sys.argv[1])), os.environ).run()
    os._exit(0)  # a check that hangs in its thread must not hold the step


if __name__ == "__main__":
    main()
