"""The README.md of an exported model. No torch here."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.config import RunConfig

NAME = "README.md"
UNKNOWN = "not recorded"
_MEMORY = "language model with a neural memory that goes on learning at test time (Titans"
_KINDS = {
    "lmm": f"A {_MEMORY}, memory alone)",
    "mac": f"A {_MEMORY}, memory as context)",
    "mag": f"A {_MEMORY}, memory as gate)",
    "mal": f"A {_MEMORY}, memory as layer)",
    "transformer": "The Transformer++ baseline of the Titans models",
}
# what decides the weights; the other sections tell of machines, accounts and people
_PUBLISHED = ("model", "data", "mesh", "train", "guard")
_LOCAL = {"data": {"manifest", "cache"}, "train": {"init_from"}}

_TEXT = """\
# {name}

{kind}, {parameters:,} parameters, pretrained with titans-pretrain {version}. A base model: not
tuned to follow instructions, and not evaluated here.

## Use

```python
{imports}

model = {model_class}.from_pretrained(PATH{trust})
tokenizer = PreTrainedTokenizerFast.from_pretrained(PATH)
inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
tokens = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

PATH is this directory. {needed} The tokenizer adds nothing to a text: documents
were separated by `{end}`, so an empty prompt begins with it. Batches are padded on the left with
`{pad}`. Text that literally holds `{end}` becomes that token.

## Training

{facts}

## Configuration

```yaml
{configuration}```
"""

_CUSTOM_CODE = "custom_code"  # the Hub's tag of models that need trust_remote_code
_OWN_CODE = f"{__package__.partition('.')[0]}."
_USE = {
    "imports": "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast",
    "model_class": "AutoModelForCausalLM",
    "trust": ", trust_remote_code=True",
    "needed": "Only torch and transformers are needed; `trust_remote_code` runs the Python\n"
    "files in it, and `AutoTokenizer` asks for it, too.",
}
_USE_OF_TRANSFORMERS = _USE | {"trust": "", "needed": "Only torch and transformers are needed."}


def write(
    checkpoint: Path, run: RunConfig, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> str:
    """The card of a checkpoint's model.

    Args:
        checkpoint: a ``step-N`` directory; its run's ``metrics.jsonl`` is read where it is there.
        run: the run's configuration.
        shapes: the model's parameters.
        dtype: of the exported weights.
    """
    from titans_pretrain.export import tokenizer

    pieces = (checkpoint / "tokenizer.model").read_bytes()
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": _tags(run),
    }
    body = _TEXT.format(
        name=run.run.name or Path(run.run.directory).name,
        kind=_kind(run),
        parameters=sum(map(prod, shapes.values())),
        version=version("titans-pretrain"),
        end=tokenizer.end_piece(pieces),
        pad=tokenizer.pad_piece(pieces),
        facts=_table(facts(checkpoint, run) | {"exported weights": dtype}),
        configuration=yaml.safe_dump(_public(run), sort_keys=False),
        **_use(run.model.get(foreign.KEY)),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{body}"


def _use(name: str | None) -> dict[str, str]:
    """How a model is loaded: of this project, or of a value of ``model.hf``."""
    if name is None or name in foreign.OWN or name.startswith(_OWN_CODE):
        return _USE
    return _use_of_package(name) if foreign.package(name) else _USE_OF_TRANSFORMERS


def _use_of_package(name: str) -> dict[str, str]:
    """How a model is loaded whose class is that of an installed package: ``module:Class``."""
    module, _, model_class = name.partition(":")
    imports = (
        f"from transformers import PreTrainedTokenizerFast\n\nfrom {module} import {model_class}"
    )
    needed = f"Besides torch and transformers, the package\n`{foreign.package(name)}` is needed."
    return {"imports": imports, "model_class": model_class, "trust": "", "needed": needed}


def _tags(run: RunConfig) -> list[str]:
    if not foreign.is_foreign(run.model):
        return ["titans", "neural-memory", _CUSTOM_CODE, run.model["variant"]]
    config = foreign.configuration(run.model)
    if _use(run.model[foreign.KEY]) is not _USE:
        return [config.model_type]
    memory = ["memory-embeddings"] if config.memory_embeddings else []
    return [*dict.fromkeys(config.mixers), *memory, _CUSTOM_CODE]


def _kind(run: RunConfig) -> str:
    if foreign.is_foreign(run.model):
        return f"A language model of the {foreign.name_of(run.model)} kind"
    return _KINDS[run.model["variant"]]


def facts(checkpoint: Path, run: RunConfig) -> dict[str, str]:
    """What training is known to have been, in words; what nobody wrote down says so."""
    state = layout.read_state(checkpoint)
    step = state.get("step")
    last = _last_rows(checkpoint.resolve().parent.parent / "metrics.jsonl", step)
    versions = state.get("versions", {})
    return {
        "optimizer steps": f"{step:,} of {run.train.steps:,}" if step is not None else UNKNOWN,
        "tokens": f"{last['tokens']:,}" if "tokens" in last else UNKNOWN,
        "last training loss (nats per token)": _number(last.get("loss")),
        "last validation loss (nats per token)": _number(last.get("validation_loss")),
        "sequence length": f"{run.data.sequence_length:,} tokens",
        "batch": f"{run.train.global_batch_size:,} sequences",
        "precision": run.train.precision,
        "initial weights": _initial(state.get("initial"), run.train.seed),
        "data fingerprint": str(state.get("fingerprint", UNKNOWN)),
        "trained with": ", ".join(f"{n} {v}" for n, v in versions.items()) or UNKNOWN,
    }


def _initial(weights: Mapping[str, Any] | None, seed: int) -> str:
    """Where training began; a checkpoint that says nothing of weights began with the seed's."""
    if not weights:
        return f"random, seed {seed}"
    step, digest = weights.get("step"), weights.get("manifest_sha256")
    told = f" at step {step:,}" if step is not None else ""
    return f"{weights['name']}{told}, manifest sha256 {digest or UNKNOWN}"


def _last_rows(metrics: Path, step: int | None) -> dict[str, Any]:
    """The newest value of every column up to ``step``."""
    values: dict[str, Any] = {}
    if step is None or not metrics.is_file():
        return values
    with open(metrics, encoding="utf-8") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row.get("step", 0) <= step:
                values |= row
    return values


def _public(run: RunConfig) -> dict[str, Any]:
    """The configuration of model and training, without the paths of the machine it ran on."""
    sections = run.model_dump()
    for part in sections["data"]["mixture"]:
        del part["manifest"]
    return {
        name: {
            key: value for key, value in sections[name].items() if key not in _LOCAL.get(name, ())
        }
        for name in _PUBLISHED
    }


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
