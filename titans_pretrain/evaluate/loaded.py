"""A model that is ready to be evaluated."""

import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError
from titans_pretrain.files import sha256_cached, sha256_file
from titans_pretrain.inference import generate, prompts
from titans_pretrain.inference.prefill import OWN

_LARGEST_HEADER = 10**8  # bytes, as safetensors has it
_DECIDE = {".safetensors", ".json", ".py", ".model", ".txt"}  # weights, settings, code, tokenizer
_POSITIONS = ("max_position_embeddings", "n_positions")
_OURS = __name__.partition(".")[0]
_OWN_CODE = f"{_OURS}.model"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Loaded:
    """A causal language model, evaluating on its device, with its tokenizer.

    Attributes:
        directory: what it was read from.
        network: the model.
        tokenizer: transformers' own.
        device: torch device the model is on.
    """

    directory: Path
    network: Any
    tokenizer: Any
    device: Any

    @property
    def dtype(self) -> str:
        """The weights' dtype, such as ``float32``."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def longest(self) -> int | None:
        """Tokens that the model's positions allow; None where nothing bounds them."""
        return prompts.positions(self.network)


def load(
    directory: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Read an exported model, or another causal language model, onto a device.

    Args:
        directory: what ``titans export`` wrote, or a Hugging Face directory.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.

    Raises:
        UserError: no model, an unusable one, or an unknown device.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    place = generate.choose_device(device)
    network, tokenizer = generate.load(directory, trust_remote_code=trust_remote_code, device=place)
    network.to(place)
    return Loaded(directory, network, tokenizer, place)


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
    """Tells one model from another: sha256 of its manifest, or of all files that decide results.

    These are the weights, settings, code and tokenizer. A manifest has the hashes of all files,
    which loading compares.
    """
    if (directory / manifest.NAME).exists():
        return sha256_file(directory / manifest.NAME)
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in _DECIDE and path.is_file():
            digest.update(f"{path.name} {sha256_cached(path)}\n".encode())
    return digest.hexdigest()


def code(directory: Path) -> str:
    """Tells the code that runs a model: that of the class its export names, or its ``model_type``.

    Raises:
        UserError: the directory holds no model.
        TitansError: its manifest is damaged.
    """
    named = facts(directory).get("training", {}).get(foreign.KEY)
    return code_of(str(named or generate.settings(directory).get("model_type")))


def code_of(kind: str) -> str:
    """Tells code that runs models of a kind, a ``model_type`` or a value of ``model.hf``.

    Returns:
        The sha256 of our modules, or of those of another installed package; else the version of
        transformers.
    """
    module, named, _ = kind.partition(":")
    if kind in OWN or (named and module.partition(".")[0] == _OURS):
        return _sha256_of_modules(_OWN_CODE)
    if package := foreign.package(kind):
        return _sha256_of_modules(package)
    return f"transformers {metadata.version('transformers')}"


def _sha256_of_modules(package: str) -> str:
    """Of the Python files of an installed package, whatever is compiled; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "not installed"
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    files = [(path.relative_to(root), path) for root in roots for path in root.rglob("*.py")]
    if not roots and spec.origin is not None:
        files = [(Path(package), Path(spec.origin))]
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name.as_posix()} {sha256_cached(path)}\n".encode())
    return digest.hexdigest()


def positions(directory: Path) -> int | None:
    """Tokens that a model's positions allow, as its config.json tells; None where it does not.

    Raises:
        UserError: the directory holds no model.
    """
    settings = generate.settings(directory)
    return next(
        (settings[name] for name in _POSITIONS if isinstance(settings.get(name), int)), None
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that memory, of a GPU or of the host, was not enough."""
    told = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in told for words in _NO_MEMORY)
    )


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
