"""``titans data``: one function a job, each a thin call into the library."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.cli_types import above_zero, natural, number, positive, share
from titans_pretrain.errors import UserError

if TYPE_CHECKING:
    from data_prep.inputs import Input

SETTINGS = (
    "text_column",
    "id_column",
    "prompt_column",
    "score_column",
    "language_column",
    "url_column",
    "dump_column",
    "min_score",
    "language",
    "min_characters",
    "max_characters",
    "bad_rows",
    "held_out",
    "bos",
    "seed",
    "shard_bytes",
)
SOURCE = ("dataset", "dataset_config", "split", "revision", "data_files")


def data_tokenizer(options: argparse.Namespace) -> None:
    """Train a tokenizer on text, or check and copy an existing model."""
    from data_prep import inputs, sources, tokenizer

    if options.model:
        made = tokenizer.import_model(options.model, options.output)
    else:
        columns = sources.Columns(text=options.text_column)
        made = tokenizer.train(
            sources.documents(inputs.find(options.input), columns),
            options.vocab_size,
            options.output,
            sample_bytes=options.sample_bytes,
        )
    print(f"{options.output}: {made.vocab_size} pieces, sha256 {made.sha256}")


def data_plan(options: argparse.Namespace) -> None:
    """Freeze the plan, or read the frozen one; print what the work will be."""
    from data_prep import forecast, plan

    if not _typed(options):
        _same_settings(options)
    else:
        _freeze(options, options.tasks)
    plan.restore(options.output, workers=options.workers)
    frozen, _ = plan.load(options.output)
    told = forecast.facts(frozen, options.output, rate=options.rate, cores=options.cores)
    print(json.dumps(told, indent=2) if options.json else forecast.text(told))


def data_prepare(options: argparse.Namespace) -> None:
    """Tokenize text into shards: one task of a plan, which the first to come freezes."""
    from data_prep import array_task, manifest, merge, task

    frozen = None
    if _frozen(options) or not _typed(options):
        frozen = manifest.read_plan(options.output)
    number_, tasks = array_task.choose(
        os.environ,
        task=options.task,
        tasks=options.tasks,
        frozen=frozen["tasks"] if frozen else None,
    )
    if _typed(options):
        _freeze(options, tasks)
    else:
        _same_settings(options)
    try:
        done = task.prepare(
            options.output, number_, encoder=options.encoder, workers=options.workers
        )
    except merge.DamagedTask as error:
        if error.task == number_:
            raise
        print(f"task {number_} is finished, but not all can be merged:\n{error}", file=sys.stderr)
        return
    if done:
        _print_manifest(options.output, done)


def data_merge(options: argparse.Namespace) -> None:
    """Put finished tasks together."""
    from data_prep import merge

    _print_manifest(options.output, merge.merge(options.output))


def data_status(options: argparse.Namespace) -> None:
    """Print how far each task and the whole array are."""
    from data_prep import status

    status.show(options.directory, as_json=options.json, watch=options.watch)


def data_verify(options: argparse.Namespace) -> None:
    """Check a prepared directory."""
    from data_prep import verify

    done = verify.verify(options.directory, workers=options.workers)
    shards = len(done["shards"]) + len(done["held_out"])
    tokens = done["tokens"] + done["held_out_tokens"]
    part = f", {len(done['finished'])} of {done['tasks']} tasks" if "finished" in done else ""
    print(f"{options.directory}: good, {shards} shards, {tokens:,} tokens{part}")


def data_inspect(options: argparse.Namespace) -> None:
    """Show what a prepared directory holds."""
    from data_prep import inspect

    inspect.inspect(options.directory, options.documents, histogram=options.histogram)


def data_at_step(options: argparse.Namespace) -> None:
    """Name the documents of one step of a run."""
    from titans_pretrain.data import at_step

    at_step.show(options.run, options.step, text=options.text, as_json=options.json)


def data_babilong(options: argparse.Namespace) -> None:
    """Write BABILong samples to train on."""
    from data_prep import tokenizer
    from titans_pretrain.evaluate import babilong_context, babilong_training

    wanted = babilong_training.Documents(
        tasks=options.tasks.split(","),
        length=options.length,
        samples=options.samples,
        bos=options.bos,
        seed=options.seed,
    )
    babilong_training.write(
        options.output,
        tokenizer.Tokenizer(options.tokenizer),
        options.facts,
        babilong_context.Background(options.background),
        wanted,
        tell=_tell,
    )
    print(f"{options.output}: {options.samples} documents of {options.length} tokens")


def data_needle(options: argparse.Namespace) -> None:
    """Write needle-in-a-haystack samples to train on."""
    from data_prep import tokenizer
    from titans_pretrain.evaluate import needle_text, needle_training

    if (options.length is None) == (options.haystack is None):
        raise UserError(
            "--length and --haystack are both given" if options.length else "no length",
            where="--length",
            fix="give one of --length (with --tokenizer) and --haystack",
        )
    if (options.length is None) != (options.tokenizer is None):
        raise UserError(
            "a length is tokens of a tokenizer's, a haystack needs none",
            where="--tokenizer",
            fix="give --length with --tokenizer, or --haystack alone",
        )
    if options.bos and options.length is None:
        raise UserError("--bos without --length", where="--bos", fix="leave it out")
    template = needle_text.BARE if options.bare else needle_text.TEMPLATE
    haystack = needle_text.haystack(options.kind, options.essays, template)
    wanted = needle_training.Documents(
        length=options.length or 0, samples=options.samples, bos=options.bos, seed=options.seed
    )
    if options.haystack is not None:
        needle_training.write_sized(options.output, haystack, options.haystack, wanted, _tell)
        print(f"{options.output}: {options.samples} documents")
        return
    model = tokenizer.Tokenizer(options.tokenizer)
    needle_training.write(options.output, model, haystack, wanted, _tell)
    print(f"{options.output}: {options.samples} documents of {options.length} tokens")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _typed(options: argparse.Namespace) -> bool:
    """Whether the inputs are named.

    Raises:
        UserError: options of a dataset without one.
    """
    if not options.dataset and (stray := _spelled(_given(options, SOURCE))):
        fix = f"name the dataset with --dataset, or leave out {stray[0]}"
        raise UserError(f"{stray[0]} without a dataset", where=stray[0], fix=fix)
    return bool(options.input or options.dataset)


def _frozen(options: argparse.Namespace) -> bool:
    return (options.output / "plan.json").exists()


def _freeze(options: argparse.Namespace, tasks: int | None) -> None:
    """Freeze a plan of the inputs named, or compare the frozen one with them."""
    from data_prep import inputs, manifest, plan, settings, tokenizer

    given = _given(options, SETTINGS)
    if options.dataset:
        command = _spelled(_given(options, SOURCE))
    else:
        command = ["--input", *map(inputs.absolute, options.input)]
    command += _spelled(given) + ["--drop-duplicates"] * options.drop_duplicates
    model = options.tokenizer or options.output / manifest.TOKENIZER
    if not options.tokenizer and not model.exists():
        fix = "name a .model file; `titans data tokenizer` makes one"
        raise UserError("no tokenizer", where="--tokenizer", fix=fix)
    plan.freeze(
        _files(options, command),
        tokenizer.Tokenizer(model),
        options.output,
        settings.Settings(**given),
        tasks,
        command,
        drop_duplicates=options.drop_duplicates,
        workers=options.workers,
    )


def _files(options: argparse.Namespace, command: list[str]) -> "list[Input]":
    """The files named, or those of the plan that this command has frozen, if they are pinned."""
    from data_prep import inputs, plan

    if pinned := plan.pinned_inputs(options.output, command):
        return pinned
    if not options.dataset:
        return inputs.find(options.input)
    return inputs.find_dataset(
        options.dataset,
        config=options.dataset_config,
        split=options.split or "train",
        revision=options.revision,
        data_files=options.data_files,
    )


def _same_settings(options: argparse.Namespace) -> None:
    """Refuse options against a frozen plan whose inputs are not named again."""
    from data_prep import plan

    plan.require(
        options.output,
        _given(options, SETTINGS),
        tasks=options.tasks,
        tokenizer=options.tokenizer,
        drop_duplicates=options.drop_duplicates,
    )


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given, by name."""
    found = {name: getattr(options, name) for name in names}
    return {
        name: value for name, value in found.items() if value is not None and value is not False
    }


