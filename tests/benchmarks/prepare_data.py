"""How fast text becomes token shards: ours, the encoders alone, datatrove and Megatron-LM.

``make bench-data``, or ``.venv/bin/python tests/benchmarks/prepare_data.py``: makes what it needs
(the environment of the others, the text, the tokenizer), runs all contenders in turn, again and
again, compares their ids with sentencepiece's and prints the tables of docs/performance.md.

What a command costs before the first document (imports, models) is measured by the same command
on two documents and told apart: rates are of what comes after it.
"""

import argparse
import os
import shutil
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import contender_ids
import corpus
import peers
from prepare_runs import ENCODERS, Materials, contenders, empty, plan, prepare
from prepare_tables import Found, Row, markdown, memory_verdicts, verdicts
from tokenizers import Tokenizer
from tokenizers.normalizers import Prepend, Replace, Sequence

from titans_pretrain.cli_types import positive
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import tokenizer as hugging_face
from titans_pretrain.files import atomic_file, sha256_file, write_json

PLACE = peers.CHECKOUT / "build" / "bench-data"
MODEL = ("mistral-common==1.0.0", "mistral_common/data/tokenizer.model.v1")
MODEL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
MEMORY_SMALL, MEMORY_LARGE = 100_000_000, 2_000_000_000
MEMORY_SHARD_BYTES = 2**24
NO_MEGATRON = [
    (
        "Megatron-LM preprocess_data",
        "its package has no scripts; give --megatron SOURCES --megatron-python PYTHON (>= 3.12)",
    )
]


def main() -> int:
    """Measure, print, and with --check fail where a target is missed."""
    options = _options()
    try:
        _require_gigatoken()
        options.directory.mkdir(parents=True, exist_ok=True)
        result = run(options)
    except TitansError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(markdown(result))
    if options.json:
        write_json(options.json, result)
    return 1 if options.check and result["missed"] else 0


def run(options: argparse.Namespace) -> Found:
    """Everything that was found, as JSON values."""
    load = os.getloadavg()[0]
    downloads = options.directory / "downloads"
    model = options.tokenizer or _default_model(options.directory / "tokenizer.model", downloads)
    materials = _materials(options, model, downloads)
    if load > 0.5:
        _say(f"the machine is busy (load {load:.1f}): trust no figure by wall time")
    rows, tokens, plan_cpu = _rates(options, materials)
    checked = verdicts(rows, tokens)
    memory = _memory(options, model) if options.memory else []
    memory_checked = memory_verdicts(memory) if memory else []
    documents = materials.text.documents
    ours = [row for row in rows if row.contender.encoder]
    missed = [found for found in (*checked, *memory_checked) if not found["pass"]]
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load": load},
        "versions": _versions(),
        "rounds": options.rounds,
        "text": {**asdict(materials.text), "directory": str(materials.text.directory)},
        "tokens": tokens,
        "rows": [row.found(tokens) for row in rows],
        "not_run": [] if options.megatron else NO_MEGATRON,
        "plan_cpu": plan_cpu,
        "verdicts": checked,
        "memory": memory,
        "memory_verdicts": memory_checked,
        "missed": bool(missed) or any(row.identical != documents for row in ours),
    }


def _rates(options: argparse.Namespace, materials: Materials) -> tuple[list[Row], int, float]:
    """Rows, tokens of the text without EOS, and processor seconds of `titans data plan`."""
    found = contenders(materials, options.megatron, options.megatron_python)
    rows = [Row(contender) for contender in found]
    directory = options.directory / "out"
    reference: list[contender_ids.Ids] = []
    for number in range(options.rounds):
        for row in rows:
            trial = row.contender.trial(materials, directory)
            row.trials.append(trial)
            _say(f"{number + 1}/{options.rounds} {row.contender.name}: {trial.cpu:.1f} s CPU")
            if number == 0:
                documents = row.contender.read(directory)
                reference = reference or documents
                row.identical = contender_ids.equal(documents, reference)
    planned = plan(materials.text, materials.model, empty(directory))
    shutil.rmtree(directory)
    return rows, sum(map(len, reference)) - len(reference), planned.cpu


