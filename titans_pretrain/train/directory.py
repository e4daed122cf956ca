"""A run's directory: what lies where, who may use it, what a resumed run may change. No torch."""

import importlib.metadata
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain import config as run_config
from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import format as checkpoints
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import atomic_file, sync_directory, write_json
from titans_pretrain.model import fields

FIXED = (
    "model",
    "data.sequence_length",
    "data.seed",
    "data.validation_fraction",
)


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration as resolved."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """The fingerprint of the data."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """``step-N`` directories."""
        return self.path / "checkpoints"

    @property
    def error(self) -> Path:
        """The first failure of the latest start, if it failed."""
        return self.path / "error.json"

    @property
    def outcome(self) -> Path:
        """How the latest start ended, if it ended in good order."""
        return self.path / "outcome.json"

    @property
    def last_save(self) -> Path:
        """Step, seconds and bytes of the newest save."""
        return self.path / "last_save.json"

    @property
    def heartbeat(self) -> Path:
        """``rank-R.json``: where each rank stands, every ten seconds."""
        return self.path / "heartbeat"

    @property
    def stop(self) -> Path:
        """A file whose presence asks the run to stop."""
        return self.path / "stop"

    @property
    def save(self) -> Path:
        """A file whose presence asks the run to save a checkpoint."""
        return self.path / "save"

    @property
    def lock(self) -> Path:
        """Who trains here."""
        return self.path / ".lock"

    @property
    def jobs(self) -> Path:
        """The frozen configuration, the batch scripts and the list of jobs sent to SLURM."""
        return self.path / "jobs"

    @property
    def attempts(self) -> Path:
        """``attempt-N.json``: one record of each job that tried to go on with the run."""
        return self.path / "attempts"

    @property
    def preflight(self) -> Path:
        """What the latest check of the nodes found."""
        return self.path / "preflight.json"

    @property
    def logs(self) -> Path:
        """What the ranks and the jobs printed."""
        return self.path / "logs"

    @property
    def ranks(self) -> Path:
        """Rank to host, process and the name of the latest start, which is random."""
        return self.path / "ranks.json"

    @property
    def hang(self) -> Path:
        """Where each rank stood when the latest start hung."""
        return self.path / "hang"

    def log(self, rank: int) -> Path:
        """What a rank printed."""
        return self.logs / f"rank-{rank}.log"

    def trace(self, rank: int) -> Path:
        """The profile of ``run.trace_step``, in Chrome's format."""
        return self.logs / f"trace-rank-{rank}.json"

    def check(self, config: RunConfig, *, resume: bool) -> list[str]:
        """Whether the run may start here; changes nothing.

        Returns:
            Sentences about what differs from the configuration it began with.

        Raises:
            UserError: a run with a step is here and ``resume`` is off, or the model or the data
                order would change.
        """
        if not self._holds_steps():
            return [f"nothing to resume in {self.path}"] if resume else []
        if not resume:
            raise UserError(
                "a run is here already",
                where=str(self.path),
                fix="add --resume to continue it, or choose another run.directory",
            )
        told = changes(self._stored(), config.model_dump(), where=str(self.config))
        return told + self._other_library(config)

    def create(self) -> None:
        """Make the directories.

        Raises:
            UserError: they cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run's directory: {error.strerror}",
                where=f"run.directory: {self.path}",
                fix="choose a directory you can write to",
            ) from None

    def forget_last(self) -> None:
        """Remove how the last start ended and where its ranks stood; for who holds the run.

        What a start that failed before its first step saved would be in the way of this one's.
        """
        for path in (self.error, self.outcome, *self.path.glob(".error-*.json")):
            path.unlink(missing_ok=True)
        for directory in (self.hang, self.heartbeat):
            shutil.rmtree(directory, ignore_errors=True)
        if not self._holds_steps():
            shutil.rmtree(self.checkpoints / "step-0", ignore_errors=True)

    def keep_failure(self, record: Mapping[str, Any]) -> bool:
        """Write ``error.json`` unless a rank of the same start did; whether it was written.

        Another start's record is replaced. Safe among ranks: the first to claim it writes it.
        """
        if not write_first(self.path / f".error-{record['start']}.json", record):
            return False
        with atomic_file(self.error, "w") as handle:
            json.dump(record, handle, indent=2)
            handle.write("\n")
        return True

    def begin(self, config: RunConfig, fingerprint: str) -> None:
        """Write the configuration of this start and its data's name; once it is sure to train."""
        write_json(self.data, {"fingerprint": fingerprint})
        with atomic_file(self.config, "w") as handle:
            handle.write(run_config.dump(config))

    def _holds_steps(self) -> bool:
        """Whether a step was done here, or undone; a start that failed before has none to lose."""
        if any(path.name != "step-0" for path in self.checkpoints.glob("step-*")):
            return True
        try:
            with open(self.metrics, "rb") as handle:
                return any(row.endswith(b"\n") and b'"event": "stop"' not in row for row in handle)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _other_library(self, config: RunConfig) -> list[str]:
        """Whether the newest checkpoint of another library's model was made with another one."""
        if not foreign.is_foreign(config.model):
            return []
        for step in reversed(checkpoints.steps(self.checkpoints)):
            try:
                state = checkpoints.read_state(self.checkpoints / checkpoints.step_name(step))
            except TitansError:
                continue
            was = state.get("versions", {}).get("transformers")
            now = importlib.metadata.version("transformers")
            if was in (None, now):
                return []
            what = f"transformers is {now}, and the run was trained with {was}"
            return [f"{what}: keys of model that are not given have the defaults of {now}"]
        return []

    def _stored(self) -> dict[str, Any]:
        try:
            stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"the run's configuration cannot be read: {error}".replace("\n", " "),
                where=str(self.config),
                fix="copy config.yaml back from the newest checkpoint",
            ) from None
        return stored if isinstance(stored, dict) else {}


