"""Peak memory of exporting checkpoints of random weights: the command and its clean process.

Run ``python tests/benchmarks/export_memory.py``; ``--model titans-mac-7b --check 8`` needs 45 GB of
disk, with ``--layers 3`` 5 GB; as one block at a time has weights, their number does not matter.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

import tokenizer_models  # noqa: E402

from titans_pretrain import config as run_config  # noqa: E402
from titans_pretrain.checkpoint import format as layout  # noqa: E402
from titans_pretrain.checkpoint import publish, tensor_file  # noqa: E402
from titans_pretrain.checkpoint.storage import box_key  # noqa: E402
from titans_pretrain.parallel.construct import skeleton  # noqa: E402

GIB, PREFIX = 2**30, "parameters/"
MEASURED = """
import json, resource, sys
from titans_pretrain import cli
code = cli.main(sys.argv[1:])
whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print(json.dumps([resource.getrusage(who).ru_maxrss for who in whose]))
sys.exit(code)
"""


def write_checkpoint(run, model, layers):
    """A checkpoint of random float32 weights, one tensor in memory at a time; its parameters."""
    sections = {
        "model": {"preset": model} | ({"num_hidden_layers": layers} if layers else {}),
        "data": {"manifest": "/nowhere", "sequence_length": 4096},
        "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1e-3},
        "run": {"directory": str(run)},
    }
    config = run_config.resolve(sections, source="benchmark")
    shapes = {name: tuple(p.shape) for name, p in skeleton(config.model).named_parameters()}
    place = publish.Place(run / "checkpoints", 1)
    files = {
        "config.yaml": run_config.dump(config).encode(),
        "tokenizer.model": tokenizer_models.train(),
    }
    plain = publish.prepare(place, {"step": 1}, files)
    file, entries, tensors = "rank-00000.safetensors", [], {}
    for name, shape in shapes.items():
        offsets = [0] * len(shape)
        key = box_key(PREFIX + name, offsets)
        entries.append(tensor_file.Entry(key, torch.float32, shape))
        boxes = [[0, *offsets, *shape]]
        tensors[PREFIX + name] = {"dtype": "F32", "shape": list(shape), "boxes": boxes}
    written = tensor_file.write(place.temporary / file, entries, map(random_weights, entries))
    index = {"format": layout.FORMAT, "files": [file], "tensors": tensors}
    publish.publish(place, index, [written], plain, keep=1, keep_every=0)
    return sum(entry.bytes for entry in entries) // 4


def random_weights(entry):
    """Norms near 1, the rest as at the start of training; always the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(entry.key.encode()))
    drawn = torch.empty(entry.shape).normal_(std=0.02, generator=generator)
    return drawn + 1 if "norm" in entry.key else drawn


def measure(model, layers, dtype, directory):
    """Parameters, seconds, and GiB at the peak of the command and of its clean process."""
    with tempfile.TemporaryDirectory(dir=directory) as room:
        run, out = Path(room) / "run", Path(room) / "exported"
        parameters = write_checkpoint(run, model, layers)
        command = ["export", str(run / "checkpoints" / "step-1"), str(out), "--dtype", dtype]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
        peaks = json.loads(done.stdout.splitlines()[-1])
        return parameters, seconds, *(peak * 1024 / GIB for peak in peaks)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["titans-mac-1.3b"])
    parser.add_argument("--layers", type=int, default=0, help="blocks; 0: all of the preset's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--directory", type=Path, help="for the checkpoint and the export")
    parser.add_argument("--check", type=float, metavar="GIB", help="fail above that sum of peaks")
    options = parser.parse_args()
    print("| model | parameters | seconds | command (GiB) | clean process (GiB) | sum |")
    print("|---|---|---|---|---|---|")
    failed = False
    for model in options.model:
        parameters, seconds, ours, theirs = measure(
            model, options.layers, options.dtype, options.directory
        )
        both = ours + theirs
        numbers = f"{seconds:.0f} | {ours:.2f} | {theirs:.2f} | {both:.2f}"
        print(f"| {model} | {parameters:,} | {numbers} |", flush=True)
        failed |= options.check is not None and both > options.check
    sys.exit(failed)


if __name__ == "__main__":
    main()