def _memory(options: argparse.Namespace, model: Path) -> list[Found]:
    """Peaks of `prepare` at a small and a large input, both of several shards."""
    found: list[Found] = []
    directory = options.directory / "out"
    for size in (MEMORY_SMALL, options.memory):
        text = corpus.make(
            options.directory / f"text-{size}",
            size,
            downloads=options.directory / "downloads",
            own=options.input,
            repeat=True,
        )
        for encoder in ENCODERS:
            plan(text, model, empty(directory), "--shard-bytes", MEMORY_SHARD_BYTES)
            done = prepare(directory, encoder, 2)
            _say(f"{encoder}, {text.utf8_bytes:,} bytes: {done.wall:.0f} s")
            row = {"encoder": encoder, "bytes": text.utf8_bytes, "passes": text.passes}
            found.append(row | {"main": done.main_peak, "worker": done.child_peak})
    shutil.rmtree(directory)
    return found


def _materials(options: argparse.Namespace, model: Path, downloads: Path) -> Materials:
    """Make what is not there yet."""
    folder = empty(options.directory / "hugging-face")
    _convert(model, folder)
    text = corpus.make(
        options.directory / "text", options.characters, downloads=downloads, own=options.input
    )
    return Materials(
        text=text,
        # one for every worker: none is started for nothing, and its start is to be known
        document=text.first(options.directory / "document", documents=2),
        model=model,
        hugging_face=folder,
        python=peers.environment(),
    )


def _default_model(path: Path, downloads: Path) -> Path:
    """Mistral-7B's first tokenizer: 32,000 pieces, the settings of Llama-2's, Apache-2.0."""
    if not path.exists():
        package, member = MODEL
        downloads.mkdir(exist_ok=True)
        with atomic_file(path) as handle:
            handle.write(corpus.pypi(downloads, package).read(member))
    if sha256_file(path) != MODEL_SHA256:
        raise TitansError("this is not the tokenizer that was released", where=str(path))
    return path


def _convert(model: Path, folder: Path) -> None:
    """The files of Hugging Face's fast tokenizer, with the normalizer it has for Llama-2."""
    hugging_face.write(model.read_bytes(), folder)
    file = str(folder / "tokenizer.json")
    made = Tokenizer.from_file(file)
    made.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    made.save(file)


def _require_gigatoken() -> None:
    try:
        metadata.version("gigatoken")
    except metadata.PackageNotFoundError:
        raise UserError(
            "gigatoken is not installed",
            where=sys.prefix,
            fix="run make bench-data, or pip install --editable '.[fast]'",
        ) from None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "unknown processor")


def _versions() -> str:
    """Of Python and of what encodes here and there."""
    pins = dict(line.split("==") for line in peers.PINS.read_text().split() if "==" in line)
    ours = [f"{name} {metadata.version(name)}" for name in ("sentencepiece", "gigatoken")]
    theirs = [f"{name} {pins[name]}" for name in ("datatrove", "tokenizers")]
    return ", ".join([f"Python {sys.version.split()[0]}", *ours, *theirs])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--characters", type=positive, default=60_000_000, help="%(default)s")
    parser.add_argument("--rounds", type=positive, default=3, help="%(default)s")
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="parquet or jsonl files of your own, e.g. FineWeb-Edu's",
    )
    parser.add_argument("--tokenizer", type=Path, help="another .model, with </s> of id 2")
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="sources of Megatron-LM")
    parser.add_argument(
        "--megatron-python",
        type=Path,
        default=Path(sys.executable),
        metavar="PYTHON",
        help="interpreter that has what Megatron-LM needs",
    )
    parser.add_argument(
        "--memory",
        type=positive,
        nargs="?",
        const=MEMORY_LARGE,
        metavar="BYTES",
        help=f"peak memory at {MEMORY_SMALL:,} and at so many bytes of text (%(const)s)",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--directory", type=Path, default=PLACE, help="of text and trials")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
