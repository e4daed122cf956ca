"""The verbs of models: one function a verb, each a thin call into the library."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from titans_pretrain.cli_types import natural, positive, share


def export(options: argparse.Namespace) -> None:
    """Write a Hugging Face directory, prove it in a clean process, push it to the Hub if asked."""
    from titans_pretrain import errors
    from titans_pretrain.export import huggingface, push

    if options.push is not None:
        push.check(options.push)
    elif options.private:
        raise errors.UserError(
            "--private says nothing without --push", where="command line", fix="add --push REPO"
        )
    source = huggingface.export(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    print(f"{options.out}: exported from {source}; a clean process gives the same logits")
    if options.push is not None:
        print(f"pushed to {push.push(options.out, options.push, private=options.private)}")


def generate(options: argparse.Namespace) -> None:
    """Print a prompt and its continuation."""
    from titans_pretrain import generate

    sampling = generate.Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        use_cache=options.cache,
        beams=options.beams,
    )
    generate.generate(
        options.model,
        options.prompt,
        sampling,
        memory=options.memory,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )


def memorize(options: argparse.Namespace) -> None:
    """Read a text into a memory and write it."""
    from titans_pretrain import memorize

    memory = memorize.memorize(
        options.model,
        options.file,
        options.out,
        earlier=options.memory,
        piece=options.piece,
        device=options.device,
    )
    size = options.out.stat().st_size
    print(f"{options.out}: {memory.tokens:,} tokens read into a memory of {size / 1e6:,.1f} MB")


def inspect_memory(options: argparse.Namespace) -> None:
    """Draw what a model's memory does along a text."""
    from titans_pretrain import inspect_memory

    picture = options.output or options.file.with_suffix(".memory.png")
    found = inspect_memory.inspect_memory(
        options.model,
        options.file,
        picture,
        tokens=options.tokens,
        layers=options.layer,
        device=options.device,
    )
    print(inspect_memory.table(found), end="")
    print(f"{picture}, {picture.with_suffix('.json')}")


