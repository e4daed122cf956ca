"""The planned bytes of a step are, within a tenth, those of tensors alive in a real one on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titans_pretrain import config
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import memory

TOLERANCE = 0.1
FIELDS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
}
OWN = {
    "lmm": {"chunk_size": 32},
    "mac": {"chunk_size": 32, "segment_length": 64},
    "mag": {"chunk_size": 32, "window_size": 96},
    "mal": {"chunk_size": 32, "window_size": 96},
    "transformer": {},
}


def run(variant, *, length, rows=1, precision="fp32", again=False, **changes):
    """A run of one micro-batch a step; ``again`` recomputes blocks in backward."""
    return {
        "model": {"variant": variant, **FIELDS, **OWN[variant], **changes},
        "data": {"manifest": "x", "sequence_length": length},
        "train": {
            "steps": 1,
            "global_batch_size": rows,
            "micro_batch_size": rows,
            "learning_rate": 1,
            "precision": precision,
            "activation_checkpointing": again,
        },
        "run": {"directory": "x"},
    }


QUICK = {
    "lmm in bf16, everything kept": run("lmm", length=256, precision="bf16"),
    "mac, recomputed": run("mac", length=128, rows=2, again=True),
    "mag in bf16, recomputed": run("mag", length=256, precision="bf16", again=True),
    "logits of many pieces": run("transformer", length=256, vocab_size=8192, again=True),
}
SLOW = {
    f"{variant} in {precision}, {length} tokens{', recomputed' * again}": run(
        variant, length=length, rows=2, precision=precision, again=again
    )
    for variant in OWN
    for precision, length in (("fp32", 256), ("bf16", 1024))
    for again in (False, True)
} | {
    "chunks as long as a stretch": run("mag", length=1024, again=True, chunk_size=256),
    "chunks longer than a stretch": run("mag", length=1024, again=True, chunk_size=512),
    "short chunks": run("lmm", length=512, rows=2, chunk_size=8),
    "a linear memory without convolutions": run(
        "lmm", length=768, rows=2, memory_depth=1, conv_width=0, num_persistent_tokens=0
    ),
    "a deep memory without a bound on surprise": run(
        "mal", length=768, again=True, memory_depth=3, memory_expansion=2, surprise_clip=None
    ),
    "another shape": run(
        "mag",
        length=2048,
        rows=2,
        precision="bf16",
        again=True,
        hidden_size=128,
        memory_heads=2,
        window_size=512,
        chunk_size=64,
    ),
}


def measured(runs):
    """Bytes of each run's step, in one process."""
    script = Path(__file__).with_name("measured_step.py")
    answer = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(list(runs.values())),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    return dict(zip(runs, map(json.loads, lines), strict=True))


def compare(runs):
    """Each of the measured bytes with those planned."""
    found = {}
    for name, bytes_ in measured(runs).items():
        moments = memory.moments(config.resolve(runs[name], source="here"), Mesh())
        totals = {moment: terms.total for moment, terms in moments.items()}
        planned = {
            "resting": totals["update"] - moments["update"].update,
            "passes": max(totals["loss"], totals["backward"]),
            "update": totals["update"],
            "peak": max(totals.values()),
        }
        found[name] = {moment: planned[moment] / size for moment, size in bytes_.items()}
    wrong = {
        name: ratios
        for name, ratios in found.items()
        if any(abs(ratio - 1) > TOLERANCE for ratio in ratios.values())
    }
    assert found
    assert not wrong, json.dumps(wrong, indent=2)


def test_a_step_takes_what_is_planned():
    compare(QUICK)


@pytest.mark.slow
def test_steps_of_all_variants_and_shapes_take_what_is_planned():
    compare(SLOW)
