"""Text from an exported model."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from titans_pretrain.baselines import gpu_packages
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError
from titans_pretrain.inference import packages
from titans_pretrain.inference.prefill import OWN, check_memory, continues, new_cache, prefill
from titans_pretrain.inference.prompts import (
    check_ids,
    check_positions,
    check_some,
    positions,
    prompt_ids,
)
from titans_pretrain.inference.streamer import Streamer
from titans_pretrain.inference.token_stream import TokenStream

log = logging.getLogger(__name__)
_CODE = Path(__file__).parents[1] / "model"
_TEMPERATURE = 0.8
_COLDEST = 1e-6  # below, logits divided by the temperature may overflow float32
_SHOWN_KEYS = 3
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # what odd values in JSON lead to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to add; fewer if the model ends the document.
        temperature: of the softmax, at least 1e-6; 0 takes the likeliest token. None is 0.8, or
            0 with beams.
        top_k: sample among that many likeliest tokens; 0 or None among all.
        top_p: sample among the likeliest tokens of that total probability; None among all.
        seed: of the draw, less than 2**64.
        use_cache: keep the memory's state from token to token; off recomputes everything.
        beams: likeliest texts that are kept side by side; the best is the result.
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    use_cache: bool = True
    beams: int = 1

    def __post_init__(self) -> None:
        if self.temperature is None:
            object.__setattr__(self, "temperature", _TEMPERATURE if self.beams == 1 else 0.0)
        assert self.temperature is not None
        for name, good, fix in (
            ("max_new_tokens", self.max_new_tokens >= 1, "use at least 1"),
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
                f"use 0 for the likeliest token, or at least {_COLDEST}",
            ),
            ("beams", self.beams >= 1, "use at least 1"),
            ("top_k", self.top_k is None or self.top_k >= 0, "use 0 or more"),
            (
                "top_p",
                self.top_p is None or 0 < self.top_p <= 1,
                "use more than 0 and at most 1",
            ),
            ("seed", 0 <= self.seed < 2**64, "use 0 or more, and less than 2**64"),
        ):
            if not good:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {getattr(self, name)}", where="command line", fix=fix)
        if self.beams > 1 and self.temperature:
            raise UserError(
                f"--temperature is {self.temperature} with {self.beams} beams, which draw nothing",
                where="command line",
                fix="leave one of them out",
            )
        for name in ("top_k", "top_p"):
            if not self.temperature and getattr(self, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} says nothing where the likeliest is taken",
                    where="command line",
                    fix="leave it out, or draw with a --temperature and without --beams",
                )

    def options(self) -> dict[str, Any]:
        """What transformers' ``generate`` takes."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature:
            options |= {"do_sample": True, "temperature": self.temperature}
            options |= {"top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        return options | {"num_beams": self.beams}


def generate(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    memory: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Print ``prompt`` and its continuation as it comes.

    Args:
        directory: what ``titans export`` wrote, or another causal language model.
        prompt: the text to go on from; empty begins a document, or goes on with the memory's text.
        sampling: how tokens are chosen.
        memory: what ``titans memorize`` wrote: the prompt stands behind the text it has read.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.

    Returns:
        The text that was printed.

    Raises:
        UserError: no model, an unusable one, an unknown device, a memory that is not this model's,
            or a prompt that is not UTF-8.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    _check_text(prompt)
    if memory is not None and not sampling.use_cache:
        raise UserError(
            "a memory is a cache", where="--no-cache", fix="leave out --no-cache or --memory"
        )
    disable_progress_bar()
    set_verbosity_error()
    place = choose_device(device)
    if memory is not None:
        check_memory(settings(directory), str(directory))
    model, tokenizer = load(directory, trust_remote_code=trust_remote_code, device=place)
    model.to(place)
    with torch.inference_mode():
        begun = _begin(directory, model, tokenizer, prompt, memory)
        check_positions("PROMPT", len(begun.ids), positions(model), more=sampling.max_new_tokens)
        streamer = Streamer(tokenizer, begun.ids, begun.hidden)
        if sampling.temperature:
            torch.manual_seed(sampling.seed)
        _go_on(model, begun, sampling, streamer)
    return streamer.text


@dataclass
class _Begun:
    """A text's ids, what has read those before it, and how much of it the user did not give."""

    ids: list[int]
    cache: Any = None
    hidden: int = 0


def _begin(directory: Path, model: Any, tokenizer: Any, prompt: str, memory: Path | None) -> _Begun:
    if memory is None:
        ids = prompt_ids(tokenizer, prompt)
        check_ids(ids, model)
        return _Begun(ids)
    from titans_pretrain.inference import memory_file

    held = memory_file.load(memory, model, memory_file.Owner.of(directory, model))
    if held.reading is not None:
        raise UserError(
            "the memory's text has not been read to its end",
            where=str(memory),
            fix="run the same titans memorize command again",
        )
    stream = TokenStream(tokenizer, held.context, held.pending)
    ids = stream.finish(prompt)
    check_some(ids, prompt, "PROMPT")
    check_ids(ids, model)
    told = (tokenizer.decode(of, skip_special_tokens=True) for of in (ids, stream.finish()))
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(*told, strict=False))
    return _Begun(ids, held.cache, len(list(alike)))


def _go_on(model: Any, begun: _Begun, sampling: Sampling, streamer: Streamer) -> None:
    """Generate behind the ids; a model of this project reads them in pieces before."""
    import torch

    ids = torch.tensor([begun.ids], device=model.device)
    options: dict[str, Any] = {"use_cache": sampling.use_cache}
    if sampling.use_cache and continues(model):
        cache = new_cache(model) if begun.cache is None else begun.cache
        prefill(model, ids[:, :-1], cache)
        cache.count_anew()
        if sampling.beams > 1:
            cache.batch_repeat_interleave(sampling.beams)
        ids, options = ids[:, -1:], {"past_key_values": cache}
    streams = {"streamer": streamer} if sampling.beams == 1 else {}
    (tokens,) = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **sampling.options(),
        **options,
        **streams,
    )
    if not streams:
        streamer.add(tokens[ids.shape[1] :].tolist())
        streamer.end()


