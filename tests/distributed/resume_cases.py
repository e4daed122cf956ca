"""Short runs that any mesh takes up: their data, their configuration, what their ranks read."""

import json
import shutil
from pathlib import Path

import torch
from ranks import run_ranks

from titans_pretrain import config
from titans_pretrain.checkpoint.format import newest_good
from titans_pretrain.checkpoint.load import read_tensors
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train.build import open_data
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.trainer import Trainer

CLOCK = ("seconds", "tokens_per_second", "flops_per_second", "mfu")


def sections(manifest, directory, variant, sizes=(1, 1, 1), *, steps, rows=8):
    """The sections of a run that fits every (tensor, data, sequence) of 8 ranks or fewer."""
    tensor, data, sequence = sizes
    model = {
        "variant": variant,
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if variant != "transformer":
        model |= {"memory_heads": 4, "memory_expansion": 2, "chunk_size": 8}
        model |= {"num_persistent_tokens": 2}
    model |= {
        "mac": {"segment_length": 8},
        "mag": {"window_size": 11},
        "mal": {"window_size": 11},
    }.get(variant, {})
    return {
        "model": model,
        "data": {"manifest": str(manifest), "sequence_length": 32, "validation_fraction": 0.05},
        "mesh": {"tensor": tensor, "sequence": sequence},
        "train": {
            "steps": steps,
            "global_batch_size": rows,
            "micro_batch_size": min(4, rows // data),
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "gradient_clip": 0.5,
            "precision": "fp32",
            "validation_every": 3,
            "validation_sequences": 5,
        },
        "checkpoint": {"every": 1, "keep": 99},
        "run": {"directory": str(directory)},
    }


def train(settings, resume):
    """Train in this rank; what its model read in each step: its place, and step -> tokens."""
    directory = RunDirectory(Path(settings.run.directory))
    devices.from_first(directory.create)
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    trainer = Trainer(
        settings,
        Parallel(grid, devices.rank()),
        torch.device("cpu"),
        open_data(settings),
        directory,
        StopRequest(),
        lambda sentence: None,
    )
    if resume:
        trainer.restore(devices.from_first(lambda: newest_good(directory.checkpoints)[0]))
    seen = {}
    forward = trainer._engine.forward

    def watched(tokens, micro_batch=0, document_starts=None):
        if torch.is_grad_enabled():
            seen.setdefault(trainer._step + 1, []).append((micro_batch, tokens.clone()))
        return forward(tokens, micro_batch, document_starts)

    trainer._engine.forward = watched
    trainer.run()
    devices.gather_objects(None)
    read = {}
    for step, parts in seen.items():
        assert [number for number, _ in parts] == list(range(len(parts)))
        read[step] = torch.cat([tokens for _, tokens in parts])
    return grid.coordinates(devices.rank()), read


class Steps:
    """A run on one mesh after another.

    Args:
        manifest: of the data.
        directory: the run's.
        variant: the model's.
        steps: of the whole run.
    """

    def __init__(self, manifest, directory, variant, steps):
        self._manifest, self.directory, self._variant = manifest, directory, variant
        self._steps = steps

    def configuration(self, sizes):
        """The run on a mesh."""
        parts = sections(self._manifest, self.directory, self._variant, sizes, steps=self._steps)
        return config.resolve(parts, source="test")

    def train(self, sizes, *, resume=False, timeout=90):
        """Train to the end on a mesh; step -> (sequences, length), all that the model read."""
        count, settings = sizes[0] * sizes[1] * sizes[2], self.configuration(sizes)
        return together(run_ranks(train, count, settings, resume, timeout=timeout), sizes)

    def copied_at(self, step, directory):
        """This run as it was left if it died right after saving ``step``."""
        shutil.copytree(self.directory, directory)
        copy = Steps(self._manifest, directory, self._variant, self._steps)
        copy.forget_after(step)
        return copy

    def forget_after(self, step):
        """Remove later checkpoints and rows, so that whatever is there was made again."""
        for path in (self.directory / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        metrics = self.directory / "metrics.jsonl"
        rows = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))

    def rows(self):
        """The rows of metrics.jsonl without what depends on the clock."""
        return timeless_rows(self.directory)

    def tensors(self, step):
        """Every tensor of a checkpoint."""
        return tensors(self.directory, step)


def timeless_rows(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def tensors(directory, step):
    return dict(read_tensors(directory / "checkpoints" / f"step-{step}", ""))


def together(ranks, sizes):
    """What the whole mesh read in each step, from what each rank did.

    Tensor ranks read the same, data ranks sequences that follow each other, sequence ranks spans.
    """
    place = dict(ranks)
    _, data, sequence = (range(size) for size in sizes)
    for t, d, s in place:
        for step, tokens in place[0, d, s].items():
            assert torch.equal(place[t, d, s][step], tokens)
    return {
        step: torch.cat([torch.cat([place[0, d, s][step] for s in sequence], 1) for d in data])
        for step in place[0, 0, 0]
    }
