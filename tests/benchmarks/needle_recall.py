"""How far tiny models recall a needle beyond the length they were trained on, memory or no memory.

Run ``python tests/benchmarks/needle_recall.py``: it makes samples and a tokenizer, trains the
models of configs/needle with ``titans train`` (128 tokens, then 256), exports them, scores them
with ``titans eval``, prints what they recall and draws it. What is there already is taken; the same
command goes on.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = {  # tokens of a sequence: what differs from the configuration
    128: [],
    256: [
        "data.sequence_length=256",
        "train.steps=200",
        "train.learning_rate=3e-3",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ],
}
DOCUMENTS = {128: 16_000, 256: 12_000}
TRAINED = max(PARTS)
VOCABULARY = 1024
ANSWER = 128  # tokens that RULER leaves for the answer
NAMES = {"lmm": "LMM", "window": "window of 32, no memory", "mac": "MAC"}
FAR = 8  # times the training length beyond which fewer needles are asked
FEW = 20


def titans(*words):
    """Run a command of the project and tell what it took."""
    command = [sys.executable, "-m", "titans_pretrain.cli", *map(str, words)]
    print("titans", *words, flush=True)
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.monotonic() - begun:.0f} s, {busy:.0f} s of a core", flush=True)


def make_data(place):
    """A tokenizer of the samples' own words, and samples, prepared."""
    text, tokenizer = place / "words.jsonl", place / "tokenizer.model"
    if not tokenizer.exists():
        titans("data", "needle", "--haystack", 2, "--samples", 3000, "--output", text)
        source = ["--input", text, "--text-column", "prompt", "--vocab-size", VOCABULARY]
        titans("data", "tokenizer", *source, "--output", tokenizer)
    columns = ["--prompt-column", "prompt", "--text-column", "answer"]
    common = ["--tokenizer", tokenizer, "--output"]
    for length, samples in DOCUMENTS.items():
        rows, data = place / f"{length}.jsonl", place / f"samples-{length}"
        if not rows.exists():
            titans("data", "needle", "--length", length, "--samples", samples, *common, rows)
        if not (data / "manifest.json").exists():
            titans("data", "prepare", "--input", rows, *columns, *common, data)


def make_model(name, place, overrides):
    """Train a model on short samples, then on longer ones, and export it."""
    config, initial = ROOT / f"configs/needle/{name}.yaml", []
    for length, changes in PARTS.items():
        run, model = place / f"{name}-{length}", place / f"{name}-{length}-model"
        if not model.exists():
            data = place / f"samples-{length}/manifest.json"
            values = [f"data.manifest={data}", f"run.directory={run}", *changes, *overrides]
            resume = ["--resume"] if run.exists() else []
            titans("train", config, *values, "--ranks", 1, *initial, *resume)
            titans("export", run, model)
        initial = ["--init-from", model]
    return model


def recall(model, place, multiples, samples):
    """The share of needles found in prompts of 1, 2, 4 … times the training length."""
    sizes = {at: samples if at <= FAR else min(FEW, samples) for at in multiples}
    out = place / f"{model.name}-needles"
    for count in sorted(set(sizes.values()), reverse=True):
        some = [at * TRAINED + ANSWER for at in multiples if sizes[at] == count]
        lengths = ",".join(map(str, some))
        options = ["--tasks", "niah_pk", "--lengths", lengths, "--samples", count, "--batch", 10]
        titans("eval", model, out, *options)
    rows = json.loads((out / "report.json").read_text())["results"]
    found = {int(row["cell"]): row["result"]["accuracy"] for row in rows}
    return {at: found[at * TRAINED + ANSWER] for at in multiples}


def draw(curves, path):
    """Recall against the length, in multiples of the training length."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, curve in curves.items():
        points = [100 * share for share in curve.values()]
        axes.plot(list(curve), points, "o-", label=NAMES[name])
    axes.set(xlabel=f"prompt, times the training length of {TRAINED} tokens", ylabel="recalled (%)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({at for curve in curves.values() for at in curve}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="section.key=value of every training")
    parser.add_argument("--directory", type=Path, default=ROOT / "build/needle")
    parser.add_argument("--models", default="lmm,window")
    parser.add_argument("--multiples", default="1,2,4", help="of the training length")
    parser.add_argument(
        "--samples", type=int, default=100, help=f"of each, {FEW} beyond {FAR} times"
    )
    parser.add_argument("--figure", type=Path, help="where the curves are drawn")
    options = parser.parse_args()
    place = options.directory.resolve()
    place.mkdir(parents=True, exist_ok=True)
    multiples = [int(text) for text in options.multiples.split(",")]
    make_data(place)
    curves = {}
    for name in options.models.split(","):
        model = make_model(name, place, options.overrides)
        curves[name] = recall(model, place, multiples, options.samples)
        told = " ".join(f"{at}x {100 * share:.0f} %" for at, share in curves[name].items())
        print(name, told, flush=True)
    draw(curves, options.figure or place / "recall.png")


if __name__ == "__main__":
    main()
