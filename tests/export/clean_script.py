"""What a user of exported models does; run in an environment without the project.

Arguments: directory for the logits, torch threads, model directories. One JSON object a model.
"""

import importlib.util
import json
import sys
from pathlib import Path

FOREIGN = ("titans_pretrain", "data_prep", "sentencepiece", "deepspeed", "datasets")
NEW = 12
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
TEXTS = ["Ba", "Hello ba be bi bo bu", "ke ki ko ku ka", "x" * 9]


def main(results: str, threads: str, *directories: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    for directory in directories:
        print(json.dumps(check(Path(directory), Path(results))))


def check(directory: Path, results: Path) -> dict[str, object]:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(model.config.vocab_size, (2, 21), generator=generator)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    save_file({"ids": ids, "logits": logits}, results / f"{directory.name}.safetensors")

    cached, uncached = (model.generate(ids, use_cache=use, **GREEDY) for use in (True, False))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, **GREEDY)[:, -NEW:]
    alone = [
        model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0, -NEW:] for text in TEXTS
    ]
    return {
        "importable": [name for name in FOREIGN if importlib.util.find_spec(name)],
        "cache changes nothing": torch.equal(cached, uncached),
        "padded on the left": bool((batch["attention_mask"][:, -1] == 1).all()),
        "lengths": batch["attention_mask"].sum(1).tolist(),
        "batch equals one by one": torch.equal(together, torch.stack(alone)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
