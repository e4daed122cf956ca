"""A run's directory with one checkpoint of a tiny model, as the trainer leaves it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizer_models import train

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.save import save
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel.shards import FlatShard

VOCABULARY = 512
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
VARIANTS = {
    "lmm": {"memory_depth": 1, "chunk_size": 4, "num_persistent_tokens": 2},
    "mac": {"chunk_size": 4, "segment_length": 8, "num_persistent_tokens": 2},
    "mag": {"chunk_size": 4, "window_size": 8, "num_persistent_tokens": 2},
    "mal": {"chunk_size": 4, "window_size": 8, "num_persistent_tokens": 2},
    "transformer": {},
}


def make_model(variant: str = "mac", **fields: Any) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(
        TitansConfig(variant=variant, **(MODEL | VARIANTS[variant] | fields))
    ).eval()


def make_run(directory: Path, variant: str = "mac", *, step: int = 30, **fields: Any) -> Path:
    """The run's directory; its model is ``make_model`` with the same arguments."""
    model = make_model(variant, **fields)
    sections = {
        "model": MODEL | VARIANTS[variant] | fields | {"variant": variant},
        "data": {"manifest": "/secret/place/manifest.json", "sequence_length": 16},
        "train": {"steps": 40, "global_batch_size": 2, "learning_rate": 0.001},
        "run": {"directory": str(directory), "name": f"tiny-{variant}"},
    }
    config = run_config.resolve(sections, source="test")
    shards = [
        FlatShard(f"{kind}/{name}", tuple(p.shape), 0, p.numel(), p.detach().reshape(-1))
        for kind in ("parameters", "exp_avg")
        for name, p in model.named_parameters()
    ]
    save(
        directory / "checkpoints",
        step,
        shards,
        state={
            "step": step,
            "fingerprint": "f" * 64,
            "versions": {"torch": str(torch.__version__)},
        },
        files={"config.yaml": run_config.dump(config).encode(), "tokenizer.model": train()},
        keep=3,
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(sections))
    rows = [
        {"step": 29, "loss": 5.5, "tokens": 928},
        {"step": step, "loss": 5.25, "tokens": 960},
        {"step": step, "validation_loss": 5.75},
        {"step": 31, "loss": 1.0, "tokens": 992},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