def load(
    directory: Path, *, trust_remote_code: bool = False, device: Any = None
) -> tuple[Any, Any]:
    """Model (evaluating, in the dtype of its files) and tokenizer.

    A model of this project runs on the installed code, which is what it was exported with; a
    difference between the two is warned about. Another kind runs transformers' own code or, if
    ``trust_remote_code`` says so, that of the directory, or of the installed package that an export
    names; a package that is imported already needs no such word. Weights are read from safetensors
    files only. The ``manifest.json`` of an export is compared with every byte, where it is there.

    Args:
        directory: what ``titans export`` wrote, or another causal language model.
        trust_remote_code: see above.
        device: torch device that the model is going to; None for a GPU if there is one. GPU kernels
            that transformers finds are left out for the CPU.

    Raises:
        UserError: the directory holds no model that can be loaded, or not all of it, or more.
        TitansError: a file cannot be read.
    """
    with gpu_packages.for_device(None if device is None else device.type):
        return _load(directory, trust_remote_code=trust_remote_code)


def _load(directory: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
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
        _check_files(directory)
        if packaged := packages.model_class(directory, trusted=trust_remote_code):
            model, loading = packaged.from_pretrained(directory, **options)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        elif found.get("model_type") in OWN:
            _compare_code(directory, _CODE)
            model_class = _installed_class(found["model_type"])
            model, loading = model_class.from_pretrained(directory, **options)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        else:
            if found.get("auto_map") and not trust_remote_code:
                raise UserError(
                    f"the model brings code of its own (model_type {found.get('model_type')!r})",
                    where=where,
                    fix="read its Python files, then add --trust-remote-code",
                )
            packages.check_known(found, where)
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


def _installed_class(model_type: str) -> Any:
    if model_type == "titans":
        from titans_pretrain.model.modeling_titans import TitansForCausalLM

        return TitansForCausalLM
    from titans_pretrain.model.modeling_baseline import BaselineForCausalLM

    return BaselineForCausalLM


def _compare_code(directory: Path, installed: Path) -> None:
    different = [
        path.name
        for path in sorted(directory.glob("*.py"))
        if not (installed / path.name).is_file()
        or (installed / path.name).read_bytes() != path.read_bytes()
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
