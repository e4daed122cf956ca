"""A run's directory with one checkpoint of a model that was never trained."""

from pathlib import Path

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.save import save
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.shards import FlatShard

SEED, STEP = 1, 30


def save_model(sections, directory: Path, tokenizer: Path) -> Path:
    """The directory of a run at STEP whose model has the initial weights of SEED."""
    config = run_config.resolve(sections, source="test")
    shards = [
        FlatShard(f"parameters/{name}", tuple(p.shape), 0, p.numel(), p.detach().reshape(-1))
        for name, p in construct(config.model, SEED).named_parameters()
    ]
    state = {"step": STEP, "fingerprint": "f" * 64}
    files = {
        "config.yaml": run_config.dump(config).encode(),
        "tokenizer.model": tokenizer.read_bytes(),
    }
    save(directory / "checkpoints", STEP, shards, state=state, files=files, keep=1)
    return directory
