"""From what all nodes told to what is wrong, and with which of them. Pure functions, no torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launchers import preflight_network as network
from launchers import preflight_peers as peers
from launchers.preflight_types import SITE, Expected, Finding, Heard, Problem

CLOCK_SECONDS = 5.0
MEMORY_SHARE = 0.5
PASSING = frozenset({"silent", "late"})
SAME = "give all nodes the same environment and code, or leave the node out"


def judge(heard: Heard, expected: Expected) -> tuple[Problem, ...]:
    """All problems, each once; what most nodes share is told once and blamed on none."""
    found = [
        *_silent(heard, expected),
        *_faults(heard),
        *_directories(heard, expected),
        *_versions(heard),
        *_memory(heard, expected),
        *_gpus(heard, expected),
        *_clocks(heard, expected),
        *peers.findings(heard, expected),
    ]
    kinds: dict[str, list[Finding]] = {}
    for finding in found:
        kinds.setdefault(finding.kind, []).append(finding)
    count = len(expected.nodes)
    return tuple(problem for same in kinds.values() for problem in _blame(same, count))


def _blame(same: Sequence[Finding], count: int) -> Iterator[Problem]:
    names = sorted({finding.node for finding in same if finding.node})
    first, passing = same[0], same[0].kind in PASSING
    shared = len(names) * 2 > count > 1 and not (first.compared and len(names) == 2)
    if not shared:
        yield from (Problem(f.node, f.what, f.fix, passing) for f in same)
        return
    of = f"{len(names)} of {count} nodes" if len(names) < count else f"all {count} nodes"
    yield Problem("", f"{of}: {first.what}", first.fix, passing)


def _silent(heard: Heard, expected: Expected) -> Iterator[Finding]:
    for node in expected.nodes:
        if node not in heard.answers:
            said = heard.words.get(node, "its process did not start, or is frozen")
            yield Finding(
                "silent",
                node,
                f"no answer after {expected.over - expected.begun:.0f} s: {said}",
                "leave the node out; see that it runs job.python and reaches the run directory",
            )


def _faults(heard: Heard) -> Iterator[Finding]:
    for node, answer in heard.answers.items():
        for fault in answer["faults"]:
            yield Finding(fault["what"].split(":")[0], node, fault["what"], fault["fix"])
        if answer["ended"] and answer["doing"]:
            what = f"the check of its {answer['doing']} did not end"
            yield Finding(what, node, what, SITE)


def _directories(heard: Heard, expected: Expected) -> Iterator[Finding]:
    for node, nonce in _values(heard, "nonce").items():
        if nonce != expected.nonce:
            what = "its run directory is not the batch host's: a file written there reads otherwise"
            yield Finding("nonce", node, what, "put run.directory on a shared file system")
    for node, found in _values(heard, "config").items():
        if found != expected.config:
            what = "its configuration file is not the one the batch host reads"
            yield Finding("config", node, what, "put the file on a shared file system")
    free = _values(heard, "free_bytes")
    if free and (least := min(free.values())) < expected.needed_bytes:
        yield Finding(
            "space",
            "",
            f"the run directory's file system has {_size(least)} free; the next checkpoints "
            f"need {_size(expected.needed_bytes)}",
            "free space, choose another run.directory, or lower checkpoint.keep",
        )


def _versions(heard: Heard) -> Iterator[Finding]:
    tables = _values(heard, "versions")
    columns = {name for table in tables.values() for name in table}
    for name in sorted(columns):
        values = {node: str(table.get(name)) for node, table in tables.items()}
        yield from _odd(name, values, "the others have")
    code = {node: digest[:12] for node, digest in _values(heard, "code").items()}
    yield from _odd("code of titans_pretrain", code, "the others have")


def _odd(name: str, values: Mapping[str, str], others: str) -> Iterator[Finding]:
    most, names = network.minority(values)
    for node in names:
        told = f"{others} {most}" if most is not None else "the nodes differ: " + _counted(values)
        yield Finding(f"{name} {values[node]}", node, f"{name} {values[node]}; {told}", SAME, True)


def _counted(values: Mapping[str, str]) -> str:
    return ", ".join(f"{value} on {node}" for node, value in list(values.items())[:4])


def _memory(heard: Heard, expected: Expected) -> Iterator[Finding]:
    for node, size in _values(heard, "memory_bytes").items():
        if size < expected.memory_bytes:
            what = f"{_size(size)} of memory; job.memory_per_node is {_size(expected.memory_bytes)}"
            yield Finding("memory", node, what, SITE)
    free = _values(heard, "memory_free_bytes")
    if not free:
        return
    middle = sorted(free.values())[len(free) // 2]
    for node, size in free.items():
        # what other jobs hold of a shared node is theirs, as long as ours finds its share
        lacks = expected.all_memory or size < expected.memory_bytes
        if lacks and size < middle * MEMORY_SHARE:
            what = f"{_size(size)} of memory free; most nodes have {_size(middle)}"
            yield Finding(
                "free memory", node, what, "end what other jobs left there; " + SITE, True
            )


def _gpus(heard: Heard, expected: Expected) -> Iterator[Finding]:
    if not expected.gpus:
        return
    names = _values(heard, "gpus")
    for node, answer in heard.answers.items():
        seen = [process["gpus"] for process in answer["processes"] if "gpus" in process]
        counts = [len(names[node]), *seen] if node in names else seen
        if counts and min(counts) < expected.gpus:
            what = f"{min(counts)} GPUs; job.gpus_per_node is {expected.gpus}"
            yield Finding("GPUs", node, what, SITE)
    kinds = {node: ", ".join(sorted(set(found))) for node, found in names.items()}
    yield from _odd("GPU", kinds, "the others have")


def _clocks(heard: Heard, expected: Expected) -> Iterator[Finding]:
    fix = "have the site set the clock (NTP); leave the node out until then"
    clocks = {
        node: answer["processes"][0]["clock"]
        for node, answer in heard.answers.items()
        if answer["processes"] and "clock" in answer["processes"][0]
    }
    if len(clocks) == len(expected.nodes):  # read at one moment, when all had joined
        middle = sorted(clocks.values())[len(clocks) // 2]
        for node in network.apart(clocks, CLOCK_SECONDS):
            what = f"its clock is {clocks[node] - middle:+.1f} s off the nodes' median"
            yield Finding("clock", node, what, fix, True)
        return
    for node, answer in heard.answers.items():
        early, late = answer["first"] - expected.begun, answer["last"] - expected.over
        off = min(early, 0.0) or max(late, 0.0)
        if abs(off) > CLOCK_SECONDS:
            what = f"its clock is {off:+.1f} s or more off the batch host's"
            yield Finding("clock", node, what, fix, True)


def _values(heard: Heard, name: str) -> dict[str, Any]:
    return {
        node: answer["values"][name]
        for node, answer in heard.answers.items()
        if name in answer["values"]
    }


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
