"""A memory on disk: what a model keeps of a text, in one safetensors file.

Tensors are called ``layer.<number>.<name>``, ``<name>`` being the cache's. The header tells whose
memory it is, how many tokens it has read, and the end of the text that still waits to be read with
what follows (``token_stream.py``).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError
from titans_pretrain.files import atomic_file, sha256_cached
from titans_pretrain.inference.prefill import new_cache

FORMAT = "titans-memory/1"
_DEFINING = ("config.json", "tokenizer.json", "*.safetensors")


@dataclass(frozen=True)
class Owner:
    """The model a memory belongs to.

    Attributes:
        model: its directory.
        fingerprint: sha256 of its configuration, tokenizer and weights.
        dtype: of the weights.
    """

    model: str
    fingerprint: str
    dtype: str

    @classmethod
    def of(cls, directory: Path, network: Any) -> "Owner":
        """That of a model that was loaded from a directory."""
        dtype = str(network.dtype).removeprefix("torch.")
        return cls(str(directory), fingerprint(directory), dtype)


@dataclass(frozen=True)
class Reading:
    """How far a file has been read.

    Attributes:
        bytes: of the file, from its beginning.
        sha256: of these bytes.
        earlier: digest of the memory that the reading went on from, empty for none.
    """

    bytes: int
    sha256: str
    earlier: str = ""


@dataclass
class Memory:
    """A memory and what is needed to go on with it.

    Attributes:
        cache: the TitansCache, of one row; nothing in it before the first token.
        tokens: read so far.
        context: the last character read.
        pending: the end of the text, not read yet: its last tokens depend on what follows.
        reading: of a file that has not come to its end; None where nothing is left to read.
        last: the reading that came to its end last; None before the first.
        digest: of the file it was loaded from.
    """

    cache: Any
    tokens: int = 0
    context: str = ""
    pending: str = ""
    reading: Reading | None = None
    last: Reading | None = None
    digest: str = field(default="", compare=False)


def fingerprint(directory: Path) -> str:
    """sha256 of a model's configuration, tokenizer and weights, whatever else lies beside them."""
    names = sorted(path.name for pattern in _DEFINING for path in directory.glob(pattern))
    known = {}
    if (directory / manifest.NAME).exists():
        known = {one["name"]: one["sha256"] for one in manifest.read(directory)["files"]}
    digests = {name: known.get(name) or sha256_cached(directory / name) for name in names}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def save(path: Path, memory: Memory, owner: Owner) -> None:
    """Write a memory; an older file of that name stays until the new one is whole."""
    from safetensors.torch import save as serialized

    tensors = {
        f"layer.{number}.{name}": tensor.detach().cpu().clone().contiguous()
        for number, layer in enumerate(memory.cache.layers)
        for name, tensor in layer.state.items()
    }
    told = {
        "format": FORMAT,
        "owner": asdict(owner),
        "tokens": memory.tokens,
        "context": memory.context,
        "pending": memory.pending,
        "reading": None if memory.reading is None else asdict(memory.reading),
        "last": None if memory.last is None else asdict(memory.last),
    }
    header = {name: json.dumps(value) for name, value in told.items()}
    header["sha256"] = _digest(tensors, header)
    with atomic_file(path) as handle:
        handle.write(serialized(tensors, header))


def load(path: Path, network: Any, owner: Owner) -> Memory:
    """Read a memory for a model.

    Its cache counts columns anew: masks of the next call begin with that call.

    Args:
        path: what ``save`` wrote.
        network: the model, on its device.
        owner: the same model.

    Raises:
        UserError: there is no memory, it is damaged, or another model's.
        OSError: it cannot be read.
    """
    told, tensors, digest = _read(path)
    _check_owner(path, Owner(**told["owner"]), owner)
    cache = new_cache(network)
    for name, tensor in tensors.items():
        _, number, key = name.split(".", 2)
        cache.layers[int(number)].state[key] = tensor.to(network.device)
    reading, last = (value and Reading(**value) for value in (told["reading"], told["last"]))
    return Memory(cache, told["tokens"], told["context"], told["pending"], reading, last, digest)


def owner_of(path: Path) -> Owner:
    """The model that a memory belongs to.

    Raises:
        UserError: there is no memory, or it is damaged.
        OSError: it cannot be read.
    """
    told, _, _ = _read(path)
    return Owner(**told["owner"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What a memory's header tells, its tensors, and its digest."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise UserError(
            "a directory is no memory", where=str(path), fix="give what titans memorize wrote"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            header = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            "there is no such memory", where=str(path), fix="make one: titans memorize"
        ) from None
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    digest = header.pop("sha256", "")
    if header.get("format") != json.dumps(FORMAT):
        raise UserError(
            "the file is no memory", where=str(path), fix="give what titans memorize wrote"
        )
    if digest != _digest(tensors, header):
        raise _damaged(path, "it differs from its checksum")
    return {name: json.loads(value) for name, value in header.items()}, tensors, digest


def _check_owner(path: Path, theirs: Owner, ours: Owner) -> None:
    if theirs.fingerprint == ours.fingerprint:
        return
    raise UserError(
        f"the memory is another model's: {theirs.model} ({theirs.dtype}), not {ours.model} "
        f"({ours.dtype})",
        where=str(path),
        fix="use that model, or read the text again with this one: titans memorize",
    )


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"the memory cannot be read: {reason}",
        where=str(path),
        fix="read the text again: titans memorize",
    )


def _digest(tensors: Mapping[str, Any], header: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
