"""Which files text comes from: paths, globs, URLs, or the data files of a Hugging Face dataset."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec

from titans_pretrain.errors import TitansError, UserError, nearest
from titans_pretrain.files import sha256_file

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
}
WHOLE_BYTES = 2**26


@dataclass(frozen=True)
class Input:
    """A file: ``name`` is its identity wherever it lies, ``url`` where it is read now."""

    name: str
    url: str
    size: int


def find(patterns: Sequence[str]) -> list[Input]:
    """The files that globs name (local paths or fsspec URLs), each once, sorted.

    Raises:
        UserError: a pattern that matches nothing, a directory, an unknown kind of file, or a place
            that cannot be listed.
    """
    urls: dict[str, str] = {}
    for pattern in patterns:
        with reaching(pattern, where="--input"):
            found = _expand(pattern)
        if not found:
            raise UserError(
                f"no file matches {pattern!r}", where="--input", fix="check the path, quote globs"
            )
        for url in found:
            urls.setdefault(_place(url), url)
    return _identify([urls[place] for place in sorted(urls)])


def find_dataset(name: str, *, config: str | None, split: str, revision: str | None) -> list[Input]:
    """The data files of a Hugging Face dataset, pinned to the commit that ``revision`` names.

    Raises:
        UserError: no such dataset, configuration or split, or files of a kind we do not read.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "the package `datasets` is not installed",
            where="--dataset",
            fix="pip install datasets, or give --input files",
        ) from None
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        files = {str(key): urls for key, urls in (builder.config.data_files or {}).items()}
    except Exception as error:
        raise UserError(
            f"cannot open the dataset {name!r}: {error}".splitlines()[0],
            where="--dataset",
            fix="check name, --dataset-config, --revision and the network",
        ) from None
    if split not in files:
        raise UserError(
            f"no split {split!r} in {name!r}", where="--split", fix=nearest(split, files)
        )
    return _identify(sorted(str(url) for url in files[split]))


def absolute(pattern: str) -> str:
    """A pattern that means the same from any working directory."""
    return pattern if "://" in pattern else str(Path(pattern).absolute())


@contextlib.contextmanager
def reaching(url: str, *, where: str) -> Iterator[None]:
    """Name the cause when files cannot be listed or read; of a URL that may be any exception."""
    try:
        yield
    except TitansError:
        raise
    except ImportError as error:
        fix = "install the package that the message names, or give local files"
        raise UserError(f"cannot reach {url!r}: {_line(error)}", where=where, fix=fix) from None
    except Exception as error:
        remote = "://" in url
        if not remote and not isinstance(error, OSError):
            raise
        fix = "check the URL, the credentials and the network" if remote else "permit reading it"
        raise UserError(f"cannot reach {url!r}: {_line(error)}", where=where, fix=fix) from None


def _line(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).splitlines()[0]


def _place(url: str) -> str:
    """The one absolute spelling of a path or URL; links keep their names."""
    path = url.removeprefix("file://")
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(found) for found in filesystem.glob(path)]
    if Path(pattern).is_dir():
        raise UserError(
            f"{pattern!r} is a directory", where="--input", fix=f"use '{pattern}/*.jsonl' or alike"
        )
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - a Path has no absolute globs
    return [path for path in found if Path(path).is_file()]


def _identify(urls: list[str]) -> list[Input]:
    """Names relative to the files' common folder; a hub file keeps its dataset and commit."""
    for url in urls:
        kind(url)
    paths = [_place(url) for url in urls]
    folders = [path.split("/")[:-1] for path in paths]
    levels = enumerate(zip(*folders, strict=False))
    common = next((i for i, names in levels if len(set(names)) > 1), min(map(len, folders)))
    found: dict[str, Input] = {}
    for url, path in zip(urls, paths, strict=True):
        name = path if path.startswith("hf://") else "/".join(path.split("/")[common:])
        if name in found:
            raise UserError(
                f"two inputs have the name {name!r}", where=url, fix="give each file once"
            )
        found[name] = Input(name, url, _size(url))
    return list(found.values())


def kind(url: str) -> str:
    """``parquet``, ``jsonl`` or ``txt``, by the name's end."""
    for suffix, name in KINDS.items():
        if url.endswith(suffix):
            return name
    raise UserError(
        f"unknown kind of file {Path(url).name!r}",
        where=url,
        fix=f"give {', '.join(KINDS)} files",
    )


def _size(url: str) -> int:
    with reaching(url, where="--input"):
        filesystem, path = fsspec.core.url_to_fs(url)
        size = filesystem.size(path)
    if size is None:
        raise UserError("the server does not tell the size", where=url, fix="copy the file here")
    return int(size)


def open_file(item: Input) -> IO[bytes]:
    """The file's bytes as stored, seekable."""
    filesystem, path = fsspec.core.url_to_fs(item.url)
    return filesystem.open(path, "rb")


def sha256(item: Input) -> str | None:
    """What tells an edited local file from the one planned; None of a URL.

    Of a large parquet file the footer alone, which holds every column's sizes and extremes, so
    that not every task reads a large corpus whole.

    Raises:
        UserError: the file cannot be read.
    """
    place = _place(item.url)
    if "://" in place:
        return None
    with reaching(item.url, where=item.url):
        if kind(item.url) != "parquet" or item.size <= WHOLE_BYTES:
            return sha256_file(Path(place))
        with open(place, "rb") as handle:
            handle.seek(max(0, item.size - 8))
            length = int.from_bytes(handle.read(4), "little")
            handle.seek(max(0, item.size - 8 - length))
            return hashlib.sha256(handle.read()).hexdigest()
