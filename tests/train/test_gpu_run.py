"""A whole run on a GPU: ZeRO-3, bf16, NCCL, one rank; and on from its checkpoint."""

import shutil

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def losses(run):
    return {row["step"]: row["loss"] for row in run.rows() if "loss" in row}


def test_a_run_on_a_gpu_learns_saves_and_goes_on_from_its_checkpoint(make_run):
    run = make_run(
        train={"steps": 20, "precision": "bf16", "validation_every": 0},
        checkpoint={"every": 10},
    )
    code, _, complaints = run.train("--ranks", "1", timeout=280)
    assert code == 0, complaints
    straight = losses(run)
    assert straight[20] < straight[1]
    shutil.rmtree(run.directory / "checkpoints/step-20")
    code, _, complaints = run.train("--ranks", "1", "--resume", timeout=280)
    assert code == 0, complaints
    assert losses(run) == pytest.approx(straight, abs=1e-2)
