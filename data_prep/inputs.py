"""Which files text comes from: paths, globs, URLs, or a dataset of the Hugging Face hub."""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem
from fsspec.core import has_magic
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from data_prep import local_files
from data_prep.remote import RemoteFile
from data_prep.retry import retry
from titans_pretrain.errors import TitansError, UserError, nearest
from titans_pretrain.files import sha256_file

KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
}
WHOLE_BYTES = 2**26  # larger files are told apart by a part of their bytes
SAMPLE_BLOCKS, SAMPLE_BYTES = 64, 2**16
THREADS = 32  # sizes asked for, at the same time


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
    files: dict[str, int | None] = {}
    for pattern in patterns:
        with reaching(pattern, where="--input"):
            found = _expand(pattern)
        if not found:
            raise UserError(
                f"no file matches {pattern!r}", where="--input", fix="check the path, quote globs"
            )
        for url, size in found.items():
            files.setdefault(_place(url), size)
    return _identify({place: files[place] for place in sorted(files)})


def find_dataset(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str | None,
    data_files: Sequence[str] | None = None,
) -> list[Input]:
    """The files of a dataset as the ``datasets`` library loads it, pinned to one commit.

    Parquet, jsonl and arrow files are read where they lie. Whatever else the library can load
    (csv, json arrays, xml, webdataset, lines of text, …) it builds into Arrow files in its cache
    (``HF_DATASETS_CACHE``), once; these are the inputs then.

    Args:
        name: of the hub (``HuggingFaceFW/fineweb-edu``), a folder, or a loader (``csv``).
        config: the dataset's configuration, e.g. ``sample-10BT``.
        split: e.g. ``train``.
        revision: commit, tag or branch; None: the main branch's commit now.
        data_files: globs of files within the dataset, or of those that a loader reads.

    Raises:
        UserError: no such dataset, configuration or split, or it cannot be built.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "the package `datasets` is not installed",
            where="--dataset",
            fix="pip install datasets, or give --input files",
        ) from None
    patterns = {split: list(data_files)} if data_files else None
    try:
        builder = retry(
            lambda: datasets.load_dataset_builder(
                name, config, revision=revision, data_files=patterns
            ),
            f"opening the dataset {name}",
        )
    except Exception as error:
        fix = "check name, --dataset-config, --revision, --data-files and the network"
        raise _no_dataset(f"cannot open the dataset {name!r}", error, fix) from None
    files = {str(key): urls for key, urls in (builder.config.data_files or {}).items()}
    if files and split not in files:
        raise _no_split(split, name, files)
    urls = sorted(str(url) for url in files.get(split, ()))
    if not urls or not _read_in_place(builder, urls):
        urls = _build(builder, name, split)
    urls = [_pin(url, where="--dataset") for url in urls]
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise UserError("the dataset lists a file twice", where=twice, fix="give each file once")
    return _identify(dict.fromkeys(map(_place, urls)))


def _read_in_place(builder: Any, urls: list[str]) -> bool:
    """Whether the data files are of our kinds and mean to us what they mean to the library."""
    loader = type(builder).__module__.rpartition(".")[2]
    ours = all(url.endswith(tuple(KINDS)) for url in urls)
    options = {"field": None, "filters": None, "encoding": "utf-8", "encoding_errors": None}
    plain = all(getattr(builder.config, name, value) == value for name, value in options.items())
    return ours and plain and loader in ("parquet", "json", "arrow")


def _build(builder: Any, name: str, split: str) -> list[str]:
    """The Arrow files of a split that the library makes, or has made before."""
    try:
        retry(builder.download_and_prepare, f"building the dataset {name}")
    except Exception as error:
        fix = "mend the data files, or make room where HF_DATASETS_CACHE points"
        raise _no_dataset(f"cannot build the dataset {name!r}", error, fix) from None
    if split not in builder.info.splits:
        raise _no_split(split, name, builder.info.splits)
    stem = f"{builder.dataset_name}-{split}"
    cache = Path(builder.cache_dir)
    found = {*cache.glob(f"{stem}.arrow"), *cache.glob(f"{stem}-*-of-*.arrow")}
    return sorted(map(str, found))


def _no_dataset(what: str, error: Exception, fix: str) -> UserError:
    """The library's failure with its cause, which says more."""
    reason = _line(error)
    if isinstance(error.__cause__, Exception):
        reason = f"{reason}: {_line(error.__cause__)}"
    return UserError(f"{what}: {reason}", where="--dataset", fix=fix)


def _no_split(split: str, name: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"no split {split!r} in {name!r}", where="--split", fix=nearest(split, map(str, known))
    )


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
        remote = is_remote(url)
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


def _expand(pattern: str) -> dict[str, int | None]:
    """The files that a pattern names, with their sizes where a listing tells them."""
    if is_remote(pattern):
        return retry(lambda: _expand_url(pinned(pattern)), f"listing {pattern}")
    pattern = pattern.removeprefix("file://")
    if Path(pattern).is_dir():
        raise UserError(
            f"{pattern!r} is a directory", where="--input", fix=f"use '{pattern}/*.jsonl' or alike"
        )
    return dict.fromkeys(local_files.matching(pattern))


def _expand_url(pattern: str) -> dict[str, int | None]:
    filesystem, path = fsspec.core.url_to_fs(pattern)
    filesystem.invalidate_cache()
    try:
        if not has_magic(path):
            found = {path: filesystem.info(path)}
        elif _walks(filesystem):
            found = _glob(filesystem, path)
        else:
            found = filesystem.glob(path, detail=True)
    except FileNotFoundError:
        return {}
    return {
        filesystem.unstrip_protocol(name): entry.get("size")
        for name, entry in found.items()
        if entry.get("type") != "directory"
    }


