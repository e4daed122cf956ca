"""A rank that makes steps and then hangs: ``hanging_rank.py DIRECTORY RANK RANKS HOW``."""

import sys
import threading
import time
from pathlib import Path

from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import watch
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease

watch.POLL_SECONDS = 0.05
watch.LOOK_SECONDS = 0.2
watch.GATHER_SECONDS = 2.0
STEPS = 3
START = "this start"


def hang_like(how, whereabouts):
    if how in ("asleep", "patient"):
        time.sleep(60)
    elif how == "receiving":
        with whereabouts.waiting("model.layers.0", 1):
            threading.Event().wait(60)
    elif how == "spinning":
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass
    elif how == "ending":
        raise SystemExit(9)


def main(directory, rank, ranks, how):
    run, whereabouts = RunDirectory(Path(directory)), Whereabouts()
    terminal = sys.stderr
    if how == "full":  # as a log on a full disk
        sys.stdout.flush()
        sys.stderr = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - while it runs
    watching = watch.Watch(
        run,
        rank,
        ranks,
        whereabouts,
        lease=Lease(run.lock, START),
        seconds=60 if how == "patient" else 1,
        complain=lambda text: print(text, file=terminal, flush=True),
    )
    watching.start()
    for step in range(1, STEPS + 1):
        whereabouts.enter("forward", step=step, micro_batch=0)
        watching.begin("step")
        time.sleep(0.1)
    watching.begin("step")
    print("stuck", flush=True)
    if how == "failing":
        time.sleep(1.5)
        watching.settle()
        raise SystemExit(1)
    hang_like("asleep" if how == "full" else how, whereabouts)
    watching.end()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
