"""Text from an exported model."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError

log = logging.getLogger(__name__)
_CODE = Path(__file__).parent / "model"
_COLDEST = 1e-6  # below, logits divided by the temperature may overflow float32
_SHOWN_KEYS = 3
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # what odd values in JSON lead to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to add; fewer if the model ends the document.
        temperature: of the softmax, at least 1e-6; 0 takes the likeliest token.
        top_k: sample among that many likeliest tokens; 0 among all.
        top_p: sample among the likeliest tokens of that total probability.
        seed: of the draw, less than 2**64.
        use_cache: keep the memory's state from token to token; off recomputes everything.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        for name, good, fix in (
            ("max_new_tokens", self.max_new_tokens >= 1, "use at least 1"),
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
                f"use 0 for the likeliest token, or at least {_COLDEST}",
            ),
            ("top_k", self.top_k >= 0, "use 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "use more than 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**64, "use 0 or more, and less than 2**64"),
        ):
            if not good:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {getattr(self, name)}", where="command line", fix=fix)


def generate(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Print ``prompt`` and its continuation as it comes.

    Args:
        directory: what ``titans export`` wrote, or another causal language model.
        prompt: the text to go on from; empty begins a document.
        sampling: how tokens are chosen.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.

    Returns:
        The text that was printed.

    Raises:
        UserError: no model, an unusable one, an unknown device, or a prompt that is not UTF-8.
    """
    import torch
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    _check_text(prompt)
    disable_progress_bar()
    set_verbosity_error()
    model, tokenizer = load(directory, trust_remote_code=trust_remote_code)
    model.to(choose_device(device))
    inputs = _inputs(tokenizer, prompt, model)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature}
        options |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        (tokens,) = model.generate(
            **inputs,
            **options,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=sampling.use_cache,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    return tokenizer.decode(tokens, skip_special_tokens=True)


def load(directory: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model (evaluating, in the dtype of its files) and tokenizer.

    A Titans model runs on the installed code, which is what it was exported with; a difference
    between the two is warned about. Another kind runs transformers' own code, or that of the
    directory if ``trust_remote_code`` says so. Weights are read from safetensors files only. The
    ``manifest.json`` of a Titans model is compared with every byte, where it is there.

    Raises:
        UserError: the directory holds no model that can be loaded, or not all of it, or more.
        TitansError: a file cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    found = settings(directory)
    where = str(directory)
    options: dict[str, Any] = {
        "dtype": "auto",
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # transformers reports them, _check_loaded refuses them
        "output_loading_info": True,
    }
    try:
        if found.get("model_type") == "titans":
            from titans_pretrain.model.modeling_titans import TitansForCausalLM

            _check_files(directory)
            _compare_code(directory)
            model, loading = TitansForCausalLM.from_pretrained(directory, **options)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        else:
            if found.get("auto_map") and not trust_remote_code:
                raise UserError(
                    f"the model brings code of its own (model_type {found.get('model_type')!r})",
                    where=where,
                    fix="read its Python files, then add --trust-remote-code",
                )
            trust = {"trust_remote_code": trust_remote_code}
            model, loading = AutoModelForCausalLM.from_pretrained(directory, **options, **trust)
            tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
    except (OSError, RuntimeError, SafetensorError, *_MALFORMED) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the model cannot be loaded: {reason}", where=where, fix="export it again"
        ) from None
    _check_loaded(loading, where)
    return model.eval(), tokenizer


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the prompt is not UTF-8: {prompt!a}", where="PROMPT", fix="give it in UTF-8"
        ) from None


def _check_files(directory: Path) -> None:
    """Refuse a model whose bytes are not those of its manifest; one without has nothing to say."""
    if not (directory / manifest.NAME).exists():
        return
    if problems := manifest.problems(directory):
        raise UserError(
            f"the model is damaged: {'; '.join(problems)}",
            where=str(directory),
            fix=f"export it again, or delete {manifest.NAME} if the change is yours",
        )


def _check_loaded(loading: Mapping[str, Any], where: str) -> None:
    """Refuse a model of which transformers filled in or left out a part."""
    complaints = []
    for kind in ("missing", "unexpected", "mismatched"):
        found = loading[f"{kind}_keys"]
        names = sorted(key if isinstance(key, str) else key[0] for key in found)
        if names:
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            complaints.append(f"{kind} keys: {', '.join(names[:_SHOWN_KEYS])}{more}")
    if complaints:
        raise UserError(
            f"the weights are not those of config.json: {'; '.join(complaints)}",
            where=where,
            fix="export it again",
        )


def settings(directory: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        UserError: the directory holds none, or none that can be read.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory} is no directory",
            where=str(directory),
            fix="make one: titans export RUN MODEL_DIR",
        )
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give what titans export wrote"
        if (directory / "checkpoints").is_dir() or (directory / "tensors.json").is_file():
            fix = f"export it first: titans export {directory} MODEL_DIR"
        raise UserError(
            "no exported model: config.json is missing", where=str(directory), fix=fix
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"config.json cannot be read: {error}", where=str(path), fix="export it again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"config.json holds a {type(values).__name__} instead of a mapping",
            where=str(path),
            fix="export it again",
        )
    return values


def _compare_code(directory: Path) -> None:
    different = [
        path.name
        for path in sorted(directory.glob("*.py"))
        if not (_CODE / path.name).is_file()
        or (_CODE / path.name).read_bytes() != path.read_bytes()
    ]
    if different:
        log.warning(
            "%s was exported by another version (%s); the installed code runs",
            directory,
            ", ".join(different),
        )


def choose_device(name: str) -> Any:
    """The torch.device of a name; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        UserError: it cannot be used here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # meta tensors hold nothing to bring back
        return torch.device(name)
    except Exception as error:
        raise UserError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="--device",
            fix="use cpu, or the cuda device of this machine",
        ) from None


def _inputs(tokenizer: Any, prompt: str, model: Any) -> Any:
    """Token ids and mask, (1, tokens); a document's beginning for an empty prompt."""
    text = prompt or tokenizer.bos_token or tokenizer.eos_token
    if not text:
        raise UserError(
            "the model has no token to begin a document with", where="PROMPT", fix="give a prompt"
        )
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(inputs["input_ids"].max()) >= vocabulary:
        raise UserError(
            f"the tokenizer's ids exceed the model's {vocabulary}",
            where="tokenizer.json",
            fix="export the model again",
        )
    return inputs.to(model.device)
