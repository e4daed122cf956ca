"""What a batch script asks of SLURM, and why SLURM would not run it: the key and the fix."""

import os
import pwd
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.slurm_command import Answer, accounting, call
from launchers.slurm_jobs import seconds
from titans_pretrain.config_job import minutes
from titans_pretrain.errors import UserError, nearest

STAGE_KEYS = frozenset({"time", "partition", "cpus", "memory", "gpus"})
JOB_KEYS = {
    "cpus": "cpus_per_rank",
    "memory": "memory_per_node",
    "gpus": "gpus_per_node",
}
UNMEETABLE = "node configuration|partition configuration|required node not available"
WORKING = re.compile(r"(idle|mixed|allocated|completing|planned)[^*]*")  # * does not answer
SHORT = {"-N": "nodes", "-p": "partition", "-t": "time", "-A": "account", "-J": "job-name"}


@dataclass(frozen=True)
class _Refusal:
    """Words of SLURM, the key they are about, and what to do."""

    words: str
    topic: str
    fix: str


LIMITS = "see the limits: sacctmgr show assoc where user=$USER, sacctmgr show qos"
REFUSALS = (
    _Refusal("accounting/qos policy|accounting policy", "qos", LIMITS),
    _Refusal("invalid partition|no partition specified", "partition", "give a partition of here"),
    _Refusal(
        "partition not available|not permitted to use this partition",
        "partition",
        "choose a partition that is up and open to you (sinfo)",
    ),
    _Refusal("invalid account", "account", "give an account of yours"),
    _Refusal("invalid qos", "qos", "give a quality of service of yours"),
    _Refusal("time limit|--time specification", "time", "ask for less time, or another partition"),
    _Refusal("invalid feature", "constraint", "sinfo -o '%N %f' lists the nodes' features"),
    _Refusal("reservation", "reservation", "scontrol show reservation lists those that are there"),
    _Refusal("invalid node name", "exclude", "give names of nodes as sinfo -N prints them"),
    _Refusal("gres|trackable resource|tres", "gpus", "sinfo -o '%N %G' lists the nodes' GPUs"),
    _Refusal("memory", "memory", "ask for less memory; sinfo -o '%N %m' lists the nodes', in MB"),
    _Refusal("processors|cpu count", "cpus", "ask for fewer cores; sinfo -o '%N %c' lists them"),
    _Refusal("node count", "nodes", "ask for fewer nodes; sinfo lists the partition's"),
    _Refusal("job array", "array", "ask for fewer tasks; MaxArraySize of scontrol show config"),
    _Refusal("dependency", "dependency", "wait for jobs that squeue lists"),
    _Refusal("limit", "qos", LIMITS),
    _Refusal("license|unrecognized option|specification", "options", "mend or remove the option"),
)


def requested(script: Path, options: Sequence[str] = ()) -> dict[str, str]:
    """The sbatch options of a script by their long names; those given go before its own."""
    words: list[str] = []
    for line in script.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break  # as sbatch does
    asked: dict[str, str] = {}
    for word in (*words, *options):
        name, _, value = word.partition("=")
        asked[SHORT.get(name, name.removeprefix("--"))] = value
    return asked


def check(answer: Answer, request: Mapping[str, str], *, section: str) -> list[str]:
    """Raise a UserError where sbatch --test-only refused, or did not tell of a bound.

    It also refuses what sbatch queues, as long as too few nodes are up.

    Args:
        answer: of sbatch --test-only.
        request: what was asked for, by sbatch's names.
        section: of the configuration it comes from, such as job or pipeline.stages.eval.

    Returns:
        Sentences about why the job may wait long.
    """
    waits = []
    if answer.code and re.search(UNMEETABLE, answer.complaint, re.IGNORECASE):
        waits.append(_waits_for_nodes(_said(answer.complaint), request, section))
    elif answer.code:
        raise _explained(answer.complaint, request, section)
    waits.append(_check_time(request, section))
    _check_account(request)
    return [sentence for sentence in waits if sentence]


