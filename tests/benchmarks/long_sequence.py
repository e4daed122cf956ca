"""Peak memory and speed of a long sequence over 1, 2 and 4 ranks; no gradient is cut anywhere.

Run ``python tests/benchmarks/long_sequence.py``. Memory is a rank's resident set at its peak, less
what it held before its first step (interpreter, libraries, model).
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "distributed"))

from ranks import run_ranks  # noqa: E402

from titans_pretrain import config as run_config  # noqa: E402
from titans_pretrain.data.loader import Batch  # noqa: E402
from titans_pretrain.parallel import devices  # noqa: E402
from titans_pretrain.parallel.mesh import Mesh  # noqa: E402
from titans_pretrain.parallel.parallelize import Parallel  # noqa: E402
from titans_pretrain.train import build  # noqa: E402
from titans_pretrain.train.passes import Passes  # noqa: E402

VOCABULARY = 256
SHORT, LONG = 32_768, 131_072


def configuration(variant, length, sequence):
    """A tiny model: what a sequence needs is nearly all of its memory."""
    return run_config.resolve(
        {
            "model": {
                "variant": variant,
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "memory_heads": 2,
                "memory_expansion": 2,
                "chunk_size": 64,
                "num_persistent_tokens": 4,
            },
            "data": {"manifest": "/nowhere", "sequence_length": length},
            "mesh": {"sequence": sequence},
            "train": {
                "steps": 3,
                "global_batch_size": 1,
                "learning_rate": 1e-3,
                "precision": "fp32",
            },
            "run": {"directory": "/nowhere"},
        },
        source="benchmark",
    )


def train(config, steps):
    """Peak bytes a rank needs for steps, and tokens a second of the last one."""
    device, length = torch.device("cpu"), config.data.sequence_length
    parallel = Parallel(Mesh(sequence=config.mesh.sequence), devices.rank())
    engine = build.build_engine(config, parallel, device)
    passes = Passes(engine, parallel, config, device)
    before, seconds = _resident(), 0.0
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (1, length + 1), generator=generator)
        started = time.perf_counter()
        summed = passes.train(Batch(tokens, None), length)
        norm = engine.step(1e-3)
        seconds = time.perf_counter() - started
        total = devices.all_sum(torch.tensor(sum(summed), dtype=torch.float64)).item()
        losses.append((total / length, norm))
    return _peak() - before, length / seconds, losses


def _resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize()


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(variant, steps=2, cases=((SHORT, 1), (LONG, 1), (LONG, 2), (LONG, 4))):
    """One row a case: sequence length, ranks, largest peak, tokens a second, loss and norm."""
    rows = []
    for length, ranks in cases:
        found = run_ranks(train, ranks, configuration(variant, length, ranks), steps, timeout=1800)
        rows.append(
            {
                "variant": variant,
                "tokens": length,
                "sequence_ranks": ranks,
                "peak_bytes": max(peak for peak, *_ in found),
                "tokens_per_second": min(speed for _, speed, _ in found),
                "loss_and_norm": found[0][2][-1],
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="lmm")
    parser.add_argument(
        "--check", type=float, help="fail if the last row's peak exceeds the first's"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows = measure(options.variant)
    print(" tokens  ranks  peak MB a rank  of the first  tokens/s      loss  gradient norm")
    for row in rows:
        loss, norm = row["loss_and_norm"]
        print(
            f"{row['tokens']:7}  {row['sequence_ranks']:5}  {row['peak_bytes'] / 1e6:14.0f}  "
            f"{row['peak_bytes'] / rows[0]['peak_bytes']:12.2f}  {row['tokens_per_second']:8.0f}  "
            f"{loss:8.5f}  {norm:13.5f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows))
    if options.check and rows[-1]["peak_bytes"] > options.check * rows[0]["peak_bytes"]:
        sys.exit(f"the peak on {rows[-1]['sequence_ranks']} ranks exceeds {options.check} times")


if __name__ == "__main__":
    main()
