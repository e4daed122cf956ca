"""Makes one rank fail: TITANS_FAULT=KIND:RANK:STEP, with this directory on PYTHONPATH.

Python imports this module at its start; steps count from 1 in every process.
"""

import os
import signal
import time

KIND, RANK, STEP = os.environ.get("TITANS_FAULT", "none:0:0").split(":")

if os.environ.get("RANK") == RANK and KIND != "none":
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
