import json
import os
import subprocess
from pathlib import Path

import clean_environment
import torch
from safetensors.torch import load_file
from tiny_run import VARIANTS, make_model, make_run

from titans_pretrain.export import huggingface

SCRIPT = Path(__file__).with_name("clean_script.py")


def test_torch_and_transformers_alone_give_the_bits_of_every_variant(tmp_path, unproven):
    python = clean_environment.make(tmp_path / "venv")
    models = [tmp_path / variant for variant in VARIANTS]
    for model in models:
        huggingface.export(make_run(tmp_path / "runs" / model.name, model.name), model)
    done = subprocess.run(
        [python, "-I", SCRIPT, tmp_path, str(torch.get_num_threads()), *models],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for variant, report in zip(VARIANTS, reports, strict=True):
        assert report["importable"] == []
        assert len(set(report["lengths"])) > 2
        assert report["padded on the left"], variant
        assert report["cache changes nothing"], variant
        assert report["batch equals one by one"], variant
        results = load_file(tmp_path / f"{variant}.safetensors")
        with torch.no_grad():
            wanted = make_model(variant)(results["ids"], use_cache=False).logits
        assert torch.equal(results["logits"], wanted), variant
