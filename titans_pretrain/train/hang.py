"""Who holds up a run that hangs, told from the records of its ranks. Pure; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titans_pretrain.errors import StoppedEarly

COMMUNICATION = ("/torch/distributed/", "/deepspeed/", "/titans_pretrain/parallel/")
SYNCHRONIZING = ("synchronizing", "reducing", "summing up")  # phases that wait for the device
ORDER = {
    "reading": 0,
    "forward": 1,
    "backward": 1,
    "synchronizing": 2,
    "reducing": 3,
    "updating": 4,
    "validating": 5,
    "summing up": 5,
    "validated": 6,
    "saving": 7,
}
FRAMES_TOLD = 12


@dataclass(frozen=True)
class Report:
    """What is told about a run that hangs.

    Attributes:
        error: in three lines.
        culprit: the rank that holds up the others.
        host: of the culprit.
        stack: of its main thread, empty where it left no record.
        details: every rank's place and stack.
    """

    error: StoppedEarly
    culprit: int
    host: str
    stack: list[str]
    details: str

    def __str__(self) -> str:
        return f"{self.error}\n{self.details}"


def explain(
    records: Mapping[int, Mapping[str, Any]],
    ranks: int,
    started: Mapping[str, Mapping[str, Any]],
    directory: str,
) -> Report:
    """The report.

    Args:
        records: by rank, of the ranks that wrote one; at least one.
        ranks: number of ranks.
        started: host and process of each rank, keyed by its number as text.
        directory: of the records.
    """
    silent = [rank for rank in range(ranks) if rank not in records]
    culprit, why = _culprit(records, silent)
    place = {**started.get(str(culprit), {}), **records.get(culprit, {})}
    host = str(place.get("host", "an unknown host"))
    step = max(record["place"]["step"] for record in records.values())
    longest = max(record["seconds"] for record in records.values())
    error = StoppedEarly(
        f"{f'step {step}' if step else 'the start'} hangs: rank {culprit} on {host} {why}",
        where=f"rank {culprit} on {host}, process {place.get('pid', 'unknown')}: "
        f"{place.get('told', 'no record')}; held up for {longest:.0f} s",
        fix=f"continue with --resume, without that host if it happens again; stacks: {directory}",
    )
    lines = [_line(rank, records.get(rank), started.get(str(rank), {})) for rank in range(ranks)]
    stack = main_stack(records[culprit]) if culprit in records else []
    return Report(error, culprit, host, stack, "\n".join([*lines, *_stacks(records, culprit)]))


def main_stack(record: Mapping[str, Any]) -> list[str]:
    """Calls of the main thread, innermost last."""
    stack: list[str] = record["stacks"].get("MainThread", [])
    return stack


def waits(record: Mapping[str, Any]) -> bool:
    """Whether the rank waits for others: at a hand-over, in a communication call, for its device.

    A device stands still until the other ranks' parts of its communication come.
    """
    place = record["place"]
    if place["waiting_on"] is not None or place["phase"] in SYNCHRONIZING:
        return True
    return _communicates(record)


def _communicates(record: Mapping[str, Any]) -> bool:
    """Whether any thread is inside a communication call."""
    innermost = (stack[-1] for stack in record["stacks"].values() if stack)
    return any(part in call for call in innermost for part in COMMUNICATION)


def _culprit(records: Mapping[int, Mapping[str, Any]], silent: list[int]) -> tuple[int, str]:
    if silent:
        others = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        return silent[0], f"is silent{others}: its process is dead, stopped or cut off"
    free = [rank for rank, record in records.items() if not waits(record)]
    if free:
        others = f", like {len(free) - 1} more" if len(free) > 1 else ""
        return _last(records, free), f"waits for no other rank{others}"
    heads = [rank for rank, record in records.items() if record["place"]["waiting_on"] is None]
    if heads and len(heads) < len(records):
        return _last(records, heads), "is in a collective call, for which others wait"
    return _last(records, list(records)), "is the least advanced; every rank waits for another"


def _last(records: Mapping[int, Mapping[str, Any]], among: list[int]) -> int:
    """The least advanced rank: of the earliest step, there of the earliest phase."""

    def advance(rank: int) -> tuple[int, int, int]:
        place = records[rank]["place"]
        return place["step"], ORDER.get(place["phase"], len(ORDER)), rank

    return min(among, key=advance)


def _line(rank: int, record: Mapping[str, Any] | None, started: Mapping[str, Any]) -> str:
    if record is None:
        host, pid = started.get("host", "an unknown host"), started.get("pid", "unknown")
        return f"rank {rank} on {host}, process {pid}: silent"
    waiting = record["place"]["waiting_on"] is None and _communicates(record)
    told = record["told"] + (", inside a communication call" if waiting else "")
    return f"rank {rank} on {record['host']}, process {record['pid']}: {told}"


def _stacks(records: Mapping[int, Mapping[str, Any]], culprit: int) -> list[str]:
    """The innermost calls of the main threads, ranks that stand at the same place together."""
    same: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(records, key=lambda rank: (rank != culprit, rank)):
        calls = tuple(reversed(main_stack(records[rank])[-FRAMES_TOLD:]))
        same.setdefault(calls, []).append(rank)
    lines = []
    for calls, members in same.items():
        lines.append(f"stack of rank {', '.join(map(str, members))}, innermost call first:")
        lines += [f"  {call}" for call in calls]
    return lines
