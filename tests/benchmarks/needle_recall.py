"""How far tiny models recall a needle beyond the length they were trained on, memory or no memory.

Run ``python tests/benchmarks/needle_recall.py``: it makes samples and a tokenizer, trains the
models of configs/needle with ``titans train``, exports them, scores them with ``titans eval``,
prints what they recall and draws it. ``--ablations`` does it for LMMs that differ in one thing
each. What is there already is taken; the same command goes on.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1024
ANSWER = 128  # tokens that RULER leaves for the answer
FAR = 16  # times the training length beyond which fewer needles are asked
FEW = 40


@dataclass(frozen=True)
class Samples:
    """Documents to train on, all of one length: RULER's prompts, or bare ones."""

    length: int
    bare: bool = False
    count: int = 12_000

    @property
    def name(self):
        return f"bare-{self.length}" if self.bare else f"samples-{self.length}"


@dataclass(frozen=True)
class Part:
    """A training: on which samples, so many in a sequence, and what else it changes."""

    samples: Samples
    in_a_row: int = 1
    changes: tuple[str, ...] = ()


TRAINED = 256  # tokens of a document: the training length
SHORT = Part(Samples(64, bare=True))
LONG = Part(
    Samples(TRAINED),
    changes=(
        "train.steps=500",
        "train.min_learning_rate_ratio=0.1",
        "train.warmup_steps=20",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ),
)
ANYWHERE = Part(  # 249 is no multiple of a segment: documents begin, and answers end, in its midst
    Samples(249, count=4000),
    in_a_row=4,
    changes=(
        "model.remember_across_documents=false",
        "model.attend_across_documents=false",
        "train.steps=120",
        "train.learning_rate=2e-3",
        "train.min_learning_rate_ratio=0.1",
        "train.warmup_steps=10",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
    ),
)


@dataclass(frozen=True)
class Trial:
    """A model to train.

    Attributes:
        config: of configs/needle.
        label: in the figure.
        changes: to the configuration, in all parts.
        parts: each begins with the last's export.
    """

    config: str
    label: str
    changes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = (SHORT, LONG)


MODELS = {
    "lmm": Trial("lmm", "LMM"),
    "mac": Trial("mac", "MAC", parts=(SHORT, LONG, ANYWHERE)),
    "window": Trial("window", "window of 32, no memory"),
}
ONLY_LONG = replace(LONG, changes=("train.steps=950", *LONG.changes[1:]))
ABLATIONS = {
    "lmm": MODELS["lmm"],
    "chunk-8": Trial("lmm", "chunks of 8", ("model.chunk_size=8",)),
    "chunk-32": Trial("lmm", "chunks of 32", ("model.chunk_size=32",)),
    "chunk-64": Trial("lmm", "chunks of 64", ("model.chunk_size=64",)),
    "forget-more": Trial("lmm", "forget bias -2.2", ("model.forget_bias=-2.2",)),
    "forget-less": Trial("lmm", "forget bias -7", ("model.forget_bias=-7",)),
    "only-short": Trial("lmm", "64 tokens alone", parts=(SHORT,)),
    "only-long": Trial("lmm", "256 tokens alone", parts=(ONLY_LONG,)),
    "conv-4": Trial("lmm", "convolution of 4", ("model.conv_width=4",)),
    "mac-two-parts": Trial("mac", "MAC without its third part"),
}


def titans(*words):
    """Run a command of the project and tell what it took."""
    command = [sys.executable, "-m", "titans_pretrain.cli", *map(str, words)]
    print("titans", *words, flush=True)
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.monotonic() - begun:.0f} s, {busy:.0f} s of a core", flush=True)


