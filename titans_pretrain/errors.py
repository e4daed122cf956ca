"""Errors the commands print as three lines: what, where, and the fix. No torch here."""

import difflib
from collections.abc import Iterable

DONE = 0
FAILED = 1
USER_ERROR = 2
STOPPED = 75


class TitansError(Exception):
    """A failure told in three parts.

    Args:
        what: what is wrong, one line, with the offending value.
        where: the file, field or process it was found in.
        fix: what the user can do about it.
    """

    exit_code = FAILED

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.fix:
            lines.append(f"fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


class UserError(TitansError):
    """The user's mistake (configuration, data): exit code 2, no traceback."""

    exit_code = USER_ERROR


class Misfit(UserError):
    """What was asked for cannot be: another try of the same ends alike."""


class StoppedEarly(TitansError):
    """The run ended before its last step and can be resumed: exit code 75."""

    exit_code = STOPPED


def _rebuild(kind: type[TitansError], what: str, where: str, fix: str) -> TitansError:
    return kind(what, where=where, fix=fix)


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" sentence for an unknown name, or the list of what is known."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known names: {', '.join(names)}"
