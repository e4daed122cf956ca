"""Which files text comes from: paths, globs, URLs, or the data files of a Hugging Face dataset."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec

from titans_pretrain.errors import UserError, nearest

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
}


@dataclass(frozen=True)
class Input:
    """A file: ``name`` is its identity wherever it lies, ``url`` where it is read now."""

    name: str
    url: str
    size: int


def find(patterns: Sequence[str]) -> list[Input]:
    """The files that globs name (local paths or fsspec URLs), sorted.

    Raises:
        UserError: a pattern that matches nothing, a directory, or an unknown kind of file.
    """
    urls: set[str] = set()
    for pattern in patterns:
        found = _expand(pattern)
        if not found:
            raise UserError(
                f"no file matches {pattern!r}", where="--input", fix="check the path, quote globs"
            )
        urls.update(found)
    return _identify(sorted(urls))


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
    # Links keep their names: what they point to may be called by a hash.
    paths = [url if "://" in url else os.path.abspath(url) for url in urls]  # noqa: PTH100
    folders = [path.split("/")[:-1] for path in paths]
    levels = enumerate(zip(*folders, strict=False))
    common = next((i for i, names in levels if len(set(names)) > 1), min(map(len, folders)))
    return [
        Input(
            name=path if path.startswith("hf://") else "/".join(path.split("/")[common:]),
            url=url,
            size=_size(url),
        )
        for url, path in zip(urls, paths, strict=True)
    ]


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
    filesystem, path = fsspec.core.url_to_fs(url)
    return int(filesystem.size(path))


def open_file(item: Input) -> IO[bytes]:
    """The file's bytes as stored, seekable."""
    filesystem, path = fsspec.core.url_to_fs(item.url)
    return filesystem.open(path, "rb")
