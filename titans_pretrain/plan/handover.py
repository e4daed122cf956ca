"""What sequence ranks send each other, in bytes. No torch here.

All volumes are those of one layer and one tensor rank. Boundary ``r`` lies between sequence ranks
``r - 1`` and ``r``, so ``r * span`` tokens of a sequence come before it. A forward pass sends over
it once, and the gradients that come back are as large; validation has no way back.

Memory states are float32 whatever the precision. Their size does not depend on the sequence length,
nor does a halo's where a span is at least as long.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titans_pretrain.config import RunConfig
from titans_pretrain.model.fields import WITH_MEMORY
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan.parameters import memory_heads, memory_layers

STATE_BYTES = 4
ACTIVATION_BYTES = {"bf16": 2, "fp32": 4}
BRANCHES = 3


@dataclass(frozen=True)
class Message:
    """What one forward pass of one micro-batch sends over a boundary.

    Attributes:
        state: bytes of the memory's weights and momentum, and of MAC's convolution inputs.
        convolution: bytes of the convolutions' last inputs that go on their own.
        window: bytes of attention keys and values.
    """

    state: int
    convolution: int
    window: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.state + self.convolution + self.window


def rows(config: RunConfig, length: int) -> int:
    """Sequences of a micro-batch where a sequence has ``length`` tokens."""
    return config.train.micro_batch_size * (config.data.sequence_length // length)


def state_bytes(model: Mapping[str, Any], rows: int, tensor: int) -> int:
    """The message that carries a memory state on.

    Args:
        model: resolved fields of TitansConfig.
        rows: sequences of the micro-batch.
        tensor: ranks that share a layer.
    """
    if model["variant"] not in WITH_MEMORY:
        return 0
    heads = memory_heads(model) // tensor
    elements = 2 * heads * sum(out * into for out, into in memory_layers(model))
    if model["variant"] == "mac":
        elements += BRANCHES * _taps(model) * model["hidden_size"] // tensor
    return elements * rows * STATE_BYTES


def convolution_bytes(
    model: Mapping[str, Any], rows: int, tensor: int, *, before: int, activation_bytes: int
) -> int:
    """The last inputs of the short convolutions: of all three, of MAC those of asked queries.

    Args:
        model: resolved fields of TitansConfig.
        rows: sequences of the micro-batch.
        tensor: ranks that share a layer.
        before: tokens of the sequence before the boundary.
        activation_bytes: bytes of an activation's number.
    """
    if model["variant"] not in WITH_MEMORY:
        return 0
    branches = 1 if model["variant"] == "mac" else BRANCHES
    width = model["hidden_size"] // tensor
    return branches * min(_taps(model), before) * width * rows * activation_bytes


def window_bytes(
    model: Mapping[str, Any], rows: int, tensor: int, *, before: int, activation_bytes: int
) -> int:
    """Keys and values that the sliding window of MAG and MAL reaches; see ``convolution_bytes``."""
    if model["variant"] not in ("mag", "mal"):
        return 0
    width = model["hidden_size"] // tensor
    return 2 * min(model["window_size"] - 1, before) * width * rows * activation_bytes


def message(config: RunConfig, boundary: int, length: int | None = None) -> Message:
    """What one forward pass of a micro-batch sends over a boundary.

    Args:
        config: the run.
        boundary: from 1 to mesh.sequence - 1.
        length: tokens of a sequence, if not data.sequence_length.
    """
    if not 1 <= boundary < config.mesh.sequence:
        raise ValueError(f"boundary {boundary} is not among {config.mesh.sequence} ranks")
    length = length or config.data.sequence_length
    size = config.model, rows(config, length), config.mesh.tensor
    before = boundary * (length // config.mesh.sequence)
    activation = ACTIVATION_BYTES[config.train.precision]
    return Message(
        state=state_bytes(*size),
        convolution=convolution_bytes(*size, before=before, activation_bytes=activation),
        window=window_bytes(*size, before=before, activation_bytes=activation),
    )


def step_bytes(config: RunConfig, mesh: Mesh, boundary: int, length: int | None = None) -> int:
    """Bytes over a boundary in one optimizer step, states on and gradients back together."""
    return 2 * mesh.accumulation(config.train) * message(config, boundary, length).total


def exchange_bytes(config: RunConfig, length: int | None = None) -> int:
    """What a rank sends in a transformer's exchanges of heads, in one pass of a micro-batch.

    Queries, keys, values and the output change hands, all but the rank's own part of each; in
    backward their gradients do.
    """
    if config.model.get("variant") != "transformer":
        return 0
    length, ranks = length or config.data.sequence_length, config.mesh.sequence
    width = config.model["hidden_size"] // config.mesh.tensor
    elements = 4 * rows(config, length) * (length // ranks) * width
    return elements * ACTIVATION_BYTES[config.train.precision] * (ranks - 1) // ranks


def free_of_length(model: Mapping[str, Any]) -> int:
    """Tokens of a span from which on the volume is the same for any sequence length."""
    reach = _taps(model) if model["variant"] in WITH_MEMORY else 0
    if model["variant"] in ("mag", "mal"):
        reach = max(reach, model["window_size"] - 1)
    return reach


def _taps(model: Mapping[str, Any]) -> int:
    """Earlier inputs that a short convolution sees."""
    return max(0, int(model["conv_width"]) - 1)
