"""The verbs of models: one function a verb, each a thin call into the library."""

import argparse
from pathlib import Path
from typing import Any

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
    exported = huggingface.export(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    if exported.is_new:
        told = f"exported from {exported.checkpoint}; a clean process gives the same logits"
    else:
        told = f"is there already, from {exported.checkpoint}; every byte is as it was made"
    print(f"{options.out}: {told}")
    if options.push is not None:
        print(f"pushed to {push.push(options.out, options.push, private=options.private)}")


def generate(options: argparse.Namespace) -> None:
    """Print a prompt and its continuation."""
    from titans_pretrain.inference import generate

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
    from titans_pretrain.inference import memorize

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
    from titans_pretrain.inference import inspect_memory

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
    print(f"{picture}, {inspect_memory.numbers_path(picture)}")


def evaluate(options: argparse.Namespace) -> None:
    """Score an exported model on tasks, or on held-out data."""
    if options.tasks is not None:
        _evaluate_tasks(options)
        return
    from titans_pretrain import errors
    from titans_pretrain.evaluate import heldout
    from titans_pretrain.evaluate import options as task_options

    if options.data is None:
        raise errors.UserError(
            "nothing to score the model on", where="command line", fix="add --data or --tasks"
        )
    for name in (*task_options.NAMES, "paper_size"):
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
    from titans_pretrain.baselines import gpu_packages
    from titans_pretrain.evaluate import of_checkpoint

    with gpu_packages.for_device(options.device):
        path = options.config or of_checkpoint.configuration(options.checkpoint)
        config = of_checkpoint.load(path)
        found = of_checkpoint.evaluate(options.checkpoint, config, device=options.device)
    for name, value in found.metrics.items():
        print(f"step {found.step}  {name} {value:.6g}")


def _evaluate_tasks(options: argparse.Namespace) -> None:
    from titans_pretrain import errors
    from titans_pretrain.evaluate import loaded, paper, report, suite, tasks
    from titans_pretrain.evaluate import options as task_options

    paper.check_size(options.paper_size)
    for name in ("sequence_length", "sequences", "validation_fraction"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise errors.UserError(
                f"{option} is for held-out data, which --tasks does not score",
                where=option,
                fix="leave it out, or run without --tasks",
            )
    told = task_options.told(options, loaded.trained_length(options.model))
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
        sequences=options.sequences or 0,
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
    verb.add_argument("--top-k", type=int, help="0 samples among all (0)")
    verb.add_argument("--top-p", type=float, help="nucleus (1.0)")
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
        help="run the Python files, or the package, of a model of another kind",
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
        help="run the Python files, or the package, of a model of another kind",
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
    group.add_argument("--sequences", type=natural, help="at most; 0: all (0)")
    group.add_argument(
        "--validation-fraction",
        type=share,
        metavar="SHARE",
        help="of the data, the last, that is held out (as in training)",
    )


def _add_task_options(group: Any) -> None:
    from titans_pretrain.evaluate import options

    group.add_argument(
        "--tasks", metavar="A,B", help="names of tasks and groups: paper, commonsense, piqa …"
    )
    options.add(group)
    group.add_argument(
        "--paper-size", metavar="SIZE", help="the paper's models beside it: 340M, 400M, 760M"
    )
