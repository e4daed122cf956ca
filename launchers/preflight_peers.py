"""What the nodes found together: who was waited for, whose exchanges were wrong or slow. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launchers import preflight_network as network
from launchers.fabric import PHASES
from launchers.preflight_types import SITE, Expected, Finding, Heard

SILENT_SECONDS = 5.0
LATENCY_SECONDS = 5e-3
FAST_BYTES = {"gloo": 100e6, "nccl": 20e9}
SLOW_BYTES = 10e6
INTERFACE = "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME in job.environment to the nodes' network"
PHASE_TEXT = {
    "started": "importing torch",
    "torch": "starting its GPUs",
    "device": "reaching the first node",
    "connected": "joining the process group",
    "joined": "the all-reduce",
    "reduced": "exchanging data with its neighbours",
    "done": "leaving",
}


def findings(heard: Heard, expected: Expected) -> Iterator[Finding]:
    """What is wrong with the network, or with who did not get through its checks."""
    reached = {node: progress(answer) for node, answer in heard.answers.items()}
    if len(reached) < len(expected.nodes) or any(
        phase < len(PHASES) - 1 for phase, _ in reached.values()
    ):
        yield from _unfinished(heard, expected, reached)
        return
    yield from _sums(heard)
    yield from _pairs(heard, expected)


def progress(answer: Mapping[str, Any]) -> tuple[int, int]:
    """The phase that all processes of a node have reached, and their exchanges in it."""
    return min(
        (
            (PHASES.index(process["phase"]), len(process["pairs"]))
            for process in answer["processes"]
        ),
        default=(0, 0),
    )


def _unfinished(
    heard: Heard, expected: Expected, reached: Mapping[str, tuple[int, int]]
) -> Iterator[Finding]:
    waits = PHASES.index("connected")
    blamed = {node for node in expected.nodes if node not in reached}
    for node, (phase, _) in reached.items():
        if (trouble := _trouble(heard.answers[node])) and (phase < waits or "frozen" in trouble):
            blamed.add(node)
            yield Finding("process", node, trouble, "see the preflight's log; " + SITE)
    late = [node for node in network.behind(reached, waits_from=waits) if node not in blamed]
    if blamed:  # the others wait for these, if not for what is earlier still
        late = [node for node in late if reached[node][0] < waits]
    for node in late:
        where = PHASE_TEXT[PHASES[reached[node][0]]]
        what = f"still {where} after {expected.seconds:.0f} s, where the others wait for it"
        yield Finding("late", node, what, SITE)
    if not blamed and not late:
        yield _nobody(heard, expected, reached)


def speeds(answer: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures of a node that are worth keeping: how far, how fast, how full."""
    if answer is None:
        return {"phase": "silent"}
    pairs = [pair for process in answer["processes"] for pair in process["pairs"]]
    values = answer["values"]
    return {
        "phase": PHASES[progress(answer)[0]],
        "seconds": round(answer["last"] - answer["first"], 2),
        "bytes_per_second": [round(pair["bytes"] / pair["seconds"]) for pair in pairs],
        "latency_seconds": [round(pair["latency"], 6) for pair in pairs],
        "write_bytes_per_second": round(values.get("write_bytes_per_second", 0)),
        "free_bytes": values.get("free_bytes"),
        "memory_free_bytes": values.get("memory_free_bytes"),
    }


def _trouble(answer: Mapping[str, Any]) -> str:
    """Why a node's processes go no further; empty where they just wait."""
    for number, process in enumerate(answer["processes"]):
        if process["phase"] == PHASES[-1]:
            continue
        where = f"process {number} in {PHASE_TEXT[process['phase']]}"
        if "error" in process:
            return f"{where}: {process['error']}"
        if process["exit"] is not None:
            return f"{where} ended with {process['exit']}"
        if process["silent"] > SILENT_SECONDS:
            return f"{where} is frozen: no sign for {process['silent']:.0f} s"
    return ""


def _nobody(heard: Heard, expected: Expected, reached: Mapping[str, tuple[int, int]]) -> Finding:
    """All stand at the same place, or fail alike: not a node's fault."""
    least = PHASES[min(reached.values())[0]]
    told = next((said for answer in heard.answers.values() if (said := _trouble(answer))), "")
    early = PHASES.index(least) < PHASES.index("connected")
    what = f"the nodes did not get past {PHASE_TEXT[least]} within {expected.seconds:.0f} s"
    fix = "raise job.preflight_seconds, or put Python's packages on faster storage"
    return Finding("late", "", f"{what}; {told}" if told else what, fix if early else INTERFACE)


def _sums(heard: Heard) -> Iterator[Finding]:
    for node, answer in heard.answers.items():
        if not all(process["right"] for process in answer["processes"]):
            what = "the sum of an all-reduce of integers is wrong"
            yield Finding("sum", node, what, SITE)


def _pairs(heard: Heard, expected: Expected) -> Iterator[Finding]:
    sides = [
        ((node, expected.nodes[pair["other"]]), pair)
        for node, answer in heard.answers.items()
        for process in answer["processes"]
        for pair in process["pairs"]
    ]
    links: dict[network.Link, list[Mapping[str, Any]]] = {}
    for ends, pair in sides:
        links.setdefault((min(ends), max(ends)), []).append(pair)
    wrong = {link for link, pairs in links.items() if not all(pair["right"] for pair in pairs)}
    yield from _located("content", list(links), wrong, lambda link: "data arrives changed")
    if not links:
        return
    size = next(iter(links.values()))[0]["bytes"]
    fast, factor = FAST_BYTES["nccl" if expected.gpus else "gloo"], expected.slow_factor
    times = {link: _slowest(pairs, "seconds") for link, pairs in links.items()}
    slow = network.slow_links(times, factor=factor, least=size / fast, most=size / SLOW_BYTES)
    common = network.usual(list(times.values()))
    yield from _located(
        "speed",
        list(links),
        slow,
        lambda link: f"{_rate(size, times[link])}; usual here is {_rate(size, common)}",
    )
    delays = {link: _slowest(pairs, "latency") for link, pairs in links.items()}
    late = network.slow_links(delays, factor=factor, least=LATENCY_SECONDS, most=float("inf"))
    yield from _located(
        "latency", list(links), late, lambda link: f"{delays[link] * 1e3:.1f} ms for a word"
    )


def _slowest(pairs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Seconds of the slowest pair of processes; both sides of one measure the same."""
    return float(max(pair[name] for pair in pairs))


def _located(
    kind: str,
    links: Sequence[network.Link],
    bad: set[network.Link],
    tell: Callable[[network.Link], str],
) -> Iterator[Finding]:
    found = network.locate(links, bad)
    for node in found.nodes:
        told = [f"with {_other(link, node)} {tell(link)}" for link in links if node in link]
        yield Finding(kind, node, "network: " + ", ".join(told), SITE)
    for link in found.links:
        for node in link:
            what = f"network: with {_other(link, node)} alone {tell(link)}"
            yield Finding(f"{kind} of a link", node, what, SITE, True)


def _other(link: network.Link, node: str) -> str:
    return link[0] if link[1] == node else link[1]


def _rate(size: float, seconds: float) -> str:
    return f"{size / seconds / 1e6:,.0f} MB/s"
