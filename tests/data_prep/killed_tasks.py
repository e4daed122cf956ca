"""``python killed_tasks.py OUTPUT WORKERS AT_ONCE KILLS SECONDS SEED TASK…``

Does tasks of a frozen plan in forked processes, several at once, in the order given. Each is killed
up to KILLS times, within SECONDS of its start, and begun again; then it may end. A task may be
named twice. Prints how many were killed.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import task


@dataclass
class Attempts:
    number: int
    kills_left: int
    due: float = field(default=0.0)


def start(output, number, workers):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        task.prepare(output, number, workers=workers, say=lambda _: None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main(output, workers, at_once, kills, seconds, seed, *numbers):
    draw = random.Random(int(seed))
    waiting = deque(Attempts(int(number), int(kills)) for number in numbers)
    running, killed = {}, 0
    while waiting or running:
        while waiting and len(running) < int(at_once):
            one = waiting.popleft()
            wait = draw.uniform(0, float(seconds)) if one.kills_left else float("inf")
            one.due = time.monotonic() + wait
            running[start(Path(output), one.number, int(workers))] = one
        for pid, one in list(running.items()):
            if time.monotonic() >= one.due:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if time.monotonic() >= one.due else os.WNOHANG)
            if not done:
                continue
            del running[pid]
            if os.WIFSIGNALED(status):
                killed += 1
                one.kills_left -= 1
                waiting.insert(draw.randrange(len(waiting) + 1), one)
            elif status:
                sys.exit(f"task {one.number} failed")
        time.sleep(0.001)
    print(killed)


main(*sys.argv[1:])