def _print_manifest(output: Path, content: dict[str, Any]) -> None:
    held_out = content["held_out_tokens"]
    print(
        f"{output / 'manifest.json'}: {content['tokens']:,} tokens"
        + (f" and {held_out:,} held out" if held_out else "")
        + f" of {content['documents']['kept']:,} documents in {len(content['shards'])} shards, "
        f"unigram entropy {content['unigram_entropy']:.3f} nats per token"
    )


def _spelled(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def add(verbs: Any) -> None:
    """Register ``titans data`` and its jobs."""
    data = verbs.add_parser("data", help="make and check token shards")
    jobs = data.add_subparsers(required=True, metavar="JOB")
    _add_tokenizer(jobs)
    _add_plan(jobs)
    _add_prepare(jobs)
    _add_merge(jobs)
    _add_status(jobs)
    _add_verify(jobs)
    _add_inspect(jobs)
    _add_at_step(jobs)
    _add_babilong(jobs)
    _add_needle(jobs)


def _add_tokenizer(jobs: Any) -> None:
    job = jobs.add_parser("tokenizer", help="train a sentencepiece model, or import one")
    job.set_defaults(verb=data_tokenizer)
    source = job.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="GLOB", help=_INPUT_HELP)
    source.add_argument("--import", dest="model", type=Path, metavar="MODEL", help="a .model file")
    job.add_argument("--vocab-size", type=positive, default=32_000, help="pieces (%(default)s)")
    job.add_argument("--output", type=Path, required=True, help="the .model file to write")
    job.add_argument("--text-column", default="text", help="column of the text (%(default)s)")
    job.add_argument(
        "--sample-bytes",
        type=positive,
        default=2**28,
        help="bytes of text to train on (%(default)s); takes about 16 times as much memory, "
        "100 times for text without spaces",
    )


