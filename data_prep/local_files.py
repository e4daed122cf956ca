"""The local files that a glob names: as ``glob`` finds them, but nothing is left out silently."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence

from titans_pretrain.errors import UserError


def matching(pattern: str) -> Iterator[str]:
    """The files that a pattern names; ``**`` stands for any folders, hidden ones left out.

    Raises:
        UserError: a folder that cannot be listed, or a link to nothing.
        OSError: a file or folder that cannot be looked at.
    """
    names = [name for name in pattern.split("/") if name]
    if names and names[-1] == "**":
        names.append("*")
    return _below("/" if pattern.startswith("/") else "", names)


def _below(folder: str, names: Sequence[str]) -> Iterator[str]:
    """The files of a folder that ``names``, one for each level, lead to."""
    name, rest = (names[0], names[1:]) if names else ("", [])
    if name == "**":
        yield from _below(folder, rest)
    elif not glob.has_magic(name):
        yield from _at(os.path.join(folder, name), rest)  # noqa: PTH118 - keeps `..` and links
        return
    for found in _listed(folder):
        hidden = found.startswith(".") and not name.startswith(".")
        path = os.path.join(folder, found)  # noqa: PTH118
        if name == "**" and not hidden:
            yield from _at(path, names)
        elif name != "**" and not hidden and fnmatch.fnmatchcase(found, name):
            yield from _at(path, rest)


def _at(path: str, names: Sequence[str]) -> Iterator[str]:
    """The path itself where it is a file and no names are left, or what lies below."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(path):
            raise UserError(
                "a link leads to nothing", where=path, fix="mend the link, or remove it"
            ) from None
        return
    if names and stat.S_ISDIR(mode):
        yield from _below(path, names)
    elif not names and stat.S_ISREG(mode):
        yield path


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")  # noqa: PTH208
    except OSError as error:
        raise UserError(
            f"cannot list the folder: {error.strerror}", where=folder or ".", fix="permit it"
        ) from None