def make_data(place, parts):
    """A tokenizer of the samples' own words, and the parts' samples, prepared."""
    text, tokenizer = place / "words.jsonl", place / "tokenizer.model"
    if not tokenizer.exists():
        titans("data", "needle", "--haystack", 2, "--samples", 3000, "--output", text)
        source = ["--input", text, "--text-column", "prompt", "--vocab-size", VOCABULARY]
        titans("data", "tokenizer", *source, "--output", tokenizer)
    columns = ["--prompt-column", "prompt", "--text-column", "answer"]
    common = ["--tokenizer", tokenizer, "--output"]
    for some in (part.samples for part in parts):
        rows, data = place / f"{some.name}.jsonl", place / some.name
        size = ["--length", some.length, "--samples", some.count, *["--bare"] * some.bare]
        if not rows.exists():
            titans("data", "needle", *size, *common, rows)
        if not (data / "manifest.json").exists():
            titans("data", "prepare", "--input", rows, *columns, *common, data)


def make_model(name, trial, place, seed):
    """Train a model part by part, and export it."""
    name, seeds = f"{name}-seed-{seed}", (f"train.seed={seed}", f"data.seed={seed}")
    config, initial = ROOT / f"configs/needle/{trial.config}.yaml", []
    for part in trial.parts:
        some = part.samples
        run, model = place / f"{name}-{some.length}", place / f"{name}-{some.length}-model"
        if not model.exists():
            data = f"data.manifest={place / some.name / 'manifest.json'}"
            length = f"data.sequence_length={some.length * part.in_a_row}"
            resume = ["--resume"] if run.exists() else []
            options = [*part.changes, *trial.changes, *seeds, "--ranks", 1, *initial, *resume]
            titans("train", config, data, length, f"run.directory={run}", *options)
            titans("export", run, model)
        initial = ["--init-from", model]
    return model


def recall(model, trained, multiples, samples):
    """The share of needles found in prompts of 1, 2, 4 … times the training length."""
    sizes = {at: samples if at <= FAR else min(FEW, samples) for at in multiples}
    out = model.with_name(f"{model.name}-needles")
    for count in sorted(set(sizes.values()), reverse=True):
        some = [at * trained + ANSWER for at in multiples if sizes[at] == count]
        lengths = ",".join(map(str, some))
        options = ["--tasks", "niah_pk", "--lengths", lengths, "--samples", count, "--batch", 10]
        titans("eval", model, out, *options)
    rows = json.loads((out / "report.json").read_text())["results"]
    found = {  # beside the asked ones lie those of other numbers of samples
        (int(row["cell"]), row["identity"]["samples"]): row["result"]["accuracy"] for row in rows
    }
    return {at: found[at * trained + ANSWER, sizes[at]] for at in multiples}


def draw(curves, path):
    """Recall against the length, in multiples of the training length."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for label, curve in curves.items():
        points = [100 * share for share in curve.values()]
        axes.plot(list(curve), points, "o-", label=label)
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
    parser.add_argument("--directory", type=Path, default=ROOT / "build/needle")
    parser.add_argument("--ablations", action="store_true", help="LMMs that differ in one thing")
    parser.add_argument("--trials", help="some of them, a,b,c")
    parser.add_argument("--multiples", default="1,2,4,8,16,32,64,128,256", help="of the length")
    parser.add_argument(
        "--samples", type=int, default=100, help=f"of each, {FEW} beyond {FAR} times (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    parser.add_argument("--figure", type=Path, help="where the curves are drawn")
    parser.add_argument("--json", type=Path, help="where the shares are written")
    options = parser.parse_args()
    trials = ABLATIONS if options.ablations else MODELS
    chosen = options.trials.split(",") if options.trials else list(trials)
    if unknown := set(chosen) - set(trials):
        parser.error(f"--trials {','.join(unknown)}: there are {', '.join(trials)}")
    place = options.directory.resolve()
    place.mkdir(parents=True, exist_ok=True)
    multiples = [int(text) for text in options.multiples.split(",")]
    curves = {}
    for name in chosen:
        trial, label = trials[name], trials[name].label
        make_data(place, trial.parts)
        model = make_model(name, trial, place, options.seed)
        curves[label] = recall(model, TRAINED, multiples, options.samples)
        told = " ".join(f"{at}x {100 * share:.0f} %" for at, share in curves[label].items())
        print(f"{label}: {told}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, options.figure or place / "recall.png")


if __name__ == "__main__":
    main()
