"""What a frozen plan will take: tokens, disk, core-hours, and the line that submits it."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.plan import Plan
from data_prep.spool import KEPT, KEPT_IN_TURN, PACKED

WORKER_BYTES = 2**29  # of memory, the fast encoder's cache included
LARGE_UNIT = 2**28  # bytes of text
RATES = {"sentencepiece": 1.1e6, "fast": 5e6}  # tokens a second and core, all of a task's work


def facts(plan: Plan, output: Path, *, rate: float | None = None, cores: int = 8) -> dict[str, Any]:
    """What the work is and takes, sizes in bytes, times in hours.

    Args:
        plan: the frozen plan.
        output: its directory.
        rate: million tokens a second and core; None: as measured with each encoder.
        cores: of a task.
    """
    content, expected = plan.content, plan.content["expected"]
    left = kept_share(content)
    tokens, documents = (round(expected[key] * left) for key in ("tokens", "documents"))
    rates = {"given": rate * 1e6} if rate else RATES
    hours = {name: tokens / per_second / 3600 for name, per_second in rates.items()}
    slowest = max(hours.values())
    kept = KEPT_IN_TURN if plan.deals_files else KEPT
    told = {
        "inputs": len(content["inputs"]),
        "input_bytes": sum(entry["size"] for entry in content["inputs"]),
        "units": expected["units"],
        "text_bytes": expected["text_bytes"],
        "documents": documents,
        "duplicates": (content["duplicates"] or {"documents": 0})["documents"],
        "tokens": tokens,
        "tasks": plan.tasks,
        "tokens_per_task": tokens // plan.tasks,
        "output_bytes": round(expected["bytes"] * left),
        "free_bytes": shutil.disk_usage(output).free,
        "temporary_bytes": sum(sorted(map(_unpacked, content["inputs"]))[-kept:]),
        "rates": rates,
        "core_hours": hours,
        "cores": cores,
        "task_hours": slowest / plan.tasks / cores,
        "memory_bytes": 2 * content["settings"]["shard_bytes"] + cores * WORKER_BYTES,
    }
    return told | {"submit": _submit(output, told)}


def kept_share(content: Mapping[str, Any]) -> float:
    """Share of a plan's expected documents that are no duplicates to drop."""
    dropped = content["duplicates"]["documents"] if content["duplicates"] else 0
    return max(0.0, 1 - dropped / max(content["expected"]["documents"], 1))


def text(told: Mapping[str, Any]) -> str:
    """The facts as lines for a person."""
    lines = {
        "inputs": f"{told['inputs']:,} files, {size(told['input_bytes'])}, "
        f"{told['units']:,} units of about {size(told['text_bytes'] / told['units'])} of text",
        "tokens": f"{amount(told['tokens'])} expected, of {amount(told['documents'])} documents",
        "tasks": f"{told['tasks']:,}, {amount(told['tokens_per_task'])} tokens each",
        "disk": f"{size(told['output_bytes'])} for the output, "
        f"{size(told['free_bytes'])} are free there",
        "TMPDIR": f"{size(told['temporary_bytes'])} a task, for compressed inputs unpacked",
        "core-hours": ", ".join(
            f"{told['core_hours'][name]:,.2f} with {name} ({rate / 1e6:g} M tokens/s/core)"
            for name, rate in told["rates"].items()
        ),
        "submit": told["submit"],
    }
    if told["duplicates"]:
        lines["duplicates"] = f"{told['duplicates']:,} documents to drop"
    if told["output_bytes"] > told["free_bytes"]:
        lines["disk"] += ": NOT ENOUGH"
    if not told["temporary_bytes"]:
        del lines["TMPDIR"]
    if told["text_bytes"] / told["units"] > LARGE_UNIT:
        lines["note"] = (
            "units this large take memory and keep few cores busy: "
            "write row groups of 1000 to 10,000 rows"
        )
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    return _scaled(count, ("B", "KB", "MB", "GB", "TB"))


def amount(count: float) -> str:
    """A count in thousands, millions, billions."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def duration(hours: float) -> str:
    """Hours as ``[D-]HH:MM:SS``, as SLURM takes it."""
    seconds = round(hours * 3600)
    days, seconds = divmod(seconds, 86_400)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _scaled(count: float, units: tuple[str, ...]) -> str:
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.{0 if place == 0 else 3}{'f' if place == 0 else 'g'}} {units[place]}"


def _unpacked(entry: Mapping[str, Any]) -> int:
    """Bytes of a compressed file unpacked, of others 0; the last unit is taken to be average."""
    starts = entry.get("starts", [])
    if not entry["name"].endswith(PACKED) or not starts:
        return 0
    average = starts[-1] / (len(starts) - 1) if len(starts) > 1 else 4 * entry["size"]
    return round(starts[-1] + average)


def _submit(output: Path, told: Mapping[str, Any]) -> str:
    """The command that does all tasks: an array job, with twice the time they should take."""
    prepare = shlex.join(["titans", "data", "prepare", "--output", str(output.absolute())])
    if told["tasks"] == 1:
        return prepare
    options = [f"--array=0-{told['tasks'] - 1}", f"--cpus-per-task={told['cores']}"]
    options.append(f"--mem={-(-told['memory_bytes'] // 2**30)}G")
    options.append(f"--time={duration(2 * told['task_hours'] + 0.25)}")
    return shlex.join(["sbatch", *options, "--wrap", prepare])
