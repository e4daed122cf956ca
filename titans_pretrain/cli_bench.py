"""``titans bench``: one function a job, each a thin call into the library."""

import argparse
from pathlib import Path
from typing import Any

from titans_pretrain.cli_types import above_zero, positive
from titans_pretrain.errors import DONE, FAILED


def bench_memory(options: argparse.Namespace) -> int:
    """Measure a memory layer."""
    from titans_pretrain.bench import memory, progress

    return _code(memory.run(memory.Options(**_given(options)), progress.Tell()))


def bench_model(options: argparse.Namespace) -> int:
    """Measure training steps of whole models."""
    from titans_pretrain.bench import model, progress

    return _code(model.run(model.Options(**_given(options)), progress.Tell()))


def bench_data(options: argparse.Namespace) -> int:
    """Measure loaders."""
    from titans_pretrain.bench import data, progress

    return _code(data.run(data.Options(**_given(options)), progress.Tell()))


def bench_wavefront(options: argparse.Namespace) -> int:
    """Measure steps of ranks along a sequence."""
    from titans_pretrain.bench import progress, wavefront

    return _code(wavefront.run(wavefront.Options(**_given(options)), progress.Tell()))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options by name, without the verb."""
    return {name: value for name, value in vars(options).items() if name != "verb"}


def _code(met: bool) -> int:
    """Exit code of a benchmark whose targets are met, or not."""
    return DONE if met else FAILED


def add(verbs: Any) -> None:
    """Register ``titans bench`` and its jobs."""
    bench = verbs.add_parser("bench", help="measure speed and memory beside others'")
    jobs = bench.add_subparsers(required=True, metavar="JOB")
    _add_memory(jobs)
    _add_model(jobs)
    _add_data(jobs)
    _add_wavefront(jobs)


def _add_memory(jobs: Any) -> None:
    job = jobs.add_parser("memory", help="one memory layer, attention, titans-pytorch")
    job.set_defaults(verb=bench_memory)
    job.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        default=[2048, 8192],
        metavar="TOKENS",
        help="of a sequence (2048 8192)",
    )
    job.add_argument("--dim", type=positive, default=256, help="width (%(default)s)")
    job.add_argument("--heads", type=positive, default=4, help="memories (%(default)s)")
    job.add_argument("--depth", type=positive, default=2, help="its layers (%(default)s)")
    job.add_argument(
        "--expansion", type=positive, default=4, help="hidden over head width (%(default)s)"
    )
    job.add_argument("--chunk", type=positive, default=64, help="tokens (%(default)s)")
    job.add_argument(
        "--gate-per", choices=("token", "chunk"), default="token", help="gates (%(default)s)"
    )
    job.add_argument(
        "--memory-kernels",
        choices=("torch", "triton"),
        default="torch",
        help="that scan the memory (%(default)s)",
    )
    job.add_argument("--batch", type=positive, default=2, help="sequences (%(default)s)")
    job.add_argument(
        "--peers",
        nargs="*",
        choices=("attention", "titans-pytorch"),
        default=["attention", "titans-pytorch"],
        help="measured beside it (both)",
    )
    job.add_argument(
        "--peer-limit",
        type=positive,
        default=8192,
        metavar="TOKENS",
        help="longest sequence that the others are given (%(default)s)",
    )
    job.add_argument(
        "--peer-python",
        type=Path,
        metavar="PYTHON",
        help="interpreter that has titans-pytorch, run beside this one (this one)",
    )
    job.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="KIND[@TOKENS]=BOUND",
        help="targets, exit code 1 if one is missed: speed (of titans-pytorch's tokens/s, at "
        "least), memory (of its extra peak, at most), attention (of its tokens/s, at least), "
        "growth (time a token over the first length's, at most), products (share of the measured "
        "matrix products that the scan forward reaches, at least)",
    )
    _add_rounds(job, 5)
    _add_machine(job)
    _add_json(job)


def _add_model(jobs: Any) -> None:
    job = jobs.add_parser("model", help="training steps of whole models, Transformer++")
    job.set_defaults(verb=bench_model)
    job.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a preset of configs/model, such as titans-mac-340m, or a run's YAML file",
    )
    job.add_argument(
        "--set",
        nargs="+",
        dest="override",
        default=[],
        metavar="KEY=VALUE",
        help="fields of all models, e.g. chunk_size=256",
    )
    job.add_argument(
        "--length", type=positive, default=4096, metavar="TOKENS", help="(%(default)s)"
    )
    job.add_argument("--micro-batch", type=positive, default=1, help="sequences (%(default)s)")
    job.add_argument(
        "--activation-checkpointing",
        dest="checkpointing",
        action="store_true",
        help="recompute blocks in backward",
    )
    job.add_argument(
        "--memory-kernels",
        choices=("torch", "triton"),
        help="that scan memories (as a run's YAML says, torch for presets)",
    )
    job.add_argument(
        "--against",
        metavar="MODEL",
        help="a preset or a run's YAML file, without --set; all others' tokens/s are compared with "
        "its",
    )
    job.add_argument(
        "--no-peer",
        dest="peer",
        action="store_false",
        help="no Transformer++ of as many parameters beside each Titans",
    )
    job.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="KIND[@MODEL]=BOUND",
        help="targets, exit code 1 if one is missed: speed (of its Transformer++'s tokens/s, at "
        "least), mfu (share of the GPU's peak, or of the measured matrix products where that is "
        "not known, at least)",
    )
    _add_rounds(job, 5)
    _add_machine(job)
    _add_json(job)


def _add_data(jobs: Any) -> None:
    job = jobs.add_parser("data", help="our loader, the bare file, webdataset")
    job.set_defaults(verb=bench_data)
    job.add_argument(
        "--tokens", type=positive, default=48 * 2**20, help="of the stream (%(default)s)"
    )
    job.add_argument("--folder", type=Path, help="where files are made for the while (TMPDIR)")
    job.add_argument(
        "--check",
        type=above_zero,
        metavar="RATE",
        help="exit code 1 unless ours reads so many million tokens a second and core, and no less "
        "than webdataset",
    )
    _add_rounds(job, 3)
    _add_json(job)


def _add_wavefront(jobs: Any) -> None:
    job = jobs.add_parser("wavefront", help="steps of ranks along a sequence, layers that sleep")
    job.set_defaults(verb=bench_wavefront)
    job.add_argument("--layers", type=positive, default=12, help="(%(default)s)")
    job.add_argument(
        "--forward-ms", type=above_zero, default=20.0, help="sleep of a layer (%(default)s)"
    )
    job.add_argument(
        "--backward-ms", type=above_zero, default=40.0, help="in backward (%(default)s)"
    )
    job.add_argument(
        "--micro-batches", type=positive, default=4, help="of a step, beside 1 (%(default)s)"
    )
    job.add_argument(
        "--ranks",
        nargs="+",
        type=positive,
        default=[1, 2, 4],
        help="along the sequence (1 2 4)",
    )
    job.add_argument(
        "--steps", type=positive, default=4, help="of a round; their median counts (%(default)s)"
    )
    job.add_argument(
        "--check",
        type=above_zero,
        metavar="RATIO",
        help="exit code 1 if a step takes more than this many times its formula",
    )
    job.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    _add_rounds(job, 1)
    _add_json(job)


def _add_rounds(job: Any, usual: int) -> None:
    job.add_argument(
        "--rounds", type=positive, default=usual, help="turns of each contender (%(default)s)"
    )


def _add_machine(job: Any) -> None:
    job.add_argument(
        "--threads", type=positive, help="of each contender (one for each core it may use)"
    )
    job.add_argument("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
    job.add_argument("--dtype", choices=("fp32", "bf16"), help="(bf16 on a GPU, fp32 on the CPU)")


def _add_json(job: Any) -> None:
    job.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
