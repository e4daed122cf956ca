"""Which node or link a network's measurements speak against. Pure functions, no torch here."""

import bisect
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)
Link = tuple[str, str]


@dataclass(frozen=True)
class Bad:
    """What is worse than the rest.

    Attributes:
        nodes: bad with both neighbours.
        links: bad between two nodes of which neither is bad with its other neighbour.
    """

    nodes: tuple[str, ...]
    links: tuple[Link, ...]


def locate(links: Sequence[Link], bad: set[Link]) -> Bad:
    """Tell bad nodes from bad links, where each node was tried with its two neighbours.

    Args:
        links: pairs of nodes that were tried.
        bad: those among them that failed.
    """
    tried = Counter(node for link in links for node in link)
    failed = Counter(node for link in links if link in bad for node in link)
    nodes = {node for node, count in failed.items() if count == tried[node] > 1}
    alone = [link for link in links if link in bad and not nodes & set(link)]
    return Bad(tuple(sorted(nodes)), tuple(alone))


def usual(seconds: Sequence[float]) -> float:
    """The median of what is left without the two longest, which one bad node would make."""
    return statistics.median_low(sorted(seconds)[: max(1, len(seconds) - 2)])


def slow_links(
    seconds: Mapping[Link, float], *, factor: float, least: float, most: float
) -> set[Link]:
    """Links that take much longer than usual.

    Args:
        seconds: that the same exchange took over each link.
        factor: times the usual that is too long.
        least: seconds up to which any link is fast enough.
        most: seconds from which on any link is too slow.
    """
    if not seconds:
        return set()
    bound = min(max(usual(list(seconds.values())) * factor, least), most)
    return {link for link, took in seconds.items() if took > bound}


def apart(values: Mapping[str, float], tolerance: float) -> list[str]:
    """Names whose value is further than ``tolerance`` from most of the others'."""
    ordered = sorted(values.values())
    found = []
    for name, value in values.items():
        low = bisect.bisect_left(ordered, value - tolerance)
        high = bisect.bisect_right(ordered, value + tolerance)
        near, others = high - low - 1, len(ordered) - 1
        if others and near * 2 < others:
            found.append(name)
    return found


def minority(values: Mapping[str, Value]) -> tuple[Value | None, list[str]]:
    """What most names have, and the names that have something else.

    Where no value has more than half of the names, it is None and all names are told.
    """
    if not values:
        return None, []
    value, count = Counter(values.values()).most_common(1)[0]
    if count * 2 > len(values):
        return value, [name for name in values if values[name] != value]
    return None, list(values)


def behind(progress: Mapping[str, tuple[int, int]], *, waits_from: int) -> list[str]:
    """Names that the others wait for; empty where that cannot be told.

    Args:
        progress: phase and part of it that each has reached.
        waits_from: first phase in which one waits for all.
    """
    late = [name for name, (phase, _) in progress.items() if phase < waits_from]
    if late:
        return late if len(late) < len(progress) else []
    least = min(progress.values(), default=(0, 0))
    last = [name for name, reached in progress.items() if reached == least]
    return last if len(last) * 2 <= len(progress) else []
