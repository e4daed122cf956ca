"""Which loaders go on exactly after a resume, ours and others, really run, in one table.

``python tests/benchmarks/elastic_resume.py`` makes the others' environment if need be and runs
every loader on 4 ranks: uninterrupted, and stopped half-way, saved, and resumed in each scenario
with the same global batch. A cell counts the global batches after the resume that hold the same
samples as without it, and the samples that came twice. Every rank is a process, in a gloo group.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import peers
from resume_worker import LENGTH, LOADERS, SAMPLES, Job

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "data"))

from made_shards import written  # noqa: E402

WORKER = HERE / "resume_worker.py"
TOLD = {
    "mosaic": "MosaicML streaming 0.13.0",
    "litdata": "litdata 0.2.76",
    "datasets": "datasets + StatefulDataLoader",
    "datasets-shuffled": "the same, shuffled",
    "webdataset": "webdataset 1.0.2",
    "ours": "ours",
}
HALF = 12  # steps before the resume, and after it
ERROR = "error: "
PATIENCE = 300  # seconds for one run


@dataclass(frozen=True)
class Scenario:
    """How a run is resumed."""

    told: str
    ranks: int = 4
    workers: int = 0
    moved: bool = False
    twice: bool = False


SCENARIOS = (
    Scenario("same world"),
    Scenario("4 to 2 ranks", ranks=2),
    Scenario("4 to 1 rank", ranks=1),
    Scenario("other workers", workers=2),
    Scenario("data moved", moved=True),
    Scenario("second resume", twice=True),
)


class FailedRun(Exception):
    """A loader raised; the message is its last line."""


def main() -> int:
    options = parsed()
    interpreter = peers.environment()
    table = {}
    for name in options.loaders:
        with tempfile.TemporaryDirectory(prefix=f"resume-{name}-") as folder:
            python = Path(sys.executable) if name in ("ours", "webdataset") else interpreter
            table[name] = Trial(name, Path(folder), python).cells()
        print(f"{name}: {json.dumps(table[name])}", file=sys.stderr, flush=True)
    show(table)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    if "ours" not in table:
        return 0
    exact = all(cell == f"{HALF}/{HALF}" for cell in table["ours"].values())
    print(f"{'PASS' if exact else 'FAIL'}  ours goes on exactly in every scenario")
    return int(options.check and not exact)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loaders", nargs="+", choices=TOLD, default=list(TOLD))
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--check", action="store_true", help="fail unless ours is exact")
    options = parser.parse_args()
    if options.check and "ours" not in options.loaders:
        parser.error("--check needs ours among --loaders")
    return options


def show(table: dict[str, dict[str, str]]) -> None:
    """Print a row for each loader, and what failed below the table."""
    reasons: list[str] = []
    print("\n" + f"{'':<32}" + "".join(f"{each.told:<18}" for each in SCENARIOS))
    for name, cells in table.items():
        row = []
        for each in SCENARIOS:
            cell = cells[each.told]
            if cell.startswith(ERROR):
                if cell not in reasons:
                    reasons.append(cell)
                cell = f"error ({reasons.index(cell) + 1})"
            row.append(f"{cell:<18}")
        print(f"{TOLD[name]:<32}" + "".join(row))
    for number, cell in enumerate(reasons, 1):
        print(f"({number}) {cell.removeprefix(ERROR)}")


class Trial:
    """One loader's runs.

    Args:
        name: of the loader.
        folder: for its files.
        python: the interpreter that has it.
    """

    def __init__(self, name: str, folder: Path, python: Path) -> None:
        self._name, self._folder, self._python = name, folder, python

    def cells(self) -> dict[str, str]:
        """What came of every scenario."""
        data = self._folder / "data"
        if self._name == "ours":
            written(data, np.array_split(stream(), 3), member_tokens=64 * LENGTH)
        else:
            peers.run([self._python, WORKER, "build", self._name, data])
        state = self._folder / "half"
        half = Job(self._name, str(data), steps=HALF, ranks=4, workers=0, save=str(state))
        try:
            whole = self._run(replace(half, steps=2 * HALF, save=None))
            if self._run(half) != whole[:HALF]:
                raise FailedRun("a rerun gives other batches")
        except FailedRun as error:
            return dict.fromkeys((each.told for each in SCENARIOS), f"{ERROR}{error}")
        return {each.told: self._cell(each, data, state, whole) for each in SCENARIOS}

    def _cell(self, scenario: Scenario, data: Path, state: Path, whole: list[list[int]]) -> str:
        place = data
        if scenario.moved:
            place = data.rename(self._folder / "elsewhere")
        job = Job(
            self._name,
            str(place),
            steps=HALF,
            ranks=scenario.ranks,
            workers=scenario.workers,
            load=str(state),
        )
        try:
            if scenario.twice:
                between = str(self._folder / "between")
                found = self._run(replace(job, steps=HALF // 2, save=between))
                found += self._run(replace(job, steps=HALF - HALF // 2, load=between))
            else:
                found = self._run(job)
        except FailedRun as error:
            return f"{ERROR}{error}"
        finally:
            if scenario.moved:
                place.rename(data)
        return judged(found, whole)

    def _run(self, job: Job) -> list[list[int]]:
        """The samples of every global batch, sorted."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        text, running = json.dumps(vars(job)), []
        for rank in range(job.ranks):
            words = [str(self._python), str(WORKER), "run", text, str(rank), str(port)]
            running.append(
                subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            said = [process.communicate(timeout=PATIENCE) for process in running]
        except subprocess.TimeoutExpired:
            raise FailedRun(f"no end within {PATIENCE} s") from None
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, (_, errors) in zip(running, said, strict=True):
            if process.returncode:
                raise FailedRun(reason(errors))
        rows = [json.loads(output.splitlines()[-1]) for output, _ in said]
        return [sorted(chain(*batch)) for batch in zip(*rows, strict=True)]


def stream() -> np.ndarray:
    """A stream whose every span of LENGTH tokens begins with its number."""
    return np.repeat(np.arange(SAMPLES + 1, dtype=np.uint16), LENGTH)[: SAMPLES * LENGTH + 1]


def judged(found: list[list[int]], whole: list[list[int]]) -> str:
    """How many batches are as without the resume, and how many samples came twice."""
    same = sum(a == b for a, b in zip(found, whole[HALF:], strict=True))
    before = set(chain(*whole[:HALF]))
    seen = [sample for batch in found for sample in batch]
    twice = len(seen) - len(set(seen) - before)
    return f"{same}/{HALF}" + (f", {twice} twice" if twice else "")


def reason(errors: str) -> str:
    """The line of a traceback that tells most."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "Exception" in line]
    return (told or lines or ["no message"])[-1][:160]


if __name__ == "__main__":
    assert set(TOLD) == set(LOADERS)
    sys.exit(main())
