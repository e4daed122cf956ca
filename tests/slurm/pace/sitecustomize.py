"""Makes every training step last longer, by the seconds in the file TITANS_PACE.

With this directory on PYTHONPATH, Python imports this module at its start.
"""

import os
import sys
import time
from pathlib import Path

if "train" in sys.orig_argv and "TITANS_PACE" in os.environ:
    from titans_pretrain.train.trainer import Trainer

    step = Trainer._train_step
    pace = Path(os.environ["TITANS_PACE"])

    def paced(self, *arguments):
        done, begun = step(self, *arguments), time.monotonic()
        while time.monotonic() - begun < float(pace.read_text()):
            time.sleep(0.05)
        return done

    Trainer._train_step = paced
