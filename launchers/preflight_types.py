"""What the parts of a preflight's judgement hand each other. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SITE = "tell the site's administrators; leave the node out until it is mended"


@dataclass(frozen=True)
class Problem:
    """Something that would stop or slow the run.

    Attributes:
        node: whose fault it is; empty where other nodes would not help.
        what: what is wrong, with the values.
        fix: what to do about it.
        passing: it may be gone at the next try, as that of a file system that was slow.
    """

    node: str
    what: str
    fix: str
    passing: bool = False


@dataclass(frozen=True)
class Expected:
    """What the batch process knows about how it should be.

    Attributes:
        nodes: all nodes, in order of their numbers.
        nonce: content of the file in the check's directory.
        config: sha256 of the configuration file.
        needed_bytes: of free space in the run's directory.
        gpus: on each node.
        memory_bytes: that the job asks of each node; 0 for none.
        slow_factor: times the usual that is too slow.
        seconds: that the check may take.
        begun: the batch host's clock when the step began.
        over: the batch host's clock when the step was over.
        all_memory: of each node is the job's.
    """

    nodes: Sequence[str]
    nonce: str
    config: str
    needed_bytes: int
    gpus: int
    memory_bytes: int
    slow_factor: float
    seconds: float
    begun: float
    over: float
    all_memory: bool = False


@dataclass(frozen=True)
class Finding:
    """A problem before it is known how many nodes share it; those of one kind count together."""

    kind: str
    node: str
    what: str
    fix: str
    compared: bool = False


@dataclass(frozen=True)
class Heard:
    """What reached the batch process.

    Attributes:
        answers: each node's file.
        words: what the step's output says about a node, for those whose file says nothing.
    """

    answers: Mapping[str, Mapping[str, Any]]
    words: Mapping[str, str] = field(default_factory=dict)
