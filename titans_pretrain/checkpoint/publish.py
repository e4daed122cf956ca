"""Rank 0's part of a save: from the ranks' files to a checkpoint with a name."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest, retention
from titans_pretrain.errors import TitansError
from titans_pretrain.files import TEMPORARY_SUFFIX, atomic_file, sync_directory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint will lie, and where it lies until it is whole.

    Attributes:
        root: directory of the run's checkpoints.
        step: optimizer steps done.
        owner: names the start that saves, so that no other one's ranks write beside its own.
    """

    root: Path
    step: int
    owner: str = ""

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.root / layout.step_name(self.step)

    @property
    def temporary(self) -> Path:
        """The directory that all ranks write into."""
        return self._hidden(self.owner)

    @property
    def aside(self) -> Path:
        """Where a checkpoint that is replaced waits until its successor is in place."""
        return self._hidden(self.owner, retention.REPLACED)

    @property
    def doing(self) -> str:
        """The save in words, for errors."""
        return f"saving {self.path.name}"

    def _hidden(self, name: str, suffix: str = TEMPORARY_SUFFIX) -> Path:
        return self.root / f".{self.path.name}{name and '.'}{name}{suffix}"


def prepare(
    place: Place, state: Mapping[str, Any], files: Mapping[str, bytes], *, replace: bool = False
) -> dict[str, bytes]:
    """Make the temporary directory; the plain files that the checkpoint will hold.

    Args:
        place: where.
        state: further state.
        files: further files.
        replace: a good checkpoint of this step is another start's, and gives way.

    Raises:
        TitansError: a good checkpoint of this step is there that does not give way, or one that
            cannot be read now.
        ValueError: a file's name is not allowed.
        TypeError: a state that JSON would change.
    """
    for name in files:
        if name in layout.RESERVED or Path(name).name != name or name.startswith((".", "rank-")):
            raise ValueError(f"{name!r} cannot be the name of a checkpoint's file")
    plain = {**files, layout.STATE: layout.state_bytes(state)}
    if not replace and place.path.exists() and not layout.verify(place.path):
        raise TitansError("a good checkpoint of this step is there already", where=str(place.path))
    place.root.mkdir(parents=True, exist_ok=True)
    place.temporary.mkdir()
    return plain


def publish(
    place: Place,
    index: Mapping[str, Any],
    written: Sequence[manifest.FileRecord],
    plain: Mapping[str, bytes],
    *,
    keep: int,
    keep_every: int,
    spared: retention.Spared = retention.spare_none,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Complete the temporary directory, give it its name, move ``latest``, delete what is old.

    Args:
        place: where.
        index: the index of all boxes.
        written: the records of the ranks' files.
        plain: the other files.
        keep: how many of the newest checkpoints stay.
        keep_every: multiples of it stay for good; 0 none.
        spared: of the checkpoints' steps, those that stay for now.
        fence: raises where this start may write no more; asked before each visible change.

    Raises:
        TitansError: a rank's file is not there, or ``fence`` raised it.
        OSError: the file system refuses.
    """
    check_files(place.temporary, index["files"], written)
    text = json.dumps(index, separators=(",", ":"), sort_keys=True).encode()
    records = [*written] + [
        manifest.write_file(place.temporary, name, contents)
        for name, contents in {**plain, layout.TENSORS: text}.items()
    ]
    facts = {
        "format": layout.FORMAT,
        "step": place.step,
        "tensors": {
            name: {"dtype": entry["dtype"], "shape": entry["shape"]}
            for name, entry in index["tensors"].items()
        },
        "torch": str(torch.__version__),
    }
    manifest.write(place.temporary, records, facts)
    sync_directory(place.temporary)
    fence()
    _name(place)
    fence()
    with atomic_file(place.root / layout.LATEST, "w") as handle:
        handle.write(f"{place.path.name}\n")
    shutil.rmtree(place.aside, ignore_errors=True)
    fence()
    retention.prune(place.root, place.step, keep, keep_every, spared=spared)


def check_files(
    directory: Path, planned: Sequence[str], written: Sequence[manifest.FileRecord]
) -> None:
    """Refuse a checkpoint whose rank files are not exactly the planned ones, each whole.

    Args:
        directory: where rank 0 sees the files.
        planned: the files that the index leads to.
        written: what the ranks say they wrote.

    Raises:
        TitansError: a file is missing, cut or not of this save.
    """
    present = {path.name: path.stat().st_size for path in directory.glob("rank-*")}
    reported = {record.name: record.bytes for record in written}
    for name in sorted({*planned, *reported, *present}):
        if name not in planned:
            problem = "is there, though no rank was to write it"
        elif name not in reported:
            problem = "was to be written, but no rank did"
        elif name not in present:
            problem = "was written, but rank 0 does not see it: the directory is not shared"
        elif present[name] != reported[name]:
            problem = f"has {present[name]} bytes, its rank wrote {reported[name]}"
        else:
            continue
        raise TitansError(
            f"{len(present)} of {len(planned)} rank files are there: {name} {problem}",
            where=str(directory),
        )


def _name(place: Place) -> None:
    """Give the temporary directory the checkpoint's name; from here on it counts.

    Where the next start has removed that directory, the checkpoint of the name stays.
    """
    if not place.temporary.is_dir():
        raise FileNotFoundError(errno.ENOENT, "another start removed it", str(place.temporary))
    if place.path.exists():
        shutil.rmtree(place.aside, ignore_errors=True)
        os.rename(place.path, place.aside)
        log.warning("%s was damaged, or another start's, and is replaced", place.path)
    try:
        os.rename(place.temporary, place.path)
    except OSError:
        with contextlib.suppress(OSError):  # there is none, or its place is taken
            os.rename(place.aside, place.path)
        raise
    sync_directory(place.root)
