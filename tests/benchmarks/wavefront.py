"""The wavefront's step time, with layers whose compute is a sleep, so that few cores can show it.

Run ``python tests/benchmarks/wavefront.py``: it prints a table, and with ``--plot FILE.png`` draws
it. Everything but the layers is the trainer's own: boundaries, links, schedule, ZeRO-3.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "distributed"))

from ranks import run_ranks  # noqa: E402

from titans_pretrain.config import TrainSection  # noqa: E402
from titans_pretrain.model.boundary import WHOLE, Like  # noqa: E402
from titans_pretrain.parallel import devices, wavefront  # noqa: E402
from titans_pretrain.parallel.mesh import Mesh  # noqa: E402
from titans_pretrain.parallel.parallelize import Parallel  # noqa: E402
from titans_pretrain.parallel.sequence import SpanBoundary  # noqa: E402
from titans_pretrain.parallel.zero import ZeroEngine  # noqa: E402

ROWS, SPAN, WIDTH, VOCABULARY = 1, 8, 16, 32


class Sleep(torch.autograd.Function):
    """Takes the time of a layer's forward pass, and of its backward pass."""

    @staticmethod
    def forward(ctx, hidden, forward_seconds, backward_seconds):
        ctx.backward_seconds = backward_seconds
        time.sleep(forward_seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class SleepingBlock(nn.Module):
    """A recurrence whose state crosses the span's boundary, and which needs it from the start."""

    def __init__(self, forward_seconds, backward_seconds):
        super().__init__()
        self.seconds = forward_seconds, backward_seconds
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.boundary = WHOLE

    def forward(self, hidden):
        like = (Like((ROWS, WIDTH), hidden.dtype, hidden.device),)
        (state,) = self.boundary.enter(lambda: (hidden.new_zeros(ROWS, WIDTH),), like)
        slept = Sleep.apply(hidden + state[:, None], *self.seconds)
        mixed = torch.tanh(self.proj(slept))
        return hidden + self.boundary.leave(mixed, (mixed[:, -1],))


class SleepingModel(nn.Module):
    _no_split_modules = ("SleepingBlock",)

    def __init__(self, layers, seconds):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(SleepingBlock(*seconds) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, use_cache):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))


def step_seconds(layers, seconds, micro_batches, interleaved, steps):
    """Median time of a step on this rank, the first two left out."""
    train = TrainSection(
        steps=steps,
        global_batch_size=micro_batches,
        learning_rate=1e-3,
        precision="fp32",
    )
    mesh = Mesh(sequence=devices.ranks())
    parallel = Parallel(mesh, devices.rank())
    torch.manual_seed(0)
    model = SleepingModel(layers, seconds)
    for index, block in enumerate(model.layers):
        block.boundary = SpanBoundary(
            f"layers.{index}", parallel.groups, parallel.links, parallel.replay
        )
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = ZeroEngine(model, adam, train, parallel, torch.device("cpu"))
    engine.train()
    order = wavefront.order(
        parallel.groups.sequence_rank, mesh.sequence, micro_batches, interleaved=interleaved
    )
    tokens = torch.randint(VOCABULARY, (ROWS, SPAN * mesh.sequence))
    taken = []
    for _ in range(steps):
        started = time.perf_counter()
        losses = {}
        for kind, number in order:
            if kind == "forward":
                logits = engine.forward(parallel.span(tokens), number)
                losses[number] = logits.square().mean()
            else:
                engine.backward(losses.pop(number), number)
        engine.step(1e-3)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def measure(layers, forward_seconds, backward_seconds, micro_batches, steps):
    """Rows of the table; t is measured at one rank by the same code."""
    seconds = forward_seconds, backward_seconds
    alone = max(run_ranks(step_seconds, 1, layers, seconds, 1, False, steps, timeout=600))
    rows = []
    for ranks in (1, 2, 4):
        for batches, interleaved in ((1, False), (micro_batches, False), (micro_batches, True)):
            found = run_ranks(
                step_seconds, ranks, layers, seconds, batches, interleaved, steps, timeout=600
            )
            t = alone / layers
            ideal = batches * (layers + ranks - 1) * t
            if interleaved:
                ideal = (batches * layers + ranks - 1) * t
            rows.append(
                {
                    "sequence_ranks": ranks,
                    "micro_batches": batches,
                    "interleaved": interleaved,
                    "milliseconds": 1000 * max(found),
                    "ideal": 1000 * ideal,
                    "ratio": max(found) / ideal,
                    "lock_step": 1000 * batches * layers * ranks * t,
                }
            )
            print(line(rows[-1]), flush=True)
    return alone / layers, rows


HEAD = "ranks  micro-batches  interleaved   measured      ideal  ratio  lock-step (ms)"


def line(row):
    return (
        f"{row['sequence_ranks']:5}  {row['micro_batches']:13}  {row['interleaved']!s:>11}  "
        f"{row['milliseconds']:9.0f}  {row['ideal']:9.0f}  {row['ratio']:5.2f}  "
        f"{row['lock_step']:9.0f}"
    )


def plot(rows, path):
    import matplotlib.pyplot as plt

    names = [
        f"{row['sequence_ranks']} ranks, {row['micro_batches']} micro-batch"
        + ("es" if row["micro_batches"] > 1 else "")
        + (", interleaved" if row["interleaved"] else "")
        for row in rows
    ]
    places = range(len(rows))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for offset, key, label in (
        (-0.27, "milliseconds", "measured"),
        (0, "ideal", "wavefront's formula"),
        (0.27, "lock_step", "lock-step"),
    ):
        axes.barh([p + offset for p in places], [row[key] for row in rows], 0.25, label=label)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, layers that sleep")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--forward-ms", type=float, default=20)
    parser.add_argument("--backward-ms", type=float, default=40)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--check", type=float, help="fail if a row exceeds its formula by more")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    options = parser.parse_args()
    print(HEAD)
    t, rows = measure(
        options.layers,
        options.forward_ms / 1000,
        options.backward_ms / 1000,
        options.micro_batches,
        options.steps,
    )
    print(f"t = {1000 * t:.1f} ms a layer, measured on one rank")
    if options.json:
        options.json.write_text(json.dumps({"milliseconds_a_layer": 1000 * t, "rows": rows}))
    if options.plot:
        plot(rows, options.plot)
    if options.check and max(row["ratio"] for row in rows) > options.check:
        sys.exit(f"a step takes more than {options.check} times what the formula says")


if __name__ == "__main__":
    main()
