"""Running SLURM's commands: argument lists, time limits, patience with a restarting controller."""

import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titans_pretrain.errors import TitansError

COMMAND_SECONDS = 60.0
PATIENCE_SECONDS = 180.0
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 10.0

# The controller did not see the request.
UNHEARD = re.compile(
    r"unable to contact slurm controller|connection refused|unable to connect|"
    r"temporarily unable to accept|unable to resolve|dns srv lookup failed|no route to host|"
    r"no error at unable to|unable to establish configuration source|"
    r"invalid authentication credential|protocol authentication error|munge encode failed|"
    r"slurm backup controller in standby mode|controller is shutting down",
    re.IGNORECASE,
)
# It may have seen the request, or not.
UNANSWERED = re.compile(
    r"timed out|zero bytes were transmitted|connection reset|transport endpoint|"
    r"message receive failure|unexpected message received|send.?recv failure|"
    r"resource temporarily unavailable|communications? connection failure",
    re.IGNORECASE,
)
MISSING = re.compile(r"invalid job id specified|no such job|invalid job id", re.IGNORECASE)

# Variables by which users change what the commands print, and those of the job this runs in.
OUTPUT_VARIABLES = re.compile(r"(SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL)_\w+")


class SlurmError(TitansError):
    """SLURM refused a command, or did not answer."""


class SlurmUnanswered(SlurmError):
    """A request was sent and not answered: it may have been carried out, or not."""


@dataclass(frozen=True)
class Answer:
    """What a command said.

    Attributes:
        code: its exit code.
        out: bytes of its standard output.
        err: text of its standard error.
    """

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """The output as text."""
        return self.out.decode(errors="replace").strip()

    @property
    def complaint(self) -> str:
        """What it said of a failure, on one line."""
        lines = (self.err.strip() or self.text).splitlines()
        return "; ".join(line.strip() for line in lines if line.strip()) or f"exit code {self.code}"


def available() -> bool:
    """Whether SLURM's commands are on this machine."""
    return shutil.which("sbatch") is not None and shutil.which("scontrol") is not None


@functools.cache
def version() -> tuple[int, int]:
    """SLURM's version as (22, 5).

    Raises:
        SlurmError: there is no SLURM here.
    """
    said = run(["sbatch", "--version"], patience=0).text
    match = re.search(r"(\d+)\.(\d+)", said)
    if match is None:
        raise SlurmError(
            f"no version in {said!r}", where="sbatch --version", fix="see which sbatch is first"
        )
    return int(match[1]), int(match[2])


def run(
    command: Sequence[str],
    *,
    patience: float = PATIENCE_SECONDS,
    again: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Run a command until SLURM answers.

    Args:
        command: program and arguments.
        patience: seconds to try again while the controller does not answer.
        again: whether a request that may have been carried out may be sent once more.
        environment: for the command, this process's if None.

    Returns:
        Its answer, good or bad.

    Raises:
        SlurmError: the command is not here, or the controller stays silent.
        SlurmUnanswered: it was sent, is not to be sent again, and nothing came back.
    """
    deadline, pause = time.monotonic() + patience, PAUSE_SECONDS
    while True:
        answer = _once(command, clean(os.environ if environment is None else environment))
        unanswered = answer.code != 0 and bool(UNANSWERED.search(answer.err))
        if unanswered and not again:
            raise _silent(SlurmUnanswered, command, answer)
        if not unanswered and not (answer.code != 0 and UNHEARD.search(answer.err)):
            return answer
        if time.monotonic() + pause > deadline:
            raise _silent(SlurmError, command, answer)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def call(command: Sequence[str], *, patience: float = PATIENCE_SECONDS) -> str:
    """Run a command that must do what it is asked; its output.

    Raises:
        SlurmError: SLURM refused, with its words.
    """
    answer = run(command, patience=patience)
    if answer.code:
        raise refused(command, answer)
    return answer.text


def accounting(command: Sequence[str]) -> Answer | None:
    """What the accounting says; None where a site has none or it does not answer.

    It may be away for hours in which SLURM takes and runs jobs.
    """
    try:
        answer = run(command, patience=0)
    except SlurmError:
        return None
    return None if answer.code else answer


def refused(command: Sequence[str], answer: Answer) -> SlurmError:
    """The error that tells what SLURM said of a command."""
    return SlurmError(
        f"SLURM refused: {answer.complaint}",
        where=" ".join(command),
        fix="mend what it names, or ask the cluster's support with this line",
    )


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the commands print what is parsed here: C locale, unix seconds."""
    kept = {
        name: value
        for name, value in environment.items()
        if not OUTPUT_VARIABLES.fullmatch(name) and name != "LANGUAGE"
    }
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}


def _once(command: Sequence[str], environment: Mapping[str, str]) -> Answer:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on this machine",
            where="PATH",
            fix="run this on a login node of the cluster, or load its slurm module",
        ) from None
    except OSError as error:
        raise SlurmError(
            f"{command[0]} cannot be run: {error.strerror}",
            where="PATH",
            fix=f"ask the site who may run it; which {command[0]} tells its place",
        ) from None
    except subprocess.TimeoutExpired:
        return Answer(1, b"", f"{command[0]} timed out after {COMMAND_SECONDS:.0f} s")
    return Answer(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def _silent(kind: type[SlurmError], command: Sequence[str], answer: Answer) -> SlurmError:
    return kind(
        f"SLURM does not answer: {answer.complaint}",
        where=" ".join(command),
        fix="see `scontrol ping`; run the same command again when the controller is up",
    )