def _add_plan(jobs: Any) -> None:
    job = jobs.add_parser("plan", help="freeze inputs and settings; print tokens, disk, time")
    job.set_defaults(verb=data_plan)
    _add_work(job)
    job.add_argument(
        "--rate", type=above_zero, help="million tokens a second and core, for the time"
    )
    job.add_argument("--cores", type=positive, default=8, help="of a task (%(default)s)")
    job.add_argument("--json", action="store_true", help="print one JSON object")


def _add_prepare(jobs: Any) -> None:
    job = jobs.add_parser("prepare", help="text to token shards; what is finished is kept")
    job.set_defaults(verb=data_prepare)
    job.add_argument("--task", type=natural, help="which task, from 0 (SLURM's array id)")
    _add_work(job)
    job.add_argument(
        "--encoder",
        choices=("sentencepiece", "fast"),
        default="sentencepiece",
        help="fast gives the same ids, with the package of the extra 'fast' (%(default)s)",
    )


def _add_work(job: Any) -> None:
    """What decides every byte of the output, and where it goes."""
    source = job.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="GLOB", help=_INPUT_HELP)
    source.add_argument("--dataset", metavar="NAME", help="Hugging Face dataset, or its folder")
    job.add_argument("--dataset-config", metavar="CONFIG", help="e.g. sample-10BT")
    job.add_argument("--split", help="split of the dataset (train)")
    job.add_argument("--revision", help="commit, tag or branch of the dataset")
    job.add_argument(
        "--data-files", nargs="+", metavar="GLOB", help="files of the dataset, or for its loader"
    )
    job.add_argument("--tokenizer", type=Path, help="sentencepiece .model file")
    job.add_argument("--output", type=Path, required=True, help="directory of the shards")
    job.add_argument(
        "--tasks", type=positive, help="their number (the plan's; at first one for 500 M tokens)"
    )
    job.add_argument("--workers", type=natural, help="processes (one a core)")
    for name, default in _COLUMNS.items():
        job.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {default}")
    job.add_argument("--min-score", type=number, help="keep rows of this score or better")
    job.add_argument("--language", help="keep rows of this language, e.g. en")
    job.add_argument("--min-characters", type=natural, help="keep texts of at least this length")
    job.add_argument("--max-characters", type=natural, help="keep texts of at most this length")
    job.add_argument(
        "--bad-rows", choices=("stop", "skip"), help="what a row that cannot be read does (stop)"
    )
    job.add_argument(
        "--drop-duplicates", action="store_true", help="keep the first of documents of equal text"
    )
    job.add_argument(
        "--held-out", type=share, help="share of the documents put into shards of their own (0)"
    )
    job.add_argument("--bos", action="store_true", help="begin every document with BOS")
    job.add_argument("--seed", type=natural, help="of the order (0)")
    job.add_argument("--shard-bytes", type=positive, help="bytes that end a shard (536870912)")


def _add_merge(jobs: Any) -> None:
    job = jobs.add_parser("merge", help="write manifest.json once all tasks are finished")
    job.set_defaults(verb=data_merge)
    job.add_argument("--output", type=Path, required=True, help="directory of the shards")


