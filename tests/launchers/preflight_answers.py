"""What the nodes of a job tell in a preflight, made up: all well, to be spoilt by a test."""

from launchers.fabric import PAIR_BYTES, PHASES, partner, turns
from launchers.preflight_types import Expected

BEGUN = 1_000_000.0
SECONDS = 0.004


def names(count):
    return [f"n{number}" for number in range(count)]


def expected(count, **changes):
    values = {
        "nodes": names(count),
        "nonce": "abc",
        "config": "c0ffee",
        "needed_bytes": 10**9,
        "gpus": 0,
        "memory_bytes": 0,
        "slow_factor": 3.0,
        "seconds": 60.0,
        "begun": BEGUN,
        "over": BEGUN + 20,
    }
    return Expected(**values | changes)


def process(node, nodes, *, phase="done"):
    pairs = []
    if phase == "done":
        others = [partner(node, nodes, turn) for turn in range(turns(nodes))]
        pairs = [pair(other) for other in others if other is not None]
    found = {"phase": phase, "silent": 0.1, "exit": None, "pairs": pairs}
    if PHASES.index(phase) >= PHASES.index("joined"):
        found["clock"] = BEGUN + 10
    if PHASES.index(phase) >= PHASES.index("reduced"):
        found["right"] = True
    return found


def pair(other):
    return {
        "other": other,
        "seconds": SECONDS * (1 + other % 3 / 10),
        "latency": 1e-4,
        "bytes": PAIR_BYTES["gloo"],
        "right": True,
    }


def answer(node, nodes, *, phase="done"):
    return {
        "node": f"n{node}",
        "ended": True,
        "first": BEGUN + 1,
        "last": BEGUN + 15,
        "doing": "",
        "values": {
            "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
            "code": "5eed" * 16,
            "config": "c0ffee",
            "nonce": "abc",
            "free_bytes": 10**12,
            "memory_bytes": 64 * 2**30,
            "memory_free_bytes": 60 * 2**30,
            "write_bytes_per_second": 1e8,
        },
        "faults": [],
        "processes": [process(node, nodes, phase=phase)],
    }


def answers(count, *, phase="done"):
    return {name: answer(node, count, phase=phase) for node, name in enumerate(names(count))}