def partitions() -> dict[str, dict[str, str]]:
    """What scontrol tells of every partition, by its name."""
    lines = call(["scontrol", "--oneliner", "show", "partition"]).splitlines()
    facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return {one["PartitionName"]: one for one in facts if "PartitionName" in one}


def settings() -> dict[str, str]:
    """The controller's configuration, by the names of slurm.conf."""
    lines = call(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def accounts() -> dict[str, set[str]] | None:
    """The accounts of this process's user, each with its partitions; None where none are told.

    A partition of "" means all.
    """
    user = pwd.getpwuid(os.getuid()).pw_name
    query = ["sacctmgr", "--noheader", "--parsable2", "show", "associations"]
    answer = accounting([*query, "where", f"user={user}", "format=Account,Partition"])
    found: dict[str, set[str]] = {}
    for line in answer.text.splitlines() if answer else ():
        account, _, partition = line.partition("|")
        found.setdefault(account, set()).add(partition)
    return found or None


def _key(topic: str, section: str) -> str:
    if section != "job" and topic in STAGE_KEYS:
        return f"{section}.{topic}"
    array = "--sweep" if section == "job" else "pipeline.data.tasks"
    return {"array": array, "dependency": "--after"}.get(topic, f"job.{JOB_KEYS.get(topic, topic)}")


def _said(words: str) -> str:
    return words.removeprefix("allocation failure: ").removeprefix("sbatch: error: ")


def _explained(words: str, request: Mapping[str, str], section: str) -> UserError:
    said = _said(words)
    for refusal in REFUSALS:
        if re.search(refusal.words, words, re.IGNORECASE):
            value = _value(refusal.topic, request)
            return UserError(
                f"SLURM refuses the job{value}: {said}",
                where=_key(refusal.topic, section),
                fix=_choices(refusal.topic, request) or refusal.fix,
            )
    return UserError(
        f"SLURM refuses the job: {said}",
        where=section,
        fix="change what it names, or ask the cluster's support with this sentence",
    )


def _value(topic: str, request: Mapping[str, str]) -> str:
    options = {"cpus": "cpus-per-task", "memory": "mem", "gpus": "gpus-per-node"}
    value = request.get(options.get(topic, topic), "")
    return f", {topic} {value}" if value else ""


def _choices(topic: str, request: Mapping[str, str]) -> str:
    """What there is to choose from, where SLURM tells."""
    if topic == "partition" and (known := partitions()):
        wanted = [one for one in request.get("partition", "").split(",") if one not in known]
        return nearest(wanted[0], known) if wanted else ""
    if topic == "account" and (mine := accounts()):
        return nearest(request.get("account", ""), mine)
    return ""


def _waits_for_nodes(said: str, request: Mapping[str, str], section: str) -> str:
    """That the job will wait for nodes that are down now; raises where those would not do."""
    named = _partitions_of(request)
    nodes = _number(request.get("nodes", "1"))
    most = max((_bound(facts) for facts in named.values()), default=0)
    of = f"partition {','.join(named)}"
    if nodes > most:
        raise UserError(
            f"{nodes} nodes asked for, {of} gives {most} at most",
            where=_key("nodes", section),
            fix=f"use {most} or fewer, or another partition",
        )
    machines = _machines(named)
    wishes = list(_wishes(request))
    for wish in wishes:
        if sum(map(wish.met, machines)) < nodes:
            offers = ", ".join(sorted({wish.offer(one) for one in machines}))
            raise UserError(
                f"{wish.words} asked for, and {of} has no {nodes} nodes with it",
                where=_key(wish.topic, section),
                fix=f"its nodes have {offers}; ask for that, or use another partition",
            )
    fit = [one for one in machines if all(wish.met(one) for wish in wishes)]
    down = sum(not one.works for one in fit)
    if len(fit) >= nodes > len(fit) - down:
        return f"{down} nodes of {of} are down or drained now, the job will wait for them"
    raise UserError(
        f"SLURM refuses the job: {said}",
        where=section,
        fix=f"each wish alone can be met in {of}, together they cannot: see sinfo -N -l",
    )


def _partitions_of(request: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The partitions asked for, or the default one."""
    known = partitions()
    names = request.get("partition", "").split(",")
    return {
        name: facts
        for name, facts in known.items()
        if name in names or (names == [""] and facts.get("Default") == "YES")
    }


def _bound(facts: Mapping[str, str]) -> int:
    """Nodes that one job can have in a partition."""
    total = _number(facts.get("TotalNodes", "0"))
    most = facts.get("MaxNodes", "UNLIMITED")
    return min(total, int(most)) if most.isdigit() else total


def _check_time(request: Mapping[str, str], section: str) -> str:
    """Refuse more time than the partition gives: many a site lets such a job wait for ever.

    A quality of service may lift the partition's limit, so that with one it is only told.
    """
    named = _partitions_of(request)
    limits = {name: seconds(facts.get("MaxTime", "")) for name, facts in named.items()}
    try:
        asked = minutes(request.get("time", "")) * 60
    except ValueError:
        return ""
    if not limits or any(limit is None or limit >= asked for limit in limits.values()):
        return ""
    told = (
        f"{request['time']} asked for, partition {','.join(limits)} gives "
        f"{' and '.join(facts['MaxTime'] for facts in named.values())}"
    )
    if qos := request.get("qos"):
        return f"{told}: the job waits for ever unless qos {qos} allows more"
    raise UserError(
        told,
        where=_key("time", section),
        fix="ask for less, the run goes on in its next job; or use another partition",
    )


def _check_account(request: Mapping[str, str]) -> None:
    """Refuse an account that is none of the user's where the site keeps a list but no guard."""
    account, mine = request.get("account", ""), accounts()
    if account and mine and account not in mine:
        raise UserError(
            f"account {account!r} is none of yours", where="job.account", fix=nearest(account, mine)
        )


@dataclass(frozen=True)
class _Machine:
    """A node: cores, memory in MB, whether it can get jobs now, GPUs by type."""

    cpus: int
    memory: int
    works: bool
    gpus: Mapping[str, int]


@dataclass(frozen=True)
class _Wish:
    """Something each node must have: its key, in words, who has it, what one has instead."""

    topic: str
    words: str
    met: Callable[[_Machine], bool]
    offer: Callable[[_Machine], str]


def _machines(named: Iterable[str]) -> list[_Machine]:
    query = ["sinfo", "--noheader", "--Node", f"--partition={','.join(named)}"]
    found = {}
    for line in call([*query, "--format=%N|%c|%m|%T|%G"]).splitlines():
        name, cpus, memory, state, gres = line.split("|", 4)
        gpus: dict[str, int] = {}
        for kind, count in re.findall(r"gpu(?::([^:,(]*))?:(\d+)(?=[,(]|$)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        found[name] = _Machine(_number(cpus), _number(memory), bool(WORKING.fullmatch(state)), gpus)
    return list(found.values())


def _wishes(request: Mapping[str, str]) -> Iterator[_Wish]:
    kind, _, count = request.get("gpus-per-node", "").rpartition(":")
    if count:
        yield _Wish(
            "gpu_type" if kind else "gpus",
            f"{kind or 'GPU'} x {count}",
            lambda one: (one.gpus.get(kind, 0) if kind else sum(one.gpus.values())) >= int(count),
            lambda one: (
                ", ".join(f"{name or 'GPU'} x {n}" for name, n in one.gpus.items()) or "no GPU"
            ),
        )
    cores = _number(request.get("cpus-per-task", "1")) * _number(
        request.get("ntasks-per-node", "1")
    )
    yield _Wish(
        "cpus",
        f"{cores} cores a node",
        lambda one: one.cpus >= cores,
        lambda one: f"{one.cpus} cores",
    )
    memory = _megabytes(request.get("mem", ""))
    yield _Wish(
        "memory",
        f"{memory} MB a node",
        lambda one: one.memory >= memory,
        lambda one: f"{one.memory} MB",
    )


def _megabytes(text: str) -> int:
    unit = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}.get(text[-1:].upper(), 1)
    return int(_number(text) * unit)


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
