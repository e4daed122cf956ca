"""Makes one rank fail: TITANS_FAULT=KIND:RANK:STEP, with this directory on PYTHONPATH.

Python imports this module at its start; steps count from 1 in every process, but those of saves
(KIND ``save-...``) are the run's. At such a fault the file TITANS_MARK appears.
"""

import os
import signal
import time
from pathlib import Path

KIND, RANK, STEP = os.environ.get("TITANS_FAULT", "none:0:0").split(":")

if os.environ.get("RANK") == RANK and KIND.startswith("save-"):
    from titans_pretrain.checkpoint import publish, save, tensor_file

    MARK = Path(os.environ["TITANS_MARK"])
    name, write = publish._name, tensor_file.write

    def act():
        MARK.touch()
        if KIND.startswith("save-freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1)  # a signal to the process may reach this thread late
        while KIND == "save-wait" and MARK.exists():
            time.sleep(0.05)

    def failing_name(place):
        if place.step == int(STEP) and KIND != "save-freeze-writing":
            act()
        name(place)

    def failing_write(path, entries, boxes):
        def slow():
            for number, box in enumerate(boxes):
                if number == 1 and f".step-{STEP}." in str(path):
                    act()
                yield box

        return write(path, entries, slow() if KIND == "save-freeze-writing" else boxes)

    publish._name, save.tensor_file.write = failing_name, failing_write
elif os.environ.get("RANK") == RANK and KIND != "none":
    from titans_pretrain.parallel.zero import ZeroEngine
    from titans_pretrain.train.trainer import Trainer

    step, backward = Trainer._train_step, ZeroEngine.backward
    steps = 0

    def counted_step(self, *arguments):
        global steps
        steps += 1
        return step(self, *arguments)

    def failing_backward(self, loss, micro_batch=0):
        here = steps == int(STEP)
        if here and KIND == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and KIND == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if here and KIND == "sleep":
            time.sleep(3600)
        backward(self, loss * float("nan") if here and KIND == "nan" else loss, micro_batch)

    Trainer._train_step, ZeroEngine.backward = counted_step, failing_backward
