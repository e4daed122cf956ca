"""``titans bench data`` with MosaicML's and Lightning's loaders beside ours, in one run.

``python tests/benchmarks/data_loader.py`` makes the others' environment if need be, writes one
token stream in every loader's format, and prints a table; ``--check`` fails below the targets.
"""

import argparse
import sys
from pathlib import Path

import peers
from loader_rates import BUILDERS

from titans_pretrain.bench import data, figures
from titans_pretrain.bench.contenders import Contender
from titans_pretrain.bench.progress import Tell

RATES = Path(__file__).with_name("loader_rates.py").resolve()
TOLD = {
    "mosaic-iterate": "MosaicML streaming 0.13.0, iterated",
    "mosaic-random": "MosaicML streaming 0.13.0, random spans",
    "litdata": "litdata 0.2.76, TokensLoader, iterated",
}
LEAST = 500.0  # million tokens a second and core


def main() -> int:
    given = parsed()
    least = LEAST if given.check else None
    options = data.Options(given.tokens, given.rounds, given.folder, least, given.json)
    figures.check_json(options.json)
    tell, interpreter = Tell(), peers.environment()
    with data.stream(options, tell) as folder:
        for name in BUILDERS:
            peers.run([interpreter, RATES, "build", name, folder])
        others = [
            Contender(name, RATES, "build", {"loader": name, "folder": folder}, interpreter)
            for name in TOLD
        ]
        result = data.measure(options, Path(folder), others, tell, TOLD)
    data.show(result)
    figures.write_json(options.json, result)
    return int(not all(verdict.passed for verdict in result["checks"]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48 * 2**20, help="tokens of the stream")
    parser.add_argument("--rounds", type=int, default=3, help="times that it is read")
    parser.add_argument("--folder", type=Path, help="where files are made; default: $TMPDIR")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--check", action="store_true", help="fail below the targets")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("give at least one round")
    return options


if __name__ == "__main__":
    sys.exit(main())
