"""Contenders that do next to nothing, in the way of titans_pretrain/bench/worker.py."""

import os
import signal
import sys
from pathlib import Path

from titans_pretrain.bench.contenders import Contender, Machine

FILE = Path(__file__)
ONE = Machine("cpu", 1)


def named(who, function="quick", *, required=True, **options):
    return Contender(who, FILE, function, options, required=required)


def quick(options):
    """Passes of any name that a benchmark asks for, which leave a line in ``options['log']``."""
    name, log = options.get("name", ""), options.get("log")

    def run():
        if log:
            with open(log, "a") as handle:
                handle.write(f"{name}\n")

    facts = {
        "parameters": 7,
        "scan_flops": 1000,
        "flops": 1000,
        "bytes": 1000,
        "tokens": 50,
        "version": "0.5.5",
        "torch": "2",
        "seen": {key: value for key, value in options.items() if key not in ("name", "log")},
    }
    passes = ("training", "scan", "product", "copy", "read")
    return facts, dict.fromkeys(passes, run)


def talks(options):
    print("a library's greeting")
    return {"argv": sys.argv[1:]}, {"training": lambda: print("done")}


def surroundings(options):
    threads = os.environ["OMP_NUM_THREADS"]
    here = str(Path(options["worker"]).parent)
    facts = {
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "shadowed": here in sys.path,
        "marked": os.environ.get("MARK"),
    }
    return facts, {}


def allocates(options):
    """Holds, once it has run, as much again as a pass needs while it runs."""
    held = []

    def training():
        held.append(bytearray(b"1") * options["length"])
        held[:] = held[-1:]

    return {}, {"training": training, "forget": held.clear}


def missing(options):
    import no_such_package_anywhere  # noqa: F401


def broken(options):
    raise ValueError("heads do not fit")


def fails_when_run(options):
    def run():
        raise MemoryError("no room")

    return {"parameters": 1, "scan_flops": 1}, {"training": run, "scan": run}


def dies(options):
    def run():
        os.kill(os.getpid(), signal.SIGKILL)

    return {}, {"training": run}


def exits(options):
    print("the reason", file=sys.stderr)
    os._exit(3)