def _walks(filesystem: AbstractFileSystem) -> bool:
    """Whether a glob goes from folder to folder, where fsspec leaves out what it cannot list."""
    if isinstance(filesystem, AsyncFileSystem):
        return type(filesystem)._find is AsyncFileSystem._find
    return type(filesystem).find is AbstractFileSystem.find


def _glob(filesystem: AbstractFileSystem, pattern: str) -> dict[str, Any]:
    """The files that match, or the error of the first folder that cannot be listed."""
    matches = re.compile(glob_translate(pattern)).match
    folders = pattern.split("/")
    fixed = next(level for level, name in enumerate(folders) if has_magic(name))
    deepest = len(folders) - 1 if "**" not in pattern else math.inf
    found = {}
    open_folders = [("/".join(folders[:fixed]), fixed)]
    while open_folders:
        folder, level = open_folders.pop()
        for entry in filesystem.ls(folder, detail=True):
            if entry["type"] != "directory" and matches(entry["name"]):
                found[entry["name"]] = entry
            elif entry["type"] == "directory" and level < deepest:
                open_folders.append((entry["name"].rstrip("/"), level + 1))
    return found


def _pin(url: str, *, where: str) -> str:
    with reaching(url, where=where):
        return retry(lambda: pinned(url), f"looking up {url}")


def pinned(url: str) -> str:
    """A Hugging Face URL with the commit that its branch or tag is at now; others as they are."""
    if not url.startswith("hf://") or re.match(r"hf://(buckets/|[^@]*@[0-9a-f]{40}(/|$))", url):
        return url
    import huggingface_hub

    place: Any = huggingface_hub.HfFileSystem().resolve_path(url)
    found = huggingface_hub.HfApi().repo_info(
        place.repo_id, repo_type=place.repo_type, revision=place.revision
    )
    kinds = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{kinds}{place.repo_id}@{found.sha}/{place.path_in_repo}"


def _identify(files: Mapping[str, int | None]) -> list[Input]:
    """Inputs at URLs, with sizes asked for where they are None.

    Names are relative to the files' common folder; a hub file keeps its dataset and commit.

    Raises:
        UserError: an unknown kind of file, a name that is no UTF-8, or a size that cannot be had.
    """
    urls = list(files)
    for url in urls:
        kind(url)
    names = dict(zip(urls, _names([_place(url) for url in urls]), strict=True))
    for url, name in names.items():
        if not _is_utf8(name):
            raise UserError("the file's name is no UTF-8", where=repr(url), fix="rename the file")
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(lambda url: files[url] or _size(url), urls))
    return [Input(names[url], url, size) for url, size in zip(urls, sizes, strict=True)]


def _names(places: list[str]) -> list[str]:
    folders = [place.split("/")[:-1] for place in places]
    levels = enumerate(zip(*folders, strict=False))
    ends = min(map(len, folders), default=0)
    common = next((i for i, names in levels if len(set(names)) > 1), ends)
    return [
        place if place.startswith("hf://") else "/".join(place.split("/")[common:])
        for place in places
    ]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind(url: str) -> str:
    """``parquet``, ``jsonl``, ``arrow`` or ``txt``, by the name's end."""
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
        if not is_remote(url):
            return Path(_place(url)).stat().st_size
        filesystem, path = fsspec.core.url_to_fs(url)
        size = retry(lambda: filesystem.size(path), f"asking for the size of {url}")
    if size is None:
        raise UserError("the server does not tell the size", where=url, fix="copy the file here")
    return int(size)


def is_remote(url: str) -> bool:
    """Whether a file is behind a URL, and not a path or ``file://``."""
    return "://" in url.removeprefix("file://")


def local(item: Input) -> Path:
    """Where a file lies that is not remote."""
    return Path(_place(item.url))


def open_file(item: Input) -> IO[bytes]:
    """The file's bytes as stored, seekable; of a URL every read is a request, retried."""
    if is_remote(item.url):
        return cast(IO[bytes], RemoteFile(item.url, item.size))
    return open(local(item), "rb")


def sha256(item: Input) -> str | None:
    """What tells an edited local file from the one planned; None of a URL.

    Of a file over 64 MiB it covers the size and a part, so that not every task reads a large
    corpus whole: of parquet the footer, which holds every column's sizes and extremes, of others 64
    blocks of 64 KiB, at places that the size decides on.

    Raises:
        UserError: the file cannot be read.
    """
    if is_remote(item.url):
        return None
    place = local(item)
    with reaching(item.url, where=item.url):
        if item.size <= WHOLE_BYTES:
            return sha256_file(place)
        with open(place, "rb") as handle:
            parts = _footer if kind(item.url) == "parquet" else _blocks
            digest = hashlib.sha256(str(item.size).encode())
            for part in parts(handle, item.size):
                digest.update(part)
            return digest.hexdigest()


def _footer(handle: IO[bytes], size: int) -> Iterator[bytes]:
    """What a parquet file says of itself at its end."""
    handle.seek(max(0, size - 8))
    length = int.from_bytes(handle.read(4), "little")
    handle.seek(max(0, size - 8 - length))
    yield handle.read()


def _blocks(handle: IO[bytes], size: int) -> Iterator[bytes]:
    """The first and the last block of a file, and others in between at random."""
    last = max(0, size - SAMPLE_BYTES)
    bits = np.random.PCG64(np.random.SeedSequence(size)).random_raw(SAMPLE_BLOCKS - 2)
    for place in sorted({0, *(bits % np.uint64(last + 1)).tolist(), last}):
        handle.seek(place)
        yield handle.read(SAMPLE_BYTES)
