"""Tokens a second and core that loaders read from the page cache, ours and others, in one run.

``python tests/benchmarks/data_loader.py`` makes the others' environment if need be, writes one
token stream in every loader's format, and prints a table; ``--check`` fails below the targets. The
loaders take turns, round after round. In each, a process on one core hands out all tokens twice as
int64 tensors; the processor time of all its threads in the second pass counts.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import peers
from loader_rates import BUILDERS, READERS, SPAN

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "data"))

from made_shards import written  # noqa: E402

from data_prep.tar import MEMBER_TOKENS  # noqa: E402

WORKER = HERE / "loader_rates.py"
TOLD = {
    "raw-sequential": "numpy memmap, spans in order",
    "raw-random": "numpy memmap, random spans",
    "webdataset": "webdataset, our tars, members of 2^18 tokens in order",
    "mosaic-iterate": "MosaicML streaming 0.13.0, iterated",
    "mosaic-random": "MosaicML streaming 0.13.0, random spans",
    "litdata": "litdata 0.2.76, TokensLoader, iterated",
    "ours-0": "ours, random spans, unchecked",
    "ours-1": "ours, random spans, unchecked, read ahead",
    "ours-checked-0": "ours, random spans, checksums",
    "ours-checked-1": "ours, random spans, checksums, read ahead (default)",
}
THEIRS = ("mosaic-iterate", "mosaic-random", "litdata")
RAW, DEFAULT = "raw-random", "ours-checked-1"
SHARD = 2**23  # tokens
LEAST = 500.0  # million tokens a second and core


def main() -> int:
    options = parsed()
    interpreter = peers.environment()
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="data-loader-") as folder:
        write_data(Path(folder), options.tokens // SPAN * SPAN, interpreter)
        for _ in range(options.rounds):
            for name, found in rates.items():
                found.append(rate(Path(folder), name, interpreter))
    show(rates)
    verdicts = judged(rates)
    for told, passed in verdicts:
        print(f"{'PASS' if passed else 'FAIL'}  {told}")
    if options.json:
        content = {"span": SPAN, "tokens": options.tokens, "rates": rates}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(options.check and not all(passed for _, passed in verdicts))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48 * 2**20, help="tokens of the stream")
    parser.add_argument("--rounds", type=int, default=3, help="times that it is read")
    parser.add_argument("--folder", type=Path, help="where files are made; default: $TMPDIR")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--check", action="store_true", help="fail below the targets")
    options = parser.parse_args()
    if options.tokens < 16 * SPAN or options.rounds < 1:
        parser.error(f"give at least {16 * SPAN} tokens and one round")
    return options


def write_data(folder: Path, tokens: int, interpreter: Path) -> None:
    """Write the stream raw, in our format, and in the others'."""
    stream = np.random.default_rng(0).integers(3, 32_000, tokens, dtype=np.uint16)
    stream.tofile(folder / "raw.bin")
    written(
        folder / "ours",
        np.split(stream, range(SHARD, tokens, SHARD)),
        member_tokens=MEMBER_TOKENS,
    )
    for name in BUILDERS:
        peers.run([interpreter, WORKER, "build", name, folder])


def rate(folder: Path, name: str, interpreter: Path) -> float:
    """One loader's million tokens a second and core."""
    python = interpreter if name in THEIRS else Path(sys.executable)
    found = peers.measure([python, WORKER, "read", name, folder], cores=1).result()
    return found["tokens"] / found["seconds"] / 1e6


def show(rates: dict[str, list[float]]) -> None:
    print(f"{'M tokens/s/core: median (least to most)':<58}{'':>18}{'of raw':>8}")
    for name, found in rates.items():
        spread = f"{median(found):.0f} ({min(found):.0f} to {max(found):.0f})"
        print(f"{TOLD[name]:<58}{spread:>18}{ratio(rates, name, RAW):>8.2f}")


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """The median over rounds of one loader's rate over another's."""
    return median(a / b for a, b in zip(rates[name], rates[other], strict=True))


def judged(rates: dict[str, list[float]]) -> list[tuple[str, bool]]:
    """The targets, and whether they are met."""
    verdicts = []
    for name in (DEFAULT, "ours-0"):
        found = median(rates[name])
        told = f"{TOLD[name]}: {found:.0f} of at least {LEAST:.0f} M tokens/s/core"
        verdicts.append((told, found >= LEAST))
    for other in THEIRS:
        found = ratio(rates, DEFAULT, other)
        verdicts.append((f"{found:.1f} times the rate of {TOLD[other]}", found >= 1))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
