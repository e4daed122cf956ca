"""The proof of an export: a clean process gives the trained model's logits and token ids."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from titans_pretrain.baselines import gpu_packages
from titans_pretrain.checkpoint.tensor_file import CODES
from titans_pretrain.errors import TitansError
from titans_pretrain.export import reload, tokenizer

PROJECT = "titans_pretrain"
ROWS = 2
WHOLE_BYTES = 2**31  # of float32 weights, up to which from_pretrained is tried as well
SPAN = 512  # tokens, of chunks, segments and windows that are gone beyond; of longer ones, grids
_SPAN_OF_OTHERS = 64  # of other libraries' models, whose code is not in the directory
_MOST_TOKENS = 600
_SHOWN_LINES = 5


def verify(
    directory: Path,
    model: nn.Module,
    compute: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    tokenizer_model: bytes,
    named: str | None = None,
) -> None:
    """Reload an exported directory elsewhere and compare; one block's weights at a time.

    Args:
        directory: the exported model.
        model: the same model without weights, of the code that trained it.
        compute: its logits of token ids (rows, T), on the CPU, by the checkpoint's weights rounded
            to ``dtype``.
        dtype: of the exported weights.
        tokenizer_model: contents of the sentencepiece model it was trained with.
        named: ``module:Class`` of the installed package that has the model's class; with None it
            must load without one.

    Raises:
        TitansError: it does not load or run, a key is missing or unexpected, it needs the project,
            or a logit or a token id differs.
    """
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS
    span = max(config.grid, SPAN) if hasattr(config, "grid") else _SPAN_OF_OTHERS
    length = min(span + 5, _MOST_TOKENS, longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
    wanted = compute(ids)
    texts = list(tokenizer.sample_texts(tokenizer_model))
    whole = sum(4 * parameter.numel() for parameter in model.parameters()) <= WHOLE_BYTES
    report, found = _reload(directory, ids, texts, named, whole=whole)
    for problem in ("missing", "unexpected", "mismatched"):
        if report[problem]:
            raise _error(f"{problem} keys: {', '.join(report[problem][:_SHOWN_LINES])}", directory)
    if report["dtypes"] != [CODES[dtype]]:
        raise _error(f"its weights are {', '.join(report['dtypes'])}", directory)
    if report["project"] and named is None:
        raise _error(f"its code imports {report['project'][0]}", directory)
    for way, logits in found.items():
        if not torch.equal(logits, wanted):
            worst = (logits - wanted).abs().max().item()
            raise _error(f"its logits differ by up to {worst:.3g}, loaded {way}", directory)
    ids_of = dict(zip(texts, report["token_ids"], strict=True))
    tokenizer.check_identity(tokenizer_model, ids_of.__getitem__)


def _reload(
    directory: Path, ids: torch.Tensor, texts: list[str], named: str | None, *, whole: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the clean process reports, and its logits by the way it loaded the model."""
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        (room / "model").symlink_to(directory.resolve())
        save_file({"ids": ids}, room / "ids.safetensors")
        request = {
            "path": _path(everything=named is not None),
            "without": gpu_packages.NAMES,
            "project": PROJECT,
            "model": str(room / "model"),
            "ids": str(room / "ids.safetensors"),
            "logits": str(room / "logits.safetensors"),
            "whole": whole,
            "class": named,
            "texts": texts,
            "threads": torch.get_num_threads(),
        }
        (room / "request.json").write_text(json.dumps(request), encoding="utf-8")
        printed = _run(room, directory, named)
        report: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return report, load_file(room / "logits.safetensors")


def _path(*, everything: bool) -> list[str]:
    """Where packages lie; with everything, those too that no installer put among the others."""
    return [
        str(Path(entry).absolute())
        for entry in sys.path
        if everything or entry.endswith("-packages")
    ]


def _run(room: Path, directory: Path, named: str | None) -> str:
    """What the clean process printed."""
    # -I and -S: no variables, no current directory, no .pth file that would bring the project.
    done = subprocess.run(
        [sys.executable, "-I", "-S", reload.__file__, str(room / "request.json")],
        cwd=room,
        env=_environment(room),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = " | ".join(done.stderr.strip().splitlines()[-_SHOWN_LINES:])
        if named is not None:
            kernels = ", ".join(gpu_packages.NAMES)
            raise TitansError(
                f"{named} does not load or run in a clean process on the CPU: {told}",
                where=str(directory),
                fix=f"nothing was left behind; export a model that runs without {kernels}",
            )
        raise _error(f"it does not load: {told}", directory)
    return done.stdout


def _environment(room: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(room / "modules"),
        "HF_HOME": str(room / "home"),
    }


def _error(what: str, directory: Path) -> TitansError:
    return TitansError(
        f"the exported model is not the trained one: {what}",
        where=str(directory),
        fix="nothing was left behind; report this as a bug",
    )