def _add_status(jobs: Any) -> None:
    job = jobs.add_parser("status", help="how far each task and the whole array are")
    job.set_defaults(verb=data_status)
    job.add_argument("directory", type=Path, metavar="DIR", help="directory of the shards")
    job.add_argument("--json", action="store_true", help="print one JSON object")
    job.add_argument("--watch", type=positive, metavar="SECONDS", help="print again and again")


def _add_verify(jobs: Any) -> None:
    job = jobs.add_parser("verify", help="check every checksum, count, id and document end")
    job.set_defaults(verb=data_verify)
    job.add_argument("directory", type=Path, metavar="DIR", help="directory of the shards")
    job.add_argument("--workers", type=positive, help="files read at once (one a core)")


def _add_inspect(jobs: Any) -> None:
    job = jobs.add_parser("inspect", help="print counts, document lengths, the first documents")
    job.set_defaults(verb=data_inspect)
    job.add_argument("directory", type=Path, metavar="DIR", help="directory of the shards")
    job.add_argument("--documents", type=natural, default=3, help="how many (%(default)s)")
    job.add_argument("--histogram", type=Path, metavar="FILE.png", help="draw the lengths")


def _add_at_step(jobs: Any) -> None:
    job = jobs.add_parser("at-step", help="name the documents that a step of a run trains on")
    job.set_defaults(verb=data_at_step)
    job.add_argument("run", type=Path, metavar="CONFIG|RUN", help="a run's YAML or directory")
    job.add_argument("step", type=positive, metavar="STEP", help="optimizer step, from 1")
    job.add_argument("--text", action="store_true", help="print the text, too")
    job.add_argument("--json", action="store_true", help="print JSON")


def _add_babilong(jobs: Any) -> None:
    job = jobs.add_parser("babilong", help="questions on facts in long texts, to fine-tune on")
    job.set_defaults(verb=data_babilong)
    job.add_argument(
        "--facts", type=Path, required=True, metavar="DIR", help="bAbI's files (en-10k)"
    )
    job.add_argument(
        "--background",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files that come between the facts, such as books",
    )
    job.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    job.add_argument(
        "--tasks", default="qa1,qa2,qa3,qa4,qa5", help="with commas between (%(default)s)"
    )
    job.add_argument("--length", type=positive, required=True, help="tokens of a document")
    job.add_argument("--samples", type=positive, default=10_000, help="documents (%(default)s)")
    job.add_argument("--bos", action="store_true", help="leave room for a BOS (data prepare --bos)")
    job.add_argument("--seed", type=natural, default=0, help="of what is drawn (%(default)s)")
    job.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")


def _add_needle(jobs: Any) -> None:
    job = jobs.add_parser("needle", help="a value hidden in a long text, to train on")
    job.set_defaults(verb=data_needle)
    job.add_argument(
        "--kind",
        choices=("niah_pk", "niah_number", "niah_uuid", "niah_words"),
        default="niah_pk",
        help="as titans eval --tasks has it (%(default)s)",
    )
    job.add_argument(
        "--essays",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="text files that hide the needles; niah_pk has a line of its own",
    )
    job.add_argument("--tokenizer", type=Path, help="sentencepiece .model file, for --length")
    job.add_argument("--length", type=positive, help="tokens of a document")
    job.add_argument(
        "--haystack",
        type=positive,
        metavar="N",
        help="instead, lines (niah_pk) or words of haystack: to train a tokenizer on",
    )
    job.add_argument(
        "--bare",
        action="store_true",
        help="prompts of the haystack and the answer's beginning alone: short ones to begin with",
    )
    job.add_argument("--samples", type=positive, default=10_000, help="documents (%(default)s)")
    job.add_argument("--bos", action="store_true", help="leave room for a BOS (data prepare --bos)")
    job.add_argument("--seed", type=natural, default=0, help="of what is drawn (%(default)s)")
    job.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")


_INPUT_HELP = "parquet, arrow, jsonl, jsonl.gz, jsonl.zst or txt files (quoted globs or URLs)"
_COLUMNS = {
    "text": "text (text); a dotted name reaches into a struct",
    "id": "identifier (id)",
    "prompt": "text put before it, without loss",
    "score": "score (score)",
    "language": "language (language)",
    "url": "address (url)",
    "dump": "crawl (dump)",
}
