"""Load an exported model as a stranger would. Run by its path in a process of its own.

It imports nothing of the project, and its caller sees to it that nothing of the project can be
found. The one argument is a JSON file: ``path`` (where packages lie), ``model``, ``ids`` and
``logits`` (safetensors in and out), ``texts``, ``threads``. The report goes to standard output.
"""

import json
import sys
from pathlib import Path


def main(request_path: str) -> None:
    """Compute logits and token ids from the directory ``model`` alone."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    sys.path.extend(request["path"])

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    model, loading = AutoModelForCausalLM.from_pretrained(
        request["model"],
        trust_remote_code=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # kernels round differently on unaligned memory
    with torch.no_grad():
        logits = model.eval()(load_file(request["ids"])["ids"], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, request["logits"])

    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=True)
    report = {
        "missing": sorted(map(str, loading["missing_keys"])),
        "unexpected": sorted(map(str, loading["unexpected_keys"])),
        "mismatched": sorted(map(str, loading["mismatched_keys"])),
        "project": sorted(name for name in sys.modules if name.startswith(request["project"])),
        "token_ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