def evaluate(options: argparse.Namespace) -> None:
    """Score an exported model on tasks, or on held-out data."""
    if options.tasks is not None:
        _evaluate_tasks(options)
        return
    from titans_pretrain import errors
    from titans_pretrain.evaluate import heldout

    if options.data is None:
        raise errors.UserError(
            "nothing to score the model on", where="command line", fix="add --data or --tasks"
        )
    for name in _TASK_OPTIONS:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise errors.UserError(
                f"{option} says nothing without --tasks", where=option, fix="add --tasks"
            )
    result = heldout.evaluate(
        options.model,
        options.out,
        options.data,
        _heldout_choice(options),
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    print(heldout.table(result), end="")


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Export a run's checkpoint, score it, and keep the result beside the run's metrics."""
    from titans_pretrain.evaluate import of_checkpoint, tasks

    config = of_checkpoint.load(options.config or of_checkpoint.configuration(options.checkpoint))
    chosen, parser = config.pipeline.eval, _OptionsOfTasks(add_help=False, allow_abbrev=False)
    parser.add_argument("--data")
    parser.add_argument("--batch", type=positive, default=1)
    _add_task_options(parser)
    told = parser.parse_args([*chosen.options, f"--tasks={','.join(chosen.tasks)}"])
    found = of_checkpoint.evaluate(
        options.checkpoint,
        config,
        lambda model: tasks.parse(told.tasks, _told_tasks(told, model)),
        device=options.device,
    )
    for name, value in found.metrics.items():
        print(f"step {found.step}  {name} {value:.6g}")


class _OptionsOfTasks(argparse.ArgumentParser):
    """The options of tasks that a configuration gives."""

    def error(self, message: str) -> NoReturn:
        from titans_pretrain import errors

        raise errors.UserError(
            f"pipeline.eval.options: {message}",
            where="pipeline.eval.options",
            fix="titans eval --help lists the options of tasks",
        )


def _told_tasks(options: argparse.Namespace, model: Path) -> Any:
    """What the command line tells the tasks of a model."""
    from titans_pretrain.evaluate import loaded, tasks

    given = {name: getattr(options, name) for name in _TASK_OPTIONS if name != "paper_size"}
    return tasks.Options(
        data=options.data,
        batch=options.batch,
        trained_length=loaded.trained_length(model),
        **{name: value for name, value in given.items() if value is not None},
    )


def _evaluate_tasks(options: argparse.Namespace) -> None:
    from titans_pretrain import errors
    from titans_pretrain.evaluate import paper, report, suite, tasks

    paper.check_size(options.paper_size)
    for name in ("sequence_length", "sequences", "validation_fraction"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise errors.UserError(
                f"{option} is for held-out data, which --tasks does not score",
                where=option,
                fix="leave it out, or run without --tasks",
            )
    told = _told_tasks(options, options.model)
    found = suite.evaluate(
        options.model,
        options.out,
        tasks.parse(options.tasks, told),
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        paper_size=options.paper_size,
    )
    print(report.page(found), end="")


def _heldout_choice(options: argparse.Namespace) -> Any:
    from titans_pretrain.evaluate import heldout

    return heldout.Choice(
        sequence_length=options.sequence_length,
        validation_fraction=options.validation_fraction,
        sequences=options.sequences,
        batch=options.batch,
    )


def add(verbs: Any) -> None:
    """Add the verbs to a parser's subparsers."""
    _add_export(verbs)
    _add_generate(verbs)
    _add_memorize(verbs)
    _add_inspect_memory(verbs)
    _add_eval(verbs)
    _add_eval_checkpoint(verbs)


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="a checkpoint as a Hugging Face directory")
    verb.set_defaults(verb=export)
    verb.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="RUN/checkpoints/step-N, or RUN for its newest good one",
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    verb.add_argument("--dtype", default="float32", help="float32 or bfloat16 (%(default)s)")
    verb.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (%(default)s)"
    )
    verb.add_argument("--push", metavar="REPO", help="then upload it to the Hugging Face Hub")
    verb.add_argument("--private", action="store_true", help="make the repository a private one")


def _add_generate(verbs: Any) -> None:
    verb = verbs.add_parser("generate", help="text from an exported model")
    verb.set_defaults(verb=generate)
    verb.add_argument("model", type=Path, metavar="MODEL_DIR", help="what titans export wrote")
    verb.add_argument("prompt", metavar="PROMPT", help='text to go on from; "" begins a document')
    verb.add_argument("--max-new-tokens", type=int, default=100, help="at most (%(default)s)")
    verb.add_argument("--temperature", type=float, help="0 takes the likeliest (0.8; 0 with beams)")
    verb.add_argument("--top-k", type=int, default=0, help="0 samples among all (%(default)s)")
    verb.add_argument("--top-p", type=float, default=1.0, help="nucleus (%(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    verb.add_argument("--beams", type=int, default=1, help="texts side by side (%(default)s)")
    verb.add_argument(
        "--memory", type=Path, metavar="FILE", help="of the text before, from titans memorize"
    )
    verb.add_argument("--no-cache", dest="cache", action="store_false", help="recompute each token")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (%(default)s)")
    verb.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of a model of another kind",
    )


def _add_memorize(verbs: Any) -> None:
    verb = verbs.add_parser("memorize", help="read a text into a memory, for titans generate")
    verb.set_defaults(verb=memorize)
    verb.add_argument("model", type=Path, metavar="MODEL_DIR", help="what titans export wrote")
    verb.add_argument("file", type=Path, metavar="FILE", help="the text, UTF-8")
    verb.add_argument("out", type=Path, metavar="OUT", help="file of the memory")
    verb.add_argument(
        "--memory", type=Path, metavar="EARLIER", help="go on from this one; may be OUT"
    )
    verb.add_argument("--piece", type=positive, default=4096, help="tokens at once (%(default)s)")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (%(default)s)")


