"""One rank from start to exit code: process group, logs, the run, the report of a failure."""

import contextlib
import faulthandler
import os
import socket
import sys
import time
import traceback
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from titans_pretrain import config as run_config
from titans_pretrain import errors
from titans_pretrain.checkpoint import retention
from titans_pretrain.checkpoint.format import newest_good
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.files import write_json
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.parallel.devices import OtherRankFailed
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.rendezvous import MissingRanks
from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import initial, outcome, stopping
from titans_pretrain.train.build import open_data
from titans_pretrain.train.directory import RunDirectory, failure_record
from titans_pretrain.train.heartbeat import Heartbeat
from titans_pretrain.train.launch import hosts_of_ranks
from titans_pretrain.train.lease import Fenced, Lease, attempt_number
from titans_pretrain.train.outcome import Outcome
from titans_pretrain.train.self_check import check_mesh
from titans_pretrain.train.signals import StopRequest, leave
from titans_pretrain.train.trainer import Trainer
from titans_pretrain.train.watch import Watch

PATIENT_SHARE = 0.8  # the missing are named before the job's attempt ends a start that hangs


def work(config: RunConfig, *, resume: bool, stop: StopRequest) -> int:
    """Train as the rank that the environment names; the exit code.

    A rank that fails ends its process here: an orderly end would wait for the other ranks.
    """
    worker = Worker(config, stop)
    try:
        device = devices.local_device()
        patience = worker.patience
        with devices.process_group(device, lambda: hosts_of_ranks(os.environ), patience):
            worker.run(device, resume=resume)
    except BaseException as error:
        code = errors.FAILED
        try:
            code = worker.report(error)
        finally:
            leave(code)
    return errors.DONE


