"""What a test cluster does to the host: its daemons' processes, its slurm.conf and names.

Nothing is remembered in process ids: a daemon is found by the log that it holds open, so that an
instance left by a killed test run is found as well as one's own.
"""

import fcntl
import os
import shutil
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = {"munged", "slurmctld", "slurmd", "slurmstepd", "unshare", "bash"}
HOSTS = Path("/etc/hosts")
PLACE = Path("/tmp")
"""Of all instances and locks, whatever TMPDIR is: they share the host's ports and names."""

GPUS = 8
CPUS = 128
MEMORY_MEGABYTES = 2_000_000


def processes() -> Iterator[Path]:
    """`/proc/PID` of every process of this host but our own."""
    return (
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) != os.getpid()
    )


def daemons(log: Path, stem: str = "") -> list[int]:
    """Processes of the daemon that logs to `log/STEM.*` (of every daemon: without `stem`)."""
    return [int(entry.name) for entry in processes() if _is_daemon(entry, log, stem)]


def _is_daemon(entry: Path, log: Path, stem: str) -> bool:
    with suppress(OSError):
        if (entry / "comm").read_text().strip() in DAEMONS:
            for descriptor in (entry / "fd").iterdir():
                with suppress(OSError):
                    target = Path(os.readlink(descriptor).removesuffix(" (deleted)"))
                    if target.parent == log and stem in ("", target.stem):
                        return True
    return False


def tasks(conf: Path, node: str = "") -> list[int]:
    """Job processes of a node (of all nodes: without `node`), by their environment."""
    wanted = {f"SLURM_CONF={conf}".encode()}
    found = []
    for entry in processes():
        with suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            nodes = [v[16:].decode() for v in variables if v.startswith(b"SLURMD_NODENAME=")]
            if wanted.issubset(variables) and nodes and node in ("", nodes[0]):
                found.append(int(entry.name))
    return found


def in_namespaces_of(pids: Iterable[int]) -> list[int]:
    """All processes in the process namespaces of `pids`, our own namespace left out."""
    spaces = {_namespace(Path(f"/proc/{pid}")) for pid in pids}
    spaces -= {"", _namespace(Path("/proc/self"))}
    return [int(entry.name) for entry in processes() if _namespace(entry) in spaces]


def _namespace(entry: Path) -> str:
    with suppress(OSError):
        return os.readlink(entry / "ns" / "pid")
    return ""


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to processes, gone ones ignored."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def conf_text(
    directory: Path, port: int, cluster: str, addresses: dict[str, str], extra: str
) -> str:
    """slurm.conf: three partitions of a GPU cluster on one host, with quick scheduling.

    The declared processors, memory and GPUs need not exist, so job files for real nodes pass.
    """
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port + number}"
        f" CPUs={CPUS} RealMemory={MEMORY_MEGABYTES} TmpDisk=10000000 Feature=h100"
        f" Gres=gpu:h100:{GPUS} State=UNKNOWN"
        for number, (name, address) in enumerate(addresses.items(), start=1)
    )
    return f"""\
ClusterName={cluster}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
# instances differ in job ids too: the ports of torch's rendezvous are made from them
FirstJobId={port * 50 % 60000 + 1}
# no cgroups and no binding: what is declared need not exist
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# the defaults add 3 s to 60 s to every job's start
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
CompleteWait=0
# a lost node is noticed in half a minute, not in five
SlurmdTimeout=5
KillWait=2
BatchStartTimeout=10
MessageTimeout=10
ReturnToService=2
JobRequeue=1
# finished jobs stay in squeue -t all and scontrol show job: there is no accounting
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/log/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF
{extra}
"""


def add_names(directory: Path, addresses: dict[str, str]) -> None:
    """Writes the nodes' names into a marked block of /etc/hosts."""
    lines = "".join(f"{address} {name}\n" for name, address in addresses.items())
    _edit_hosts(directory, f"{_mark(directory, 'begin')}{lines}{_mark(directory, 'end')}")


def remove_names(directory: Path) -> None:
    """Takes the block of this instance out of /etc/hosts."""
    _edit_hosts(directory, "")


def _mark(directory: Path, which: str) -> str:
    return f"# test cluster {directory} {which}\n"


def _edit_hosts(directory: Path, block: str) -> None:
    begin, end = _mark(directory, "begin"), _mark(directory, "end")
    with locked(PLACE / "titans-slurm-hosts.lock", wait=True):
        text = HOSTS.read_text()
        before, found, after = text.partition(begin)
        if found:
            text = before + after.partition(end)[2]
        if block and text and not text.endswith("\n"):
            text += "\n"
        if text + block != HOSTS.read_text():
            _rewrite(HOSTS, text + block)


def _rewrite(path: Path, text: str) -> None:
    """Replaces a file's text; one killed meanwhile leaves the old or the new."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.titans-slurm")
    try:
        shutil.copy2(path, beside)
        beside.write_text(text)
        beside.replace(path)
    except OSError:  # a container mounts this file, and a mounted file cannot be replaced
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        with open(path, "r+") as handle:
            handle.write(text)
            handle.truncate()


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file; it is gone afterwards.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # the file may have been removed by its last holder while we waited
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
