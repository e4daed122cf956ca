"""What a token costs after 1K and after 100K others, and what a text of 1M tokens needs of memory.

Run ``python tests/benchmarks/decoding.py``. The two positions take turns, so that other load meets
both. Every text is read by ``titans memorize`` in a process of its own, whose resident set at its
peak is what counts, interpreter and libraries included.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
POSITIONS = (1_000, 100_000)
LENGTHS = (4_096, 65_536, 1_000_000)
TOLERANCE = 0.1
MODEL = {"chunk_size": 64, "num_persistent_tokens": 4}
SIZES = {"mac": {"segment_length": 128}, "mag": {"window_size": 128}, "mal": {"window_size": 128}}


def export(variant, directory):
    """A tiny model as ``titans export`` writes it."""
    from tiny_run import make_run

    from titans_pretrain.export import huggingface

    run = make_run(directory / "run", variant, **MODEL, **SIZES.get(variant, {}))
    huggingface.export(run, directory / "model")
    return directory / "model"


def cost(model, pairs=15, tokens=32):
    """Milliseconds a token at both positions, and the median ratio of turns side by side."""
    import torch

    from titans_pretrain.inference import generate
    from titans_pretrain.inference.prefill import new_cache, prefill

    network, _ = generate.load(model)
    first = torch.tensor([[7]])
    caches = []
    with torch.inference_mode():
        for position in POSITIONS:
            cache = new_cache(network)
            ids = torch.randint(3, 500, (1, position), generator=torch.Generator().manual_seed(0))
            prefill(network, ids, cache)
            cache.count_anew()
            caches.append(cache)
        seconds = [[], []]
        for turn in range(pairs + 1):
            order = (0, 1) if turn % 2 else (1, 0)
            for which in order:
                cache = copy.deepcopy(caches[which])
                begun = time.perf_counter()
                network.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    past_key_values=cache,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    do_sample=False,
                )
                seconds[which].append((time.perf_counter() - begun) / tokens)
    near, far = (values[1:] for values in seconds)  # the first turn warms up
    return {
        "positions": POSITIONS,
        "milliseconds": [statistics.median(values) * 1e3 for values in (near, far)],
        "ratio": statistics.median(b / a for a, b in zip(near, far, strict=True)),
    }


def write_text(model, path, tokens):
    """About so many tokens of made-up English."""
    from tokenizer_models import corpus
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    lines = [(line + "\n", len(tokenizer(line + "\n")["input_ids"]) - 1) for line in corpus()]
    with open(path, "w") as handle:
        for line, count in cycle(lines):
            tokens -= count
            if tokens < 0:
                return
            handle.write(line)


def stream(model, lengths):
    """One row a length: tokens, peak resident bytes, tokens a second."""
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as temporary:
            text = Path(temporary) / "text"
            write_text(model, text, length)
            arguments = [sys.executable, __file__, "--read", str(model), str(text)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def read(model, text):
    """Read a text into a memory; called in a process of its own."""
    from titans_pretrain.inference.memorize import memorize

    begun = time.perf_counter()
    memory = memorize(model, text, text.with_name("memory"), device="cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = memory.tokens / (time.perf_counter() - begun)
    size = text.with_name("memory").stat().st_size
    row = {"tokens": memory.tokens, "peak_bytes": peak, "tokens_per_second": rate, "file": size}
    print(json.dumps(row))


def measure(variant, lengths=LENGTHS):
    """Both measurements of a variant."""
    with tempfile.TemporaryDirectory() as temporary:
        model = export(variant, Path(temporary))
        return {"variant": variant, "cost": cost(model), "streams": stream(model, lengths)}


def show(found):
    """Print the tables."""
    one = found["cost"]
    print(f"{found['variant']}: milliseconds a token, median of turns side by side")
    for position, milliseconds in zip(one["positions"], one["milliseconds"], strict=True):
        print(f"  after {position:>9,} tokens  {milliseconds:7.3f}")
    print(f"  ratio {one['ratio']:.3f}")
    print("  tokens read  peak MB  of the first  tokens/s  memory file MB")
    first = found["streams"][0]["peak_bytes"]
    for row in found["streams"]:
        peak = row["peak_bytes"]
        print(
            f"  {row['tokens']:11,}  {peak / 1e6:7.0f}  {peak / first:12.3f}"
            f"  {row['tokens_per_second']:8,.0f}  {row['file'] / 1e6:14.3f}"
        )


def failures(found):
    """What is not flat."""
    ratio, streams = found["cost"]["ratio"], found["streams"]
    worst = max(row["peak_bytes"] for row in streams) / streams[0]["peak_bytes"]
    told = []
    if ratio > 1 + TOLERANCE:
        told.append(f"{found['variant']}: a token costs {ratio:.3f} times as much")
    if worst > 1 + TOLERANCE:
        told.append(f"{found['variant']}: memory grows to {worst:.3f} times")
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", nargs="+", default=["lmm", "mac"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--check", action="store_true", help="fail if either grows by a tenth")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--read", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(*options.read)
        return
    found = []
    for variant in options.variant:
        found.append(measure(variant, options.lengths))
        show(found[-1])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.check and (told := [problem for one in found for problem in failures(one)]):
        raise SystemExit("; ".join(told))


if __name__ == "__main__":
    main()
