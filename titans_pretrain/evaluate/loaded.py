"""A model that is ready to be evaluated."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain import generate
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import sha256_file

DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_HEADER = 10**8  # bytes, as safetensors has it


@dataclass(frozen=True)
class Loaded:
    """A causal language model, evaluating on its device, with its tokenizer.

    Attributes:
        directory: what it was read from.
        network: the model.
        tokenizer: transformers' own.
        facts: the export's ``manifest.json``, empty where there is none.
        device: torch device the model is on.
    """

    directory: Path
    network: Any
    tokenizer: Any
    facts: Mapping[str, Any]
    device: Any

    @property
    def dtype(self) -> str:
        """The weights' dtype, such as ``float32``."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def longest(self) -> int | None:
        """Tokens that the model's positions allow; None where nothing bounds them."""
        longest: int | None = getattr(self.network.config, "max_position_embeddings", None)
        return longest

    @property
    def fingerprint(self) -> str:
        """Tells the model from others, see the function of that name."""
        return fingerprint(self.directory)


def load(
    directory: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Read an exported model, or another causal language model, onto a device.

    Args:
        directory: what ``titans export`` wrote, or a Hugging Face directory.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None takes that of the files.
        trust_remote_code: run the Python files of a model of another kind.

    Raises:
        UserError: no model, an unusable one, an unknown device or dtype.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    if dtype not in (None, *DTYPES):
        raise UserError(f"{dtype!r} is unknown", where="--dtype", fix=f"use {', '.join(DTYPES)}")
    disable_progress_bar()
    set_verbosity_error()
    place = generate.choose_device(device)
    network, tokenizer = generate.load(directory, trust_remote_code=trust_remote_code)
    network.to(device=place, dtype=dtype and getattr(torch, dtype))
    return Loaded(directory, network, tokenizer, facts(directory), place)


def facts(directory: Path) -> dict[str, Any]:
    """What an export's manifest tells; empty where there is none.

    Raises:
        TitansError: it is damaged.
    """
    return manifest.read(directory) if (directory / manifest.NAME).exists() else {}


def trained_length(directory: Path) -> int | None:
    """Tokens of the sequences that a model was trained on, as its export tells.

    Raises:
        TitansError: its manifest is damaged.
    """
    length: int | None = facts(directory).get("training", {}).get("sequence_length")
    return length


def fingerprint(directory: Path) -> str:
    """Tells one model from another: sha256 of its manifest, or of config.json and file sizes."""
    if (directory / manifest.NAME).exists():
        return sha256_file(directory / manifest.NAME)
    settings = directory / "config.json"
    digest = hashlib.sha256(settings.read_bytes() if settings.is_file() else b"")
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def parameters(directory: Path) -> int:
    """How many numbers a model's safetensors files hold; tied ones are there once.

    Raises:
        TitansError: a file cannot be read.
    """
    return sum(_numbers(path) for path in sorted(directory.glob("*.safetensors")))


def _numbers(path: Path) -> int:
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            tensors = json.loads(handle.read(min(length, _LARGEST_HEADER)))
        shapes = [value["shape"] for name, value in tensors.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TitansError(
            f"{path.name} cannot be read: {error}", where=str(path), fix="export the model again"
        ) from None
