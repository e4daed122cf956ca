"""A real SLURM cluster on this host for the tests: controller, node daemons and munge.

Each node lives in its own host-name, process and mount namespace where the kernel allows it:
`hostname` in a job is the node's name, `crash` is a power loss, and `scratch` is a directory of
the node's own. Everything is kept in the cluster's directory; outside it are only marked lines in
/etc/hosts. All of it goes when the process that started it ends, however that ends.

    cluster = free_cluster()
    cluster.start()
    job = cluster.submit("--nodes=2", "--wrap", "srun hostname")
    assert cluster.wait(job) == {"COMPLETED"}
    cluster.stop()
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

import slurm_commands
import slurm_daemons as host
from slurm_commands import ClusterError, SlurmCommands, until

__all__ = ["Cluster", "ClusterError", "free_cluster", "missing", "until"]

FIRST_PORT, PORTS, SLOTS = 16800, 20, 26
UNSHARE = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
# the first process of a node reaps; when it dies the kernel kills all the others
NODE = 'mount --bind "$2" "$3" && hostname "$1" && { slurmd -D -N "$1" & wait $!; }'
# a line tells that all is cleaned up; the end of input without one, that we are gone
GUARD = 'read -r || exec "$@"'


def missing() -> str:
    """What this machine lacks for a cluster, with the remedy; empty when nothing."""
    path = f"{os.environ.get('PATH', '')}:{slurm_commands.SYSTEM_PATH}"
    absent = [
        name
        for name in ("slurmctld", "slurmd", "sbatch", "srun", "munged")
        if shutil.which(name, path=path) is None
    ]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "starting a test cluster needs root: run pytest as root"
    return ""


def can_isolate() -> bool:
    """Whether the kernel lets us give each node its own namespaces."""
    probe = [*UNSHARE, "bash", "-c", "hostname probe && mount --bind /tmp /tmp"]
    if shutil.which(probe[0]) is None:
        return False
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def free_cluster(nodes: int = 4, extra: str = "", isolate: bool | None = None) -> "Cluster":
    """A cluster on the first free block of ports, held for us until its `stop`.

    What killed test runs left on any block is cleaned up.

    Raises:
        ClusterError: all blocks are taken.
    """
    chosen: Cluster | None = None
    for slot in range(SLOTS):
        prefix = "node" + (chr(ord("a") + slot) if slot else "")
        port = FIRST_PORT + PORTS * slot
        directory = host.PLACE / f"titans-slurm-{prefix}"
        cluster = Cluster(directory, port, prefix, nodes, extra, isolate)
        with suppress(ClusterError):
            cluster.hold()
            if directory.exists():
                cluster.clean()
            if chosen is None and all(map(_is_free, range(port, port + nodes + 1))):
                chosen = cluster
            else:
                cluster.release()
    if chosen is None:
        raise ClusterError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS * SLOTS} are all taken")
    return chosen


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Cluster(SlurmCommands):
    """One instance; several live side by side with their own directory, ports and prefix.

    Args:
        directory: holds everything of the instance, removed by `stop`.
        port: of the controller; node number i has `port + i`. Keep the block below 32768, where
            the ports of outgoing connections begin.
        prefix: of the nodes' names: `node` gives node1, node2, ...
        nodes: their number, at most 19.
        extra: lines added to slurm.conf.
        isolate: own namespaces for each node; by default where the kernel allows it.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        prefix: str,
        nodes: int = 4,
        extra: str = "",
        isolate: bool | None = None,
    ) -> None:
        super().__init__(directory / "slurm.conf")
        self.directory = directory
        self.port = port
        self.prefix = prefix
        self.nodes = [f"{prefix}{number}" for number in range(1, nodes + 1)]
        self.extra = extra
        self.isolated = can_isolate() if isolate is None else isolate
        self.logs = directory / "log"
        self.scratch = directory / "scratch"
        """A path that is private to each node where nodes are isolated, otherwise shared."""
        block = port // PORTS % 256
        self.addresses = {name: f"127.0.{block}.{i}" for i, name in enumerate(self.nodes, 1)}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._holder = ExitStack()
        self.is_held = False
        self._lifter: threading.Thread | None = None
        self._stopping = threading.Event()

    # the instance

    def hold(self) -> None:
        """Keeps other processes from this instance, until `stop` or our end.

        Raises:
            ClusterError: another process holds it.
        """
        try:
            self._holder.enter_context(host.locked(self.directory.with_suffix(".lock")))
        except BlockingIOError:
            raise ClusterError(f"{self.directory} belongs to a running process") from None
        self.is_held = True

    def release(self) -> None:
        """Lets other processes have this instance."""
        self._holder.close()
        self.is_held = False

    def start(self, seconds: float = 60.0) -> None:
        """Starts everything and returns when all nodes are idle."""
        if not self.is_held:
            self.hold()
        try:
            if self.directory.exists():
                self.clean()
            self._start_guard()
            self._write_files()
            self._start_munge()
            self.controller_boot()
            for name in self.nodes:
                self._start_node(name)
            until(self._revive, seconds, "all nodes to be idle")
        except BaseException as error:
            error.add_note(self.tails())
            self.stop()
            raise
        self._stopping.clear()
        self._lifter = threading.Thread(target=self._lift_holds, daemon=True)
        self._lifter.start()

    def stop(self) -> None:
        """Ends all daemons and jobs, and undoes everything outside and inside the directory."""
        self._stopping.set()
        if self._lifter is not None:
            self._lifter.join()
        if host.daemons(self.logs, "slurmctld"):
            with suppress(ClusterError):
                self._cancel_all(seconds=2.0)  # what is left then ends with its node
        self.clean()
        for child in self._children.values():
            child.wait()
        self._children.clear()
        if self._guard is not None:
            self._guard.communicate(b"\n")
            self._guard = None
        self.release()

    def clean(self) -> None:
        """Removes whatever there is of this instance, also what another process left."""
        for name in self._node_names():
            self._kill_node(name)
        host.send(host.tasks(self.conf), signal.SIGKILL)
        self._end("slurmctld")
        host.send(host.daemons(self.logs), signal.SIGKILL)
        until(lambda: not host.daemons(self.logs), 30, "the daemons to end")
        host.remove_names(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)

    def reset(self, extra: str | None = None) -> None:
        """Brings the cluster back to its first state: no jobs, all nodes and daemons up.

        Args:
            extra: other lines for slurm.conf from now on, instead of those given at first.
        """
        for name in self.nodes:
            self.node_thaw(name)
            self._start_node(name)
        if not self._controller_answers():
            self.controller_boot()
        self._write_conf(self.extra if extra is None else extra)
        self._cancel_all(seconds=30.0)
        until(self._revive, 90, "all nodes to be idle after a reset")
        for place in (self.scratch, *(self.directory / "local").iterdir()):
            for path in place.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def reconfigure(self, extra: str) -> None:
        """Sets other additional lines in slurm.conf, until `reset`; running jobs go on."""
        self._write_conf(extra)

    # nodes

    def node_processes(self, name: str) -> list[int]:
        """The node's daemons and all that runs in its jobs."""
        daemons = host.daemons(self.logs, name)
        inside = host.in_namespaces_of(daemons)
        return inside or sorted({*daemons, *host.tasks(self.conf, name)})

    def node_crash(self, name: str) -> None:
        """Power loss: everything on the node dies at once; the controller notices in 30 s."""
        self._kill_node(name)
        shutil.rmtree(self.directory / "spool" / name, ignore_errors=True)

    def node_fail(self, name: str) -> None:
        """Power loss that the controller is told of: jobs of the node are requeued now."""
        self.node_crash(name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=failed by a test")

    def node_boot(self, name: str) -> None:
        """Starts a crashed node again and waits until it is in service."""
        self._start_node(name)
        until(lambda: self._revive([name]), 90, f"{name} to be in service")

    def node_hang(self, name: str) -> None:
        """Freezes the node's daemons and all that runs in its jobs, until `node_thaw`."""
        host.send(self.node_processes(name), signal.SIGSTOP)

    def node_thaw(self, name: str) -> None:
        """Lets a frozen node go on."""
        host.send(self.node_processes(name), signal.SIGCONT)

    # the controller

    def controller_crash(self) -> None:
        """Kills the controller, once its saved state knows of all jobs and their starts.

        The state is up to 5 s old: a crash may forget a job or, worse, that it has started.
        """
        until(self._state_is_saved, 30, "the controller to save its state")
        self._end("slurmctld", signal.SIGKILL)

    def _state_is_saved(self) -> bool:
        running = self.run("squeue", "-h", "-t", "R", "-o", "%V %S").stdout.split()
        times = running + self.run("squeue", "-h", "-o", "%V").stdout.split()
        saved = self.directory / "state" / "job_state"
        newest = max((datetime.fromisoformat(text).timestamp() for text in times), default=0.0)
        return newest == 0.0 or (saved.exists() and saved.stat().st_mtime > newest + 1.0)

    def controller_boot(self) -> None:
        """Starts the controller and waits until it answers."""
        self._spawn("slurmctld", ["slurmctld", "-D"])
        until(self._controller_answers, 60, "slurmctld to answer")

    def tails(self, lines: int = 15) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted(self.logs.glob("*")):
            log = path.with_suffix(".log")
            if path != log and log.exists() and log.stat().st_size:
                continue  # the daemon's output repeats its log
            text = path.read_text(errors="replace").splitlines()[-lines:]
            if text:
                parts.append("\n".join([f"== {path.name}", *text]))
        return "\n".join(parts)

    def story(self, before: Collection[str] = ()) -> str:
        """All jobs, the ends of the logs of those that are not of `before`, and of the daemons'."""
        parts = [self.run("squeue", "-t", "all", check=False).stdout]
        for job in self.jobs():
            if job not in before:
                parts.append(f"== log of job {job}\n{self.log(job)[-4000:]}")
        return "\n".join([*parts, self.tails()])

    # how

    def _node_names(self) -> list[str]:
        left = {path.stem for path in self.logs.glob(f"{self.prefix}[0-9]*.*")}
        return sorted(left | set(self.nodes))

    def _write_files(self) -> None:
        for name in ("run", "log", "spool", "dev", "scratch"):
            (self.directory / name).mkdir(parents=True)
        for name in ("state", "munge"):
            (self.directory / name).mkdir(mode=0o700)
        for name in self.nodes:
            (self.directory / "local" / name).mkdir(parents=True)
        # jobs of other users reach munge's socket through its directory
        (self.directory / "munge").chmod(0o711)
        key = self.directory / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for number in range(host.GPUS):
            (self.directory / "dev" / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"Name=gpu Type=h100 File={self.directory}/dev/gpu[0-{host.GPUS - 1}]\n"
        (self.directory / "gres.conf").write_text(gpus)
        self._write_conf(self.extra)
        host.add_names(self.directory, self.addresses)

    def _write_conf(self, extra: str) -> None:
        """Writes slurm.conf; a running controller and its nodes read it again if it changed."""
        text = host.conf_text(self.directory, self.port, f"{self.prefix}s", self.addresses, extra)
        if self.conf.exists() and self.conf.read_text() == text:
            return
        running = self.conf.exists()
        self.conf.write_text(text)
        if running:
            self.run("scontrol", "reconfigure")

    def _spawn(self, stem: str, command: list[str]) -> None:
        with open(self.logs / f"{stem}.out", "ab") as out:
            self._children[stem] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _start_guard(self) -> None:
        """Starts the process that cleans up if we are killed; our other children may go on."""
        clean = [sys.executable, __file__, self.directory, self.port, self.prefix]
        self._guard = subprocess.Popen(
            ["bash", "-c", GUARD, "guard", *map(str, clean)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _start_munge(self) -> None:
        munge = self.directory / "munge"
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in paths.items()]
        log = f"--log-file={self.logs / 'munged.log'}"
        self._spawn("munged", ["munged", "--foreground", *options, log])
        probe = ["munge", "-S", str(munge / "socket"), "-n"]
        until(lambda: self.run(*probe, check=False).returncode == 0, 20, "munged to answer")

    def _start_node(self, name: str) -> None:
        if host.daemons(self.logs, name):
            return
        (self.directory / "spool" / name).mkdir(exist_ok=True)
        if self.isolated:
            local = str(self.directory / "local" / name)
            command = [*UNSHARE, "bash", "-c", NODE, "node", name, local, str(self.scratch)]
        else:
            command = ["slurmd", "-D", "-N", name]
        self._spawn(name, command)

    def _kill_node(self, name: str) -> None:
        def left() -> list[int]:
            pids = [*self.node_processes(name), *host.daemons(self.logs, name)]
            host.send(pids, signal.SIGKILL)
            return pids

        until(lambda: not left(), 30, f"{name} to end")

    def _end(self, stem: str, number: signal.Signals = signal.SIGTERM) -> None:
        host.send(host.daemons(self.logs, stem), number)
        until(lambda: not host.daemons(self.logs, stem), 30, f"{stem} to end")

    def _controller_answers(self) -> bool:
        return "is UP" in self.run("scontrol", "ping", check=False).stdout

    def _revive(self, names: list[str] | None = None) -> bool:
        """Whether all these nodes are in service (without names: all idle); helps those along."""
        states = self.node_states()
        ready = {"idle"} if names is None else {"idle", "mixed", "allocated"}
        behind = [name for name in names or self.nodes if states.get(name) not in ready]
        for name in behind:
            self._start_node(name)  # a daemon whose port was busy has ended
            if re.match("down|drain|fail", states.get(name, "")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return not behind

    def _cancel_all(self, seconds: float) -> None:
        def none_left() -> bool:
            jobs = set(self.run("squeue", "-h", "-o", "%A", check=False).stdout.split())
            if jobs:
                self.run("scancel", *jobs, check=False)
            return not jobs

        until(none_left, seconds, "all jobs to go")

    def _lift_holds(self) -> None:
        """Lets requeued jobs start again at once; SLURM makes them wait 121 s, by no option.

        The new time is not "now": in the second in which the last run was killed the node refuses.
        """
        lifted = set()
        columns = "jobid:.20,restartcnt:.10,reason:.40"
        while not self._stopping.wait(0.5):
            with suppress(ClusterError, subprocess.TimeoutExpired):
                pending = self.run("squeue", "-h", "-t", "PD", "-O", columns, check=False)
                for line in pending.stdout.splitlines():
                    job, restarts, *reason = line.split()
                    lift = reason == ["BeginTime"] and restarts != "0"
                    if lift and (job, restarts) not in lifted:
                        lifted.add((job, restarts))
                        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")


def clean_up(directory: str, port: str, prefix: str) -> None:
    """Removes an instance whose process is gone, unless another has taken it."""
    left = Cluster(Path(directory), int(port), prefix, nodes=0, isolate=False)
    with suppress(ClusterError):
        left.hold()
        left.clean()
        left.release()


if __name__ == "__main__":
    clean_up(*sys.argv[1:])
