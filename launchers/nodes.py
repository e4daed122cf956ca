"""What SLURM says of nodes: which it would use, and which it has lost. No torch here."""

from collections.abc import Collection

from launchers import slurm_command, slurm_refusals

USABLE = frozenset({"idle", "mixed", "allocated", "completing", "reserved", "planned"})
LOST = frozenset({"down", "fail", "failing", "unknown", "error"})
_FLAGS = "*~#!%$@^-+"


def states(partition: str) -> dict[str, str]:
    """State of each node of a partition, in SLURM's words; ``*`` behind one that does not answer.

    Raises:
        SlurmError: SLURM does not answer.
    """
    query = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
    query += [f"--partition={partition}"] if partition else []
    answer = slurm_command.call(query)
    pairs = (line.split() for line in answer.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def preempt_mode(partition: str) -> str:
    """What becomes of a preempted job there: ``REQUEUE``, ``CANCEL`` …; empty if SLURM tells not.

    Raises:
        SlurmError: SLURM does not answer.
    """
    return slurm_refusals.partitions().get(partition, {}).get("PreemptMode", "").split(",")[0]


def is_usable(state: str) -> bool:
    """Whether SLURM would give a job such a node, now or later."""
    return "*" not in state and state.rstrip(_FLAGS) in USABLE


def lost(nodes: Collection[str], states: dict[str, str]) -> tuple[str, ...]:
    """Of a job's nodes, those that are down or do not answer."""
    bad = (node for node in nodes if node in states)
    return tuple(node for node in bad if "*" in states[node] or states[node].rstrip(_FLAGS) in LOST)


def spare(states: dict[str, str], needed: int, excluded: Collection[str]) -> int:
    """How many usable nodes a job can do without; those it never takes do not count."""
    usable = [name for name, state in states.items() if is_usable(state) and name not in excluded]
    return max(0, len(usable) - needed)
