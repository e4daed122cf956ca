"""The likeliest continuations of prompts, whatever their length."""

import contextlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.evaluate.loaded import Loaded, out_of_memory
from titans_pretrain.evaluate.text_tokens import whole_ids
from titans_pretrain.inference.prefill import PIECE, continues, new_cache, prefill
from titans_pretrain.inference.prompts import check_ids, check_positions, check_some, prompt_ids


def greedy(
    model: Loaded,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    batch: int = 1,
    piece: int = PIECE,
) -> list[str]:
    """Continue every prompt with the likeliest token, again and again.

    A batch is padded on the left. A model of this project reads prompts a piece at a time into its
    cache, so that of their length only the ids need memory; others read them as transformers does.

    Args:
        model: what continues.
        prompts: texts, none of which is held; an empty one begins a document.
        max_new_tokens: tokens to add; fewer if the model ends the document.
        batch: prompts at once.
        piece: tokens that a model of this project reads at once.

    Returns:
        The continuations alone, without special tokens, in the order of the prompts.

    Raises:
        UserError: a prompt that the model's positions do not hold, tokens it does not have, or no
            token to begin with.
        TitansError: a batch does not fit in memory.
    """
    rows = [_encode(model, prompt, number) for number, prompt in enumerate(prompts)]
    for number, row in enumerate(rows):
        check_positions(f"prompt {number}", len(row), model.longest, more=max_new_tokens)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    answers = [""] * len(rows)
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        try:
            texts = _continue(model, [rows[number] for number in numbers], max_new_tokens, piece)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TitansError(
                f"{len(numbers)} prompts of up to {len(rows[numbers[-1]]):,} tokens do not fit in "
                f"the memory of {model.device}",
                where=f"prompt {numbers[-1]}",
                fix="use fewer at once (--batch), shorter prompts, or a device with more memory",
            ) from None
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def _encode(model: Loaded, prompt: str, number: int) -> Any:
    """Token ids of a prompt, (tokens,), as the tokenizer begins a text."""
    import torch

    where = f"prompt {number}"
    if prompt:
        found = whole_ids(model.tokenizer, prompt)
        check_some(found, prompt, where)
    else:
        found = array("q", prompt_ids(model.tokenizer, prompt, where))
    check_ids(found, model.network, where)
    return torch.frombuffer(found, dtype=torch.int64)


def _continue(model: Loaded, rows: Sequence[Any], new: int, piece: int) -> Iterator[str]:
    """The continuations of a batch."""
    import torch
    from transformers import GenerationConfig

    ends, pad = _end_tokens(model), _pad_token(model)
    more: dict[str, Any] = {}
    pieces = {"prefill_chunk_size": piece} if continues(model.network) else {}
    if pieces and len(set(map(len, rows))) == 1:
        tokens, more = _read(model, torch.stack(list(rows)) if rows[1:] else rows[0][None], piece)
        mask, pieces = torch.ones_like(tokens), {}
    else:
        tokens, mask = _padded(rows, pad)
    length = tokens.shape[1]
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **pieces,
    )
    with torch.inference_mode(), _settings_alone(model.network, settings):
        out = model.network.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            **more,
        )
    return (_text(model, row, ends) for row in out[:, length:].tolist())


@contextlib.contextmanager
def _settings_alone(network: Any, settings: Any) -> Iterator[None]:
    """Keep out the model's own settings, such as banned n-grams, which transformers adds."""
    own = network.generation_config
    network.generation_config = settings
    try:
        yield
    finally:
        network.generation_config = own


def _read(model: Loaded, ids: Any, piece: int) -> tuple[Any, dict[str, Any]]:
    """A cache of the model behind all but the last of rows of equal length, and that last."""
    import torch

    cache = new_cache(model.network)
    with torch.inference_mode():
        prefill(model.network, ids[:, :-1].to(model.device), cache, piece=piece)
        cache.count_anew()
    return ids[:, -1:], {"past_key_values": cache}


def _padded(rows: Sequence[Any], pad: int) -> tuple[Any, Any]:
    """Tokens and mask, (rows, longest), pads on the left."""
    import torch

    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = 1
    return tokens, mask


def _text(model: Loaded, tokens: list[int], ends: Sequence[int]) -> str:
    """What was said before the document ended."""
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    text: str = model.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    return text


def _end_tokens(model: Loaded) -> list[int]:
    """Ids that end a document: the model's own and its tokenizer's."""
    told = model.network.generation_config.eos_token_id
    own = told if isinstance(told, list) else [told]
    return sorted({end for end in (*own, model.tokenizer.eos_token_id) if end is not None})


def _pad_token(model: Loaded) -> int:
    """Any id that fills a row: pads are masked."""
    pad: int | None = model.tokenizer.pad_token_id
    return pad if pad is not None else next(iter(_end_tokens(model)), 0)