def _add_inspect_memory(verbs: Any) -> None:
    verb = verbs.add_parser("inspect-memory", help="what a model's memory does along a text")
    verb.set_defaults(verb=inspect_memory)
    verb.add_argument("model", type=Path, metavar="MODEL_DIR", help="what titans export wrote")
    verb.add_argument("file", type=Path, metavar="FILE", help="the text, UTF-8")
    verb.add_argument(
        "--output", type=Path, metavar="FILE.png", help="the picture (FILE with .memory.png)"
    )
    verb.add_argument(
        "--tokens", type=positive, default=1024, help="of the text, the first (%(default)s)"
    )
    verb.add_argument(
        "--layer", type=natural, action="append", help="only this one, from 0; may be repeated"
    )
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (%(default)s)")


def _add_eval(verbs: Any) -> None:
    verb = verbs.add_parser("eval", help="an exported model on held-out data and on tasks")
    verb.set_defaults(verb=evaluate)
    verb.add_argument("model", type=Path, metavar="MODEL_DIR", help="what titans export wrote")
    verb.add_argument("out", type=Path, metavar="OUT", help="directory of the results")
    verb.add_argument("--data", metavar="MANIFEST", help="prepared data; path or URL")
    verb.add_argument("--batch", type=positive, default=1, help="rows at once (%(default)s)")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (%(default)s)")
    verb.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of a model of another kind",
    )
    _add_heldout_options(verb.add_argument_group("held-out data"))
    _add_task_options(verb.add_argument_group("tasks"))


def _add_eval_checkpoint(verbs: Any) -> None:
    verb = verbs.add_parser(
        "eval-checkpoint", help="a run's checkpoint on what pipeline.eval of the run names"
    )
    verb.set_defaults(verb=evaluate_checkpoint)
    verb.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-N")
    verb.add_argument(
        "--config", type=Path, metavar="FILE", help="the run's configuration (that of its jobs)"
    )
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (%(default)s)")


def _add_heldout_options(group: Any) -> None:
    group.add_argument("--sequence-length", type=positive, help="tokens (as in training)")
    group.add_argument("--sequences", type=natural, default=0, help="at most; 0: all (%(default)s)")
    group.add_argument(
        "--validation-fraction",
        type=share,
        metavar="SHARE",
        help="of the data, the last, that is held out (as in training)",
    )


def _add_task_options(group: Any) -> None:
    group.add_argument(
        "--tasks", metavar="A,B", help="names of tasks and groups: paper, commonsense, piqa …"
    )
    group.add_argument("--samples", type=positive, metavar="N", help="of each task and length")
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens read at most (as in training)"
    )
    group.add_argument(
        "--lengths", type=_names, metavar="A,B", help="of the contexts: 2048,4096 or 1k,128k,1M"
    )
    group.add_argument(
        "--shots", "--few-shot", type=natural, metavar="N", help="solved examples in a prompt"
    )
    group.add_argument(
        "--task-data", type=Path, metavar="DIR", help="TASK.jsonl of the benchmarks (the Hub)"
    )
    group.add_argument(
        "--essays", type=_paths, metavar="A,B", help="text files that hide the needles"
    )
    group.add_argument("--facts", type=Path, metavar="DIR", help="the bAbI files")
    group.add_argument(
        "--background", type=_paths, metavar="A,B", help="text files between the bAbI facts"
    )
    group.add_argument("--text", type=_paths, metavar="A,B", help="text files, long documents")
    group.add_argument("--seed", type=natural, metavar="N", help="of what is drawn (0)")
    group.add_argument(
        "--paper-size", metavar="SIZE", help="the paper's models beside it: 340M, 400M, 760M"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(map(Path, _names(text)))


_TASK_OPTIONS = (
    "samples",
    "max_length",
    "lengths",
    "shots",
    "task_data",
    "essays",
    "facts",
    "background",
    "text",
    "seed",
    "paper_size",
)
