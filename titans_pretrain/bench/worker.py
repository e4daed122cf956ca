"""Measures contenders in a process of its own, in the interpreter that has what they need.

Run as a file: it imports nothing of this project, so that another environment's Python can run it.
A request is a line of JSON on standard input, an answer one on standard output. What is measured
comes from a function in a file, which returns ``(facts, passes)``: what there is to know, and
callables by name, among which ``forget`` may drop what others leave behind.
"""

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINES = 12


class Subject:
    """What is measured at present.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.passes: dict[str, Callable[[], object]] = {}

    def build(self, file: str, function: str, options: dict[str, Any]) -> dict[str, Any]:
        """Replace what was measured so far; returns the facts."""
        self.drop()
        facts, self.passes = _loaded(file, function)(options)
        return dict(facts)

    def drop(self) -> dict[str, Any]:
        """Forget what is measured, and its memory."""
        self.passes = {}
        gc.collect()
        self._rest()
        return {}

    def time(self, name: str, least_seconds: float) -> dict[str, Any]:
        """Seconds a call, by the clock and of all threads' processor time.

        Calls are repeated until they have taken ``least_seconds`` together.
        """
        run = self.passes[name]
        if self.device == "cuda":
            run()  # fills the allocator that the last turn left empty
        self._synchronize()
        calls, clock, processor = 0, time.perf_counter(), time.process_time()
        while calls == 0 or time.perf_counter() - clock < least_seconds:
            run()
            self._synchronize()
            calls += 1
        taken = {
            "seconds": (time.perf_counter() - clock) / calls,
            "processor": (time.process_time() - processor) / calls,
        }
        self.passes.get("forget", int)()
        self._rest()
        return taken

    def peak(self, name: str) -> dict[str, Any]:
        """Bytes that one call needs at most beyond what is held before it.

        A call before it does not count: it leaves what libraries make once.
        """
        run = self.passes[name]
        run()
        self.passes.get("forget", int)()
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return {"bytes": torch.cuda.max_memory_allocated() - before}
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _resident("VmRSS")
        run()
        return {"bytes": _resident("VmHWM") - before}

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _rest(self) -> None:
        """Leave the GPU's memory to the others."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def _loaded(file: str, function: str) -> Callable[[dict[str, Any]], Any]:
    """A function of a file that need not belong to a package."""
    spec = importlib.util.spec_from_file_location(f"contender_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Callable[[dict[str, Any]], Any] = getattr(module, function)
    return found


def _trim() -> None:
    """Give freed memory back to the system, or what is allocated next seems to need none."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    """Answer requests until there are none: arguments are the device and 0 or the cores to use."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]  # names here hide nobody's modules
    cores = int(sys.argv[2])
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    subject = Subject(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(subject, request.pop("do"))(**request)
        except Exception as error:
            told = str(error).strip().splitlines()[:LINES] or [""]
            answer = {"error": type(error).__name__, "told": "\n".join(told)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
