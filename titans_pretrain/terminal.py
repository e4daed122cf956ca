"""What the operating system refuses, in three lines; a reader that goes away. No torch here."""

import errno
import os
import select
import sys

from titans_pretrain.errors import TitansError

_FIXES = {
    PermissionError: "change its permissions, or give another path",
    FileNotFoundError: "give a path that exists",
    FileExistsError: "give another path, or move away what is there",
    NotADirectoryError: "give another path: a part of this one is a file",
    IsADirectoryError: "give a file: this is a directory",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def refusal(error: OSError) -> TitansError:
    """An error of the operating system in three parts: what, the files, and the fix."""
    names = (error.filename, error.filename2)
    files = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    fix = next((fix for kind, fix in _FIXES.items() if isinstance(error, kind)), "")
    if error.errno in _FULL:
        fix = "free space, or give another directory"
    return TitansError(
        error.strerror or str(error),
        where=" -> ".join(files) or "operating system, which names no file",
        fix=fix or "mend that and run the same command again",
    )


def nobody_reads() -> bool:
    """Whether the reader of standard output, such as ``head``, has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except OSError:
        return False


def discard_output() -> None:
    """Send what is still buffered nowhere: Python would complain about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