def changes(before: Mapping[str, Any], after: Mapping[str, Any], *, where: str) -> list[str]:
    """Sentences about the keys that differ between two configurations.

    A key of the model that one of them lacks has what is its default now.

    Raises:
        UserError: a key that the model or the order of the data depends on differs, or the earlier
            model is none of the installed library's.
    """
    old, new = _with_defaults(before, after, where)
    given = _flat(before).keys() | _flat(after).keys()  # the others may be derived from them
    said = []
    for key in sorted(
        old.keys() | new.keys(), key=lambda key: (key != "model.hf", key not in given, key)
    ):
        if key in old and key in new and old[key] == new[key]:
            continue
        was, now = old.get(key, "absent"), new.get(key, "absent")
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(
                f"{key}: {now!r} differs from {was!r}, which the run began with",
                where=where,
                fix=f"use {key}={was}, or begin another run",
            )
        said.append(f"{key} is now {now!r}, was {was!r}")
    return said


def _with_defaults(
    before: Mapping[str, Any], after: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of two configurations, those of the model as far as they can be compared."""
    old, new = _flat(before), _flat(after)
    if "model.hf" not in old:
        defaults = _flat({"model": fields.defaults()})
        return {key: value for key, value in defaults.items() if key in new} | old, new
    if old["model.hf"] != new.get("model.hf"):
        return old, new
    try:
        began = foreign.complete(before["model"])
    except UserError as error:
        raise UserError(
            f"the model that the run began with is none any more: {error.what}",
            where=where,
            fix="install the libraries that the run began with, or begin another run",
        ) from None
    whole = _flat({"model": foreign.complete(after["model"])})
    return old | _flat({"model": began}), new | whole


def failure_record(
    error: TitansError,
    rank: int,
    host: str,
    calls: Sequence[str],
    *,
    start: str,
    attempt: int = 0,
) -> dict[str, Any]:
    """What ``error.json`` holds.

    Args:
        error: in three lines.
        rank: where it happened.
        host: of that rank.
        calls: lines of its traceback.
        start: which start of the run it ended, see ``RunDirectory.ranks``.
        attempt: of that start, see ``lease.attempt_number``.
    """
    return {
        "start": start,
        "attempt": attempt,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rank": rank,
        "host": host,
        "exit_code": error.exit_code,
        "what": error.what,
        "where": error.where,
        "fix": error.fix,
        "traceback": list(calls),
    }


def write_first(path: Path, value: object) -> bool:
    """Write JSON unless ``path`` exists; whether it was written. Safe among ranks."""
    # containers on one host share names and process ids
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{secrets.token_hex(8)}")
    text = json.dumps(value, indent=2) + "\n"
    try:
        _write_new(temporary, text)
        _link(temporary, path, text)
        sync_directory(path.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _link(temporary: Path, path: Path, text: str) -> None:
    """Give a file the name ``path`` unless that is there: FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # over NFS a link that was made, and whose answer was lost, is asked for again
        if not os.path.samestat(temporary.stat(), path.stat()):
            raise
    except OSError:  # a file system without hard links: a reader may see it half written
        _write_new(path, text)


def _write_new(path: Path, text: str) -> None:
    """Create a file that outlasts a power cut: FileExistsError."""
    with open(path, "x", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
