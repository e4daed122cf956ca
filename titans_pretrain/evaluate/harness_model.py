"""A loaded model as lm-evaluation-harness wants it.

Texts become tokens, and inputs that are too long are cut, as in lm-eval's own ``hf`` model.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.progress import Progress
from titans_pretrain.inference.prefill import PIECE, continues
from titans_pretrain.model.layers import full_precision

_SCORED_AT_ONCE = 1024
_MAX_NEW_TOKENS = 256  # where a task does not say
Project = Callable[[int, int, int], Tensor]
Window = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Scores and continues texts with a loaded model.

    Args:
        model: what is scored.
        max_length: tokens that the model is given at most; texts are cut on the left.
        batch: rows at once.
        tell: takes lines about the progress.
        piece: tokens that a model of this project reads at once; more go through its cache.

    Attributes:
        cut: ids of the task's documents of which an input was cut.
    """

    backend = "causal"

    def __init__(
        self,
        model: Loaded,
        *,
        max_length: int,
        batch: int = 1,
        tell: Callable[[str], None] = lambda line: None,
        piece: int = PIECE,
    ) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self.cut: set[int] = set()
        self._network, self._device = model.network, model.device
        self._continues = continues(model.network)
        self._keeps = "logits_to_keep" in inspect.signature(model.network.forward).parameters
        self._max_length, self._batch, self._tell, self._piece = max_length, batch, tell, piece

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text: BOS, or EOS where there is none."""
        begin = self.tokenizer.bos_token_id
        begin = self.tokenizer.eos_token_id if begin is None else begin
        if begin is None:
            raise UserError(
                "the model's tokenizer has neither a BOS nor an EOS token",
                where="tokenizer_config.json",
                fix="name the token that begins a document",
            )
        return begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Token ids of a text, begun as the tokenizer begins one unless it brings its own BOS."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if not options and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, verbose=False, **options)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each (context, continuation)."""
        self._documents = [request.doc_id for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each text, in windows of the maximal length that do not overlap."""
        windows: list[Window] = []
        counts = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(pair)) for pair in rolling]
            windows += pairs
            counts.append(len(pairs))
        self._documents = []
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Window], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Requests whose tokens differ in the last one only are read once."""
        members: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            row = self._row(number, context, continuation)
            members.setdefault(row, []).append((number, continuation))
        rows = sorted(members, key=lambda row: (-len(row), row))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress, done = Progress("requests", len(requests), self._tell), 0
        for first in range(0, len(rows), self._batch):
            part = rows[first : first + self._batch]
            groups = [members[row] for row in part]
            scores = self._score(part, [[wanted for _, wanted in group] for group in groups])
            for group, pairs in zip(groups, scores, strict=True):
                for (number, _), pair in zip(group, pairs, strict=True):
                    found[number] = pair
                done += len(group)
            progress.show(done)
        return found

    def _row(self, number: int, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The tokens that predict a continuation, cut on the left."""
        if not continuation:
            raise TitansError(
                "an answer has no token of its own after its question",
                where=f"request {number}",
                fix="report the task and the tokenizer as a bug",
            )
        self._check_answer(len(continuation))
        tokens = [*context, *continuation]
        if len(tokens) > self._max_length + 1 and self._documents:
            self.cut.add(self._documents[number])
        return tuple(tokens[-(self._max_length + 1) : -1])

    def check(self, requests: Iterable[Instance]) -> None:
        """Refuse answers that are longer than the maximal length.

        Raises:
            Misfit: names the longest.
        """
        longest = 0
        for request in requests:
            if request.request_type == "loglikelihood":
                context, answer = request.args
                if len(answer.encode()) >= self._max_length:  # others have fewer tokens
                    _, tokens = self._encode_pair(context, answer)
                    longest = max(longest, len(tokens))
        self._check_answer(longest)

    def _check_answer(self, tokens: int) -> None:
        if tokens > self._max_length:
            raise Misfit(
                f"an answer of {tokens} tokens is longer than --max-length {self._max_length}",
                where="--max-length",
                fix=f"use at least {tokens}",
            )

    @torch.inference_mode()
    def _score(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """For every row, the scores of its continuations; each ends behind the row's last token."""
        length = len(rows[0])
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)  # pads on the right: nothing sees them
        spans = [
            (len(row) - max(map(len, asked)), len(row))
            for row, asked in zip(rows, wanted, strict=True)
        ]
        scores: list[list[_Score]] = [
            [_Score(len(row), one) for one in asked]
            for row, asked in zip(rows, wanted, strict=True)
        ]
        first = min(begin for begin, _ in spans)
        for start, stop, project in self._pieces(tokens.to(self._device), first):
            for index, (begin, end) in enumerate(spans):
                for low in range(max(begin, start), min(end, stop), _SCORED_AT_ONCE):
                    high = min(low + _SCORED_AT_ONCE, end, stop)
                    logits = full_precision(project(index, low, high))
                    log_probabilities, likeliest = logits.log_softmax(-1), logits.argmax(-1)
                    for score in scores[index]:
                        score.add(low, log_probabilities, likeliest)
        return [[score.pair() for score in row] for row in scores]

    def _pieces(self, tokens: Tensor, first: int) -> Iterator[tuple[int, int, Project]]:
        """(start, stop, logits of a row's columns) of consecutive parts, all from ``first`` on."""
        length = tokens.shape[1]
        if not self._continues:
            options = {"logits_to_keep": length - first} if self._keeps else {}
            start = first if self._keeps else 0
            logits = self._network(tokens, use_cache=False, **options).logits
            yield start, length, lambda row, low, high: logits[row, low - start : high - start]
            return
        cache, head = None, self._network.get_output_embeddings()
        for start in range(0, length, self._piece):
            part = tokens[:, start : start + self._piece]
            streamed = length > self._piece
            out = self._network.model(part, past_key_values=cache, use_cache=streamed)
            cache, hidden, stop = out.past_key_values, out.last_hidden_state, start + part.shape[1]
            if stop > first:
                yield start, stop, _projection(head, hidden, start)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations of (context, settings), up to the first stop sequence.

        None of the paper's tasks asks for one; those of lm-eval that do get the texts of ``hf``.
        """
        documents = [request.doc_id for request in requests]
        arguments = [(*request.args, index) for index, request in enumerate(requests)]
        order = Collator(
            arguments,
            sort_fn=lambda one: (-len(self.tok_encode(one[0])), one[0]),
            group_by="gen_kwargs",
            group_fn=lambda one: one[1],
        )
        texts: list[str] = []
        progress = Progress("requests", len(requests), self._tell)
        for part in order.get_batched(n=self._batch):
            contexts, settings, numbers = zip(*part, strict=True)
            told, cut = self._continue(contexts, settings[0])
            self.cut |= {documents[numbers[index]] for index in cut}
            texts += told
            progress.show(len(texts))
        return order.get_original(texts)

    def _continue(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[int]]:
        """Continuations of a batch, and which of its contexts were cut."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until", None), eos=end)
        new = options.pop("max_gen_toks")
        room = self._max_length - new
        if room <= 0:
            raise Misfit(
                f"a task adds up to {new} tokens, and --max-length is {self._max_length}",
                where="--max-length",
                fix=f"use more than {new}",
            )
        rows = [self.tok_encode(context) for context in contexts]
        cut = [index for index, row in enumerate(rows) if len(row) > room]
        tokens, mask = self._padded([row[-room:] for row in rows])
        width = tokens.shape[1]
        with torch.inference_mode():
            out = self._network.generate(
                tokens,
                attention_mask=mask,
                max_length=width + new,
                stopping_criteria=stop_sequences_criteria(
                    self.tokenizer, until, width, len(contexts)
                ),
                pad_token_id=self._pad,
                use_cache=True,
                **_sampling(options),
                **({"prefill_chunk_size": self._piece} if self._continues else {}),
            )
        texts = [
            self.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, width:].tolist()
        ]
        return [postprocess_generated_text(text, until, None) for text in texts], cut

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, (rows, longest), pads on the left."""
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            tokens[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        return tokens.to(self._device), mask.to(self._device)

    @property
    def _pad(self) -> int:
        known = self.tokenizer
        for token in (known.pad_token_id, known.unk_token_id, known.eos_token_id):
            if token is not None:
                return token
        return 0  # pads are masked


class _Score:
    """The log-probability of a continuation, collected in parts.

    Args:
        end: columns of its row; the last one predicts its last token.
        wanted: its token ids.
    """

    def __init__(self, end: int, wanted: Sequence[int]) -> None:
        self._begin, self._end, self._wanted = end - len(wanted), end, wanted
        self._parts: list[Tensor] = []
        self._greedy = True

    def add(self, low: int, log_probabilities: Tensor, likeliest: Tensor) -> None:
        """Take what columns from ``low`` on predict: (columns, V) and (columns,)."""
        begin, end = max(low, self._begin), min(low + len(likeliest), self._end)
        if begin >= end:
            return
        targets = torch.tensor(
            self._wanted[begin - self._begin : end - self._begin], device=likeliest.device
        )
        columns = slice(begin - low, end - low)
        self._parts.append(log_probabilities[columns].gather(1, targets[:, None])[:, 0])
        self._greedy &= bool((likeliest[columns] == targets).all())

    def pair(self) -> tuple[float, bool]:
        """(log-probability, whether greedy decoding gives it)."""
        return float(torch.cat(self._parts).sum()), self._greedy


def _projection(head: Any, hidden: Tensor, start: int) -> Project:
    return lambda row, low, high: head(hidden[row, low - start : high - start])


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Settings of a task as ``generate`` takes them: greedy ones have no temperature."""
    if options.get("do_sample") or options.get("temperature", 0.0):
        return options
    return {key: value for key, value in options.items() if key != "temperature"} | {
        "do_sample": False
    }
