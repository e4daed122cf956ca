"""``titans data``: one function a job, each a thin call into the library."""

import argparse
from pathlib import Path
from typing import Any

from titans_pretrain.cli_types import natural, number, positive


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


def data_prepare(options: argparse.Namespace) -> None:
    """Tokenize text into shards: one task, or all."""
    from data_prep import inputs, manifest, shard, tokenizer

    names = ("text_column", "id_column", "prompt_column", "min_score", "language", "seed")
    given = {name: getattr(options, name) for name in (*names, "shard_bytes")}
    if options.dataset:
        source = {"dataset": options.dataset, "dataset_config": options.dataset_config}
        source |= {"split": options.split, "revision": options.revision}
        files = inputs.find_dataset(
            options.dataset,
            config=options.dataset_config,
            split=options.split,
            revision=options.revision,
        )
        command = _spelled(source)
    else:
        files = inputs.find(options.input)
        command = ["--input", *map(inputs.absolute, options.input)]
    done = shard.prepare(
        files,
        tokenizer.Tokenizer(options.tokenizer),
        options.output,
        manifest.Settings(**given),
        task=options.task,
        tasks=options.tasks,
        command=command + _spelled(given),
    )
    if done:
        _print_manifest(options.output, done)


def data_merge(options: argparse.Namespace) -> None:
    """Put finished tasks together."""
    from data_prep import manifest

    _print_manifest(options.output, manifest.merge(options.output))


def data_verify(options: argparse.Namespace) -> None:
    """Check a prepared directory."""
    from data_prep import verify

    done = verify.verify(options.directory)
    print(f"{options.directory}: good, {len(done['shards'])} shards, {done['tokens']:,} tokens")


def data_inspect(options: argparse.Namespace) -> None:
    """Show what a prepared directory holds."""
    from data_prep import verify

    verify.inspect(options.directory, options.documents)


def _print_manifest(output: Path, content: dict[str, Any]) -> None:
    print(
        f"{output / 'manifest.json'}: {content['tokens']:,} tokens of "
        f"{content['documents']['kept']:,} documents in {len(content['shards'])} shards, "
        f"unigram entropy {content['unigram_entropy']:.3f} nats per token"
    )


def _spelled(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line; those not given are left out."""
    return [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def add(verbs: Any) -> None:
    """Register ``titans data`` and its jobs."""
    data = verbs.add_parser("data", help="make and check token shards")
    jobs = data.add_subparsers(required=True, metavar="JOB")

    made = jobs.add_parser("tokenizer", help="train a sentencepiece model, or import one")
    made.set_defaults(verb=data_tokenizer)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="GLOB", help=_INPUT_HELP)
    source.add_argument("--import", dest="model", type=Path, metavar="MODEL", help="a .model file")
    made.add_argument("--vocab-size", type=positive, default=32_000, help="pieces (%(default)s)")
    made.add_argument("--output", type=Path, required=True, help="the .model file to write")
    made.add_argument("--text-column", default="text", help="column of the text (%(default)s)")
    made.add_argument(
        "--sample-bytes",
        type=positive,
        default=2**28,
        help="bytes of text to train on (%(default)s)",
    )

    job = jobs.add_parser("prepare", help="text to token shards; finished tasks are skipped")
    job.set_defaults(verb=data_prepare)
    source = job.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="GLOB", help=_INPUT_HELP)
    source.add_argument("--dataset", metavar="NAME", help="Hugging Face dataset, or its folder")
    job.add_argument("--dataset-config", metavar="CONFIG", help="e.g. sample-10BT")
    job.add_argument("--split", default="train", help="split of the dataset (%(default)s)")
    job.add_argument("--revision", help="commit, tag or branch of the dataset")
    job.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    job.add_argument("--output", type=Path, required=True, help="directory of the shards")
    job.add_argument("--task", type=natural, default=0, help="which task, from 0 (%(default)s)")
    job.add_argument("--tasks", type=positive, default=1, help="of how many (%(default)s)")
    job.add_argument("--text-column", default="text", help="column of the text (%(default)s)")
    job.add_argument("--id-column", default="id", help="column of the identifier (%(default)s)")
    job.add_argument("--prompt-column", help="column of text without loss before the text")
    job.add_argument("--min-score", type=number, help="keep rows of this score or better")
    job.add_argument("--language", help="keep rows of this language, e.g. en")
    job.add_argument("--seed", type=natural, default=0, help="of the order (%(default)s)")
    job.add_argument(
        "--shard-bytes", type=positive, default=2**29, help="bytes of a shard (%(default)s)"
    )

    job = jobs.add_parser("merge", help="write manifest.json once all tasks are finished")
    job.set_defaults(verb=data_merge)
    job.add_argument("--output", type=Path, required=True, help="directory of the shards")

    job = jobs.add_parser("verify", help="check every checksum, count, id and document end")
    job.set_defaults(verb=data_verify)
    job.add_argument("directory", type=Path, metavar="DIR", help="directory of the shards")

    job = jobs.add_parser("inspect", help="print counts and the first documents")
    job.set_defaults(verb=data_inspect)
    job.add_argument("directory", type=Path, metavar="DIR", help="directory of the shards")
    job.add_argument("--documents", type=natural, default=3, help="how many (%(default)s)")


_INPUT_HELP = "parquet, jsonl, jsonl.gz, jsonl.zst or txt files (quoted globs or URLs)"
