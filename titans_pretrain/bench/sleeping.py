"""One rank of ``titans bench wavefront``: training steps of a model whose layers sleep."""

import json
import os
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from titans_pretrain.config import TrainSection
from titans_pretrain.model.boundary import WHOLE, Boundary, Like
from titans_pretrain.parallel import devices, wavefront
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.sequence import SpanBoundary
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.train import launch

ROWS, SPAN, WIDTH, VOCABULARY = 1, 8, 16, 32
WARM_UP = 2  # steps


class Sleep(torch.autograd.Function):
    """Takes the time of a layer's forward pass, and of its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, forward_seconds: float, backward_seconds: float
    ) -> Tensor:
        """The input, later."""
        ctx.backward_seconds = backward_seconds
        time.sleep(forward_seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, later."""
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class SleepingBlock(nn.Module):
    """A recurrence whose state crosses the span's boundary, and which needs it from the start."""

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.seconds = forward_seconds, backward_seconds
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.boundary: Boundary = WHOLE

    def forward(self, hidden: Tensor) -> Tensor:
        """(ROWS, SPAN, WIDTH) to the same."""
        like = (Like((ROWS, WIDTH), hidden.dtype, hidden.device),)
        (state,) = self.boundary.enter(lambda: (hidden.new_zeros(ROWS, WIDTH),), like)
        slept: Any = Sleep.apply(hidden + state[:, None], *self.seconds)
        mixed = torch.tanh(self.proj(slept))
        return hidden + self.boundary.leave(mixed, (mixed[:, -1],))


class SleepingModel(nn.Module):
    """Embedding, sleeping blocks and head."""

    _no_split_modules = ("SleepingBlock",)

    def __init__(self, layers: int, seconds: tuple[float, float]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(SleepingBlock(*seconds) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutputWithPast:
        """Logits (ROWS, SPAN, VOCABULARY)."""
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))


def step_seconds(
    layers: int, seconds: tuple[float, float], micro_batches: int, interleaved: bool, steps: int
) -> float:
    """Median time of a step on this rank; its mesh is all ranks along the sequence.

    Args:
        layers: of the model.
        seconds: that a layer sleeps forward and backward.
        micro_batches: of a step.
        interleaved: whether they are worked on at once.
        steps: that count.
    """
    train = TrainSection(
        steps=WARM_UP + steps, global_batch_size=micro_batches, learning_rate=1e-3, precision="fp32"
    )
    mesh = Mesh(sequence=devices.ranks())
    parallel = Parallel(mesh, devices.rank())
    engine = _engine(layers, seconds, train, parallel)
    order = wavefront.order(
        parallel.groups.sequence_rank, mesh.sequence, micro_batches, interleaved=interleaved
    )
    tokens = torch.randint(VOCABULARY, (ROWS, SPAN * mesh.sequence))
    taken = []
    for _ in range(train.steps):
        started = time.perf_counter()
        losses: dict[int, Tensor] = {}
        for kind, number in order:
            if kind == "forward":
                logits = engine.forward(parallel.span(tokens), number)
                losses[number] = logits.square().mean()
            else:
                engine.backward(losses.pop(number), number)
        engine.step(1e-3)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])


def _engine(
    layers: int, seconds: tuple[float, float], train: TrainSection, parallel: Parallel
) -> ZeroEngine:
    """The model in the trainer's own engine."""
    torch.manual_seed(0)
    model: Any = SleepingModel(layers, seconds)
    for index, block in enumerate(model.layers):
        block.boundary = SpanBoundary(
            f"layers.{index}", parallel.groups, parallel.links, parallel.replay
        )
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = ZeroEngine(model, adam, train, parallel, torch.device("cpu"))
    engine.train()
    return engine


def main() -> None:
    """Measure what the argument says and print it."""
    launch.end_with_launcher()
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    with devices.process_group(torch.device("cpu")):
        found = step_seconds(**options)
    print(json.dumps(found), flush=True)
    os._exit(0)  # nothing is left to do, and taking everything down takes seconds


if __name__ == "__main__":
    main()
