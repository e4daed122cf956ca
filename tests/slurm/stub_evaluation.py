"""`titans eval-checkpoint` without a model; `evaluation-plays.json` names what each step plays."""

import os
from pathlib import Path

from titans_pretrain.checkpoint import evaluations
from titans_pretrain.files import read_json


def evaluate(checkpoint: Path) -> int:
    run, step = checkpoint.parent.parent, int(checkpoint.name.removeprefix("step-"))
    identity = evaluations.identity(checkpoint)
    with open(run / "evaluated", "a") as handle:
        handle.write(f"{step}\n")
    play = (read_json(run / "evaluation-plays.json") or {}).get(str(step), "score")
    if play == "crash once" and len(evaluations.jobs(run, step)) < 2:
        return 1
    told = {"settings": {"job": os.environ["SLURM_JOB_NAME"]}, "results": {}}
    evaluations.write(run, step, identity, metrics={"heldout/loss": 1 / step}, **told)
    return 0