class Worker:
    """What one rank of a run knows outside the training loop.

    Args:
        config: the run.
        stop: whether this rank was asked to stop.
    """

    def __init__(self, config: RunConfig, stop: StopRequest) -> None:
        self._config = config
        self._directory = RunDirectory(Path(config.run.directory))
        self._rank = int(os.environ.get("RANK", "0"))
        self._terminal: TextIO = sys.stdout
        self._complaints: TextIO = sys.stderr
        self._log: Path | None = None
        self._stop = stop
        self._whereabouts = Whereabouts()
        self._lease = Lease(self._directory.lock)
        self._watch: Watch | None = None

    @property
    def patience(self) -> timedelta | None:
        """With ranks that come late: most of what a job gives its start; None without a job."""
        with contextlib.suppress(UserError):  # which is told once the ranks are together
            if not attempt_number(os.environ):
                return None
        return timedelta(seconds=PATIENT_SHARE * self._config.job.start_seconds)

    def run(self, device: torch.device, *, resume: bool) -> None:
        """Check, prepare, resume and train; needs a process group."""
        config = self._config
        name = devices.from_first(lambda: uuid.uuid4().hex)
        attempt = devices.together(lambda: attempt_number(os.environ))
        devices.together(stopping.check_environment)
        self._lease = Lease(self._directory.lock, name, attempt)
        grid = devices.together(lambda: mesh.plan(devices.ranks(), config.mesh, config.train))
        dumps = devices.gather_objects(run_config.dump(config))
        devices.together(lambda: _check_equal(dumps))
        data = devices.together(lambda: open_data(config))
        notes, checkpoint = devices.from_first(lambda: self._open(resume))
        initial_weights = {}
        if config.train.init_from and checkpoint is None:
            pieces = data.corpus.tokenizer
            initial_weights = devices.from_first(lambda: initial.check(config, pieces.read_bytes()))
        self._redirect()
        self._tell_ranks()
        watch = self._start_watch()
        heartbeat = self._start_heartbeat()
        for note in (grid.table(), *notes):
            self._tell(note)
        if checkpoint is not None and _step_of(checkpoint) >= config.train.steps:
            self._tell(f"finished already: {checkpoint.name} of {config.train.steps} steps")
            self._conclude(_step_of(checkpoint))
            return
        parallel = Parallel(
            grid,
            self._rank,
            activation_checkpointing=config.train.activation_checkpointing,
            whereabouts=self._whereabouts,
        )
        check_mesh(config, parallel, device)
        trainer = Trainer(
            config,
            parallel,
            device,
            data,
            self._directory,
            self._stop,
            self._tell,
            watch.begin,
            self._lease,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        elif initial_weights:
            trainer.initialise(Path(config.train.init_from), initial_weights)
        devices.from_first(lambda: self._begin(data.corpus.fingerprint))
        trainer.run()
        watch.end()
        heartbeat.end()
        self._tell(f"done: {config.train.steps} steps in {self._directory.path}")

    def report(self, error: BaseException) -> int:
        """Keep a failure in ``error.json``, print it if it is the first, and log it.

        The log comes last: a full disk must not hide the failure.

        Returns:
            The exit code.
        """
        if self._watch is not None:
            self._watch.settle()
        if self._log is not None:  # this start held the run
            try:
                self._lease.check()
            except Fenced as fenced:
                error = fenced
        told = self._explain(error)
        if self._is_first(told, error):
            _print(str(told), self._complaints)
        untraced = TitansError if self._log is None else (UserError, StoppedEarly)
        if not isinstance(error, untraced):
            with contextlib.suppress(OSError):
                traceback.print_exception(error, file=sys.stderr)
        return told.exit_code

    def _open(self, resume: bool) -> tuple[list[str], Path | None]:
        """Take the run's directory; what to tell, and the checkpoint to go on from."""
        notes = self._directory.check(self._config, resume=resume)
        self._directory.create()
        self._lease.take()
        self._directory.forget_last()
        if self._config.pipeline.eval.every and not self._lease.attempt:
            told = "pipeline.eval.every has no effect here: titans submit has checkpoints evaluated"
            notes = [*notes, told]
        root = self._directory.checkpoints
        for name in retention.remove_leftovers(root):  # before one is chosen
            notes = [*notes, f"removed the remains of an interrupted save: {root / name}"]
        if not resume:
            return notes, None
        checkpoint, skipped = newest_good(self._directory.checkpoints)
        if checkpoint is None and skipped:
            raise TitansError(
                f"no good checkpoint: {'; '.join(skipped)}",
                where=str(self._directory.checkpoints),
                fix="bring a good one back, or move this directory away and --resume starts over",
            )
        start = f"resuming from {checkpoint}" if checkpoint else "starting at step 0"
        if checkpoint and self._config.train.init_from:
            skipped = [*skipped, "train.init_from has no effect: a checkpoint is there"]
        return [*notes, *skipped, start], checkpoint

    def _redirect(self) -> None:
        """Send what this rank prints, C libraries included, to its log; the terminal stays open."""
        self._terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._complaints = os.fdopen(os.dup(2), "w", encoding="utf-8")
        self._log = self._directory.log(self._rank)
        sys.stdout.flush()
        sys.stderr.flush()
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        faulthandler.enable()
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} start of rank {self._rank}", flush=True)

    def _tell(self, sentence: str) -> None:
        if self._rank == 0:
            _print(sentence, self._terminal)
            with contextlib.suppress(OSError):
                print(sentence, flush=True)

    def _tell_ranks(self) -> None:
        """Write down where the ranks of this start are."""
        start, attempt = self._lease.start, self._lease.attempt
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        names = {"start": start, "attempt": attempt}
        places = devices.gather_objects(place | names)
        if self._rank == 0:
            self._lease.check()
            write_json(self._directory.ranks, {str(rank): one for rank, one in enumerate(places)})

    def _begin(self, fingerprint: str) -> None:
        """Write the configuration of this start."""
        self._lease.check()
        self._directory.begin(self._config, fingerprint)

    def _conclude(self, step: int) -> None:
        """Write down that the run had been finished."""
        if self._rank == 0:
            sentence = f"all {self._config.train.steps} steps were done before"
            done = Outcome("done", sentence, "", step, step, "before", 0.0)
            outcome.write(self._directory, self._lease, done)
            for trigger in (self._directory.stop, self._directory.save):
                trigger.unlink(missing_ok=True)

    def _start_watch(self) -> Watch:
        self._watch = watch = Watch(
            self._directory,
            self._rank,
            devices.ranks(),
            self._whereabouts,
            lease=self._lease,
            seconds=self._config.run.hang_seconds,
            complain=lambda text: _print(text, self._complaints),
        )
        watch.start()
        return watch

    def _start_heartbeat(self) -> Heartbeat:
        made = Heartbeat(
            self._directory,
            self._rank,
            self._whereabouts,
            self._lease,
            complain=lambda text: _print(text, self._complaints),
        )
        made.start()
        return made

    def _explain(self, error: BaseException) -> TitansError:
        if isinstance(error, TitansError):
            return error
        where = f"rank {self._rank} on {socket.gethostname()}: {self._whereabouts.place}"
        if isinstance(error, torch.OutOfMemoryError):
            return TitansError(
                "out of GPU memory",
                where=where,
                fix="lower train.micro_batch_size, set train.activation_checkpointing=true, or "
                "start more ranks",
            )
        first_line = (str(error).splitlines() or [""])[0]
        if _is_lost_connection(error):
            return TitansError(
                f"the connection to another rank is lost: {first_line}",
                where=where,
                fix="a rank or its host has died: its log or the job's may say why; continue with "
                "--resume",
            )
        return TitansError(
            f"{type(error).__name__}: {first_line}",
            where=where,
            fix=f"the traceback is in {self._log}" if self._log else "",
        )

    def _is_first(self, told: TitansError, error: BaseException) -> bool:
        """Whether no other rank tells it; a failure is kept, as far as the file system can."""
        if isinstance(error, OtherRankFailed):
            return False
        if isinstance(error, (StoppedEarly, Fenced)):
            return self._rank == 0
        if isinstance(error, MissingRanks):
            self._keep_missing(error)
            return error.rank is not None
        if self._log is None:
            return True
        calls = traceback.format_exception(error)
        host = socket.gethostname()
        start, attempt = self._lease.start, self._lease.attempt
        record = failure_record(told, self._rank, host, calls, start=start, attempt=attempt)
        try:
            return self._directory.keep_failure(record)
        except OSError:
            return True  # the disk may be what failed

    def _keep_missing(self, error: MissingRanks) -> None:
        """Keep who is missing for the job's attempt to judge, which no lock of a start guards."""
        attempt = attempt_number(os.environ)
        if error.rank is None or not attempt or self._lease.holder_is_later(attempt):
            return
        record = failure_record(
            error, error.rank, error.host, [], start=uuid.uuid4().hex, attempt=attempt
        )
        with contextlib.suppress(OSError):
            self._directory.keep_failure(record)


def _print(sentence: str, terminal: TextIO) -> None:
    """Print to a terminal, or from now on nowhere if it is closed: a run outlives its terminal."""
    try:
        print(sentence, file=terminal, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, terminal.fileno())
        os.close(nowhere)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether communication failed, as it does on all ranks when one dies."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _check_equal(configurations: list[str]) -> None:
    different = [i for i, other in enumerate(configurations) if other != configurations[0]]
    if different:
        raise UserError(
            f"rank {different[0]} has another configuration than rank 0",
            where="start of the ranks",
            fix="give every host the same file and arguments",
        )
