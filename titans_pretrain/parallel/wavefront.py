"""In which order a sequence rank works on the micro-batches of a step. Pure, no communication.

A layer of a micro-batch waits for the same layer on the rank before (forward) or after (backward).
With ``L`` layers of ``t`` each on ``P`` ranks, ``M`` micro-batches one after another take
``M (L + P - 1) t``: each fills and drains the line of ranks. Interleaved, the next forward pass
begins while the backward pass is still on its way from the last rank: ``(M L + P - 1) t``.
"""

from typing import Literal, NamedTuple

from titans_pretrain.config import RunConfig


class Pass(NamedTuple):
    """One forward or backward pass of one micro-batch."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def order(
    sequence_rank: int, sequence_ranks: int, micro_batches: int, *, interleaved: bool
) -> list[Pass]:
    """All passes of a step in the order in which a sequence rank does them.

    Every rank does its forward passes in the order of the micro-batches, and its backward passes
    too, so neighbours agree on the order of messages in each direction. Rank ``r`` of ``P`` keeps
    the activations of at most ``P - r`` micro-batches, or of one when not interleaved: with fewer
    the ranks wait for each other.

    Args:
        sequence_rank: the rank's index along the sequence axis.
        sequence_ranks: ranks that share a sequence.
        micro_batches: of one optimizer step.
        interleaved: whether a forward pass may begin before the backward pass of the one before.
    """
    if not 0 <= sequence_rank < sequence_ranks:
        raise ValueError(f"sequence rank {sequence_rank} is not among {sequence_ranks}")
    in_flight = sequence_ranks - sequence_rank if interleaved else 1
    passes: list[Pass] = []
    for forward in range(micro_batches + in_flight):
        if 0 <= forward - in_flight < micro_batches:
            passes.append(Pass("backward", forward - in_flight))
        if forward < micro_batches:
            passes.append(Pass("forward", forward))
    return passes


def is_interleaved(config: RunConfig) -> bool:
    """Whether a run's sequence ranks work on several micro-batches at once.

    Those of a transformer do not: all of them take part in each exchange of heads.
    """
    return config.mesh.interleave and config.model.get("variant") != "transformer"
