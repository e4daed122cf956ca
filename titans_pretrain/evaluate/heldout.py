"""Held-out loss and perplexity of an exported model: the trainer's validation, run again."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import manifest
from titans_pretrain.data.loader import VALIDATION_FRACTION, SequenceLoader
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.errors import Misfit, TitansError
from titans_pretrain.files import atomic_file, write_json
from titans_pretrain.inference import generate
from titans_pretrain.train.metrics import duration

NAME = "heldout"
FORMAT = "titans-heldout/1"
PROGRESS_SECONDS = 1.0
_LARGEST_EXPONENT = 700.0  # of which a float holds the power


@dataclass(frozen=True)
class Choice:
    """What is scored; None takes what the export tells of the model's training.

    Attributes:
        sequence_length: tokens of a sequence.
        validation_fraction: share of the tokens, the last, that training left out.
        sequences: scored at most; 0 takes all.
        batch: sequences at once.
    """

    sequence_length: int | None = None
    validation_fraction: float | None = None
    sequences: int = 0
    batch: int = 1


def evaluate(
    model: Path,
    output: Path,
    data: str,
    choice: Choice,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a model on held-out sequences; write ``heldout.json`` and ``heldout.md``.

    The sequences, their order and the targets that count are those of the trainer's validation.

    Args:
        model: what ``titans export`` wrote, or another causal language model.
        output: directory of the results, made where it is missing.
        data: path or URL of the prepared data's manifest.json.
        choice: what is scored.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.

    Returns:
        What ``heldout.json`` holds.

    Raises:
        Misfit: model, data and choice do not fit, or nothing is held out.
        UserError: model or data cannot be read.
        TitansError: the loss is not finite, or a result cannot be written.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    facts = training_facts(model)
    corpus = Corpus.open([(data, 1.0)])
    loader = held_out(corpus, facts, choice, separates=_separates(model))
    place = generate.choose_device(device)
    network, tokenizer = generate.load(model, trust_remote_code=trust_remote_code, device=place)
    check_fit(network, tokenizer, corpus, loader.length_at(0))
    network.to(place)
    output.mkdir(parents=True, exist_ok=True)
    loss, tokens = score(network, loader, sequences=choice.sequences, batch=choice.batch)
    count = min(choice.sequences or loader.validation_sequences, loader.validation_sequences)
    result = {
        "format": FORMAT,
        "model": str(model),
        "training_step": facts.get("step"),
        "training_fingerprint": facts.get("fingerprint"),
        "data": corpus.sources[0].manifest,
        "fingerprint": corpus.fingerprint,
        "sequence_length": loader.length_at(0),
        "sequences": count,
        "tokens": tokens,
        "dtype": str(network.dtype).removeprefix("torch."),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else None,
    }
    with atomic_file(output / f"{NAME}.md", "w") as handle:
        handle.write(table(result))
    write_json(output / f"{NAME}.json", result)
    return result


def training_facts(model: Path) -> dict[str, Any]:
    """What an export tells of its training: step, data and what was held out; empty if nothing.

    Raises:
        TitansError: its manifest is damaged.
    """
    if not (model / manifest.NAME).exists():
        return {}
    told = manifest.read(model)
    training = told.get("training", {})
    return {"step": told.get("step"), **training}


def score(network: Any, loader: SequenceLoader, *, sequences: int, batch: int) -> tuple[float, int]:
    """Mean cross-entropy of the held-out targets, in nats, and how many there are.

    Args:
        network: a causal language model, evaluating; it is told where documents begin if the loader
            tells.
        loader: the data.
        sequences: scored at most; 0 takes all.
        batch: sequences at once.

    Raises:
        Misfit: no target counts.
        TitansError: the loss is not finite.
    """
    import torch
    from torch.nn import functional

    from titans_pretrain.model.layers import full_precision
    from titans_pretrain.train.loss import token_loss_sum

    count = min(sequences or loader.validation_sequences, loader.validation_sequences)
    progress = _Progress(count)
    total, valid = 0.0, 0
    rows = loader.validation_batches(sequences=batch, limit=sequences, rank=0, ranks=1)
    with torch.inference_mode():
        for number, part in enumerate(rows, start=1):
            tokens = part.tokens.to(network.device)
            starts = part.document_starts  # stay on the host
            options = {} if starts is None else {"document_starts": starts}
            logits = network(tokens[:, :-1].contiguous(), use_cache=False, **options).logits
            targets = tokens[:, 1:].flatten()
            losses = functional.cross_entropy(
                full_precision(logits).flatten(0, 1), targets, reduction="none"
            ).view(len(tokens), -1)
            mask = None if part.target_mask is None else part.target_mask.to(network.device)
            total += token_loss_sum(losses, mask).item()
            valid += losses.numel() if mask is None else int(mask.sum())
            progress.show(min(number * batch, count), total / max(valid, 1), valid)
    return _mean(total, valid, loader), valid


def table(result: Mapping[str, Any]) -> str:
    """The result as a page of Markdown."""
    perplexity = result["perplexity"]
    rows = {
        "loss (nats per token)": f"{result['loss']:.6f}",
        "perplexity": "more than 1e300" if perplexity is None else f"{perplexity:,.4f}",
        "tokens scored": f"{result['tokens']:,}",
        "sequences": f"{result['sequences']:,} of {result['sequence_length']:,} tokens",
        "weights": result["dtype"],
        "model": f"{result['model']}, step {result['training_step'] or 'not recorded'}",
        "data": f"{result['data']}, fingerprint {result['fingerprint']}",
        "data of the training": result["training_fingerprint"] or "not recorded",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["# Held-out loss", "", "| | |", "|---|---|", *lines, ""])


def held_out(
    corpus: Corpus, facts: Mapping[str, Any], choice: Choice, *, separates: bool
) -> SequenceLoader:
    """The held-out sequences, none of which training read.

    Raises:
        Misfit: the length or the share is not known, the share holds trained tokens, or nothing is
            held out.
        UserError: the data refuses the share.
    """
    length = choice.sequence_length or facts.get("sequence_length")
    if length is None:
        raise Misfit(
            "the model does not tell the sequence length of its training",
            where="--sequence-length",
            fix="give it, as data.sequence_length of the run",
        )
    loader = SequenceLoader(
        corpus,
        sequence_length=length,
        seed=0,
        validation_fraction=_fraction(corpus, facts, choice.validation_fraction),
        document_starts=separates,
    )
    if not loader.validation_sequences:
        raise Misfit(
            f"no sequence of {length} tokens is held out of the data",
            where=corpus.sources[0].place,
            fix="give data that was prepared with --held-out, or that training did not read",
        )
    return loader


def _fraction(corpus: Corpus, facts: Mapping[str, Any], given: float | None) -> float | None:
    source = corpus.sources[0]
    if source.held_out.tokens or source.held_out_share:
        return given  # the data says what is held out; the loader refuses any other share
    if "validation_fraction" not in facts:
        if given is None:
            raise Misfit(
                "the model does not tell which share of the data its training left out",
                where="--validation-fraction",
                fix="give it, as data.validation_fraction of the run",
            )
        return given
    trained = facts["validation_fraction"]
    trained = VALIDATION_FRACTION if trained is None else trained
    if given is not None and given > trained:
        raise Misfit(
            f"a share of {given} holds tokens that the model was trained on: training left out the "
            f"last {trained}",
            where="--validation-fraction",
            fix=f"use {trained} or less, or leave it out",
        )
    return trained if given is None else given


def _separates(model: Path) -> bool:
    """Whether a Titans model needs to know where documents begin."""
    from titans_pretrain.model import fields

    settings = generate.settings(model)
    if settings.get("model_type") != "titans":
        return False
    return fields.separates_documents(fields.defaults() | settings)


def check_fit(network: Any, tokenizer: Any, corpus: Corpus, length: int) -> None:
    """Refuse data in other tokens than the model's, or longer sequences than it can read."""
    from titans_pretrain.export.tokenizer import check_identity

    place = corpus.sources[0].place
    try:
        check_identity(
            corpus.tokenizer.read_bytes(),
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        )
    except TitansError:
        raise Misfit(
            "the data's tokenizer is not the model's",
            where=f"{place}: sha256 {corpus.sources[0].tokenizer_sha256}",
            fix="prepare the held-out text with the model's tokenizer",
        ) from None
    vocabulary = network.get_input_embeddings().weight.shape[0]
    if corpus.vocab_size > vocabulary:
        raise Misfit(
            f"the data's tokenizer has {corpus.vocab_size} pieces, the model {vocabulary}",
            where=place,
            fix="prepare the held-out text with the model's tokenizer",
        )
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise Misfit(
            f"sequences of {length} tokens are longer than the model reads: {longest}",
            where="--sequence-length",
            fix=f"use at most {longest}",
        )


def _mean(total: float, valid: int, loader: SequenceLoader) -> float:
    if not valid:
        raise Misfit(
            "no held-out target counts: all are masked",
            where=loader.corpus.sources[0].place,
            fix="give other data",
        )
    if not math.isfinite(total):
        raise TitansError(
            f"the held-out loss is {total / valid}",
            where="the model's logits",
            fix="export another checkpoint; in bfloat16, try float32",
        )
    return total / valid


class _Progress:
    """A line about the sequences done, at most one a second."""

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, time.monotonic()
        self._shown = self._begun

    def show(self, done: int, loss: float, tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS and done < self._count:
            return
        self._shown = now
        seconds = max(now - self._begun, 1e-9)
        left = duration(seconds / done * (self._count - done))
        print(
            f"sequences {done}/{self._count}  loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s  "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )
