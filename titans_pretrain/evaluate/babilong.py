"""BABILong: questions about facts that lie scattered in a long text.

Facts and questions are bAbI's, the text between them the user's (PG19 in the original), prompts,
lengths, sample counts and scoring BABILong's own (arXiv 2406.10149).
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from titans_pretrain.errors import Misfit
from titans_pretrain.evaluate import babilong_facts as facts
from titans_pretrain.evaluate.answering import greedy
from titans_pretrain.evaluate.babilong_context import Background, hide
from titans_pretrain.evaluate.babilong_facts import Question
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.progress import Progress
from titans_pretrain.evaluate.tasks import Options
from titans_pretrain.evaluate.text_tokens import TextTokens
from titans_pretrain.files import sha256_file
from titans_pretrain.inference.prompts import check_positions

PREFIX = "babilong_"
NAMES = tuple(PREFIX + task for task in facts.TASKS)
LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k")
NEW_TOKENS = 20
DEFINITION = 2  # of prompts, places and scoring; another one makes earlier results others
PROMPT_TOKENS = 300
TOKENS_PER_FACT = 8
SAMPLES, LONG_SAMPLES, LONG = 1000, 100, 32_000
_UNITS = {"": 1, "k": 10**3, "M": 10**6}


class BabilongTask:
    """One of the twenty tasks at several lengths.

    Args:
        task: ``qa1`` to ``qa20``.
        options: ``facts`` and ``background`` are needed; ``shots`` 0 leaves instruction and
            examples out, None keeps BABILong's own.
        background: the text between the facts.

    Raises:
        UserError: facts that cannot be read, an unknown length, or other shots.
    """

    def __init__(self, task: str, options: Options, background: Background) -> None:
        if options.facts is None:
            raise Misfit("no bAbI files", where="--facts", fix="name their folder (en-10k)")
        if options.shots:
            raise Misfit(
                f"{options.shots} examples: BABILong's prompts have their own",
                where="--few-shot",
                fix="leave it out, or use 0 for context and question alone",
            )
        self.name = PREFIX + task
        self._task, self._options, self._background = task, options, background
        self._bare = options.shots == 0
        self._lengths = {text: length(text) for text in options.lengths or LENGTHS}
        self._path = facts.find(options.facts, task, "test")
        self._all = facts.read(self._path)

    def identity(self) -> dict[str, Any]:
        """Everything but model and length that decides the result."""
        return {
            "task": self._task,
            "facts": self._facts_hash,
            "background": self._background.hashes,
            "samples": self._options.samples,
            "shots": self._options.shots,
            "seed": self._options.seed,
            "max_new_tokens": NEW_TOKENS,
            "prompts": facts.fingerprint(),
            "definition": DEFINITION,
        }

    def cells(self) -> list[str]:
        """The lengths, as written."""
        return list(self._lengths)

    def check(self, longest: int | None) -> None:
        """Refuse lengths that, with an answer, the model's positions do not hold."""
        for tokens in self._lengths.values():
            check_positions("--lengths", tokens, longest, more=NEW_TOKENS)

    def fit(self, model: Loaded, cell: str) -> None:
        """Refuse a length that leaves no room for context or facts."""
        self._asked(model, cell, lambda line: None)

    def run(self, model: Loaded, cell: str, tell: Callable[[str], None]) -> dict[str, Any]:
        """Accuracy at a length.

        Returns:
            ``accuracy``, its standard error, ``samples``, and the mean ``context_tokens``.
        """
        tokens = TextTokens.of(model.tokenizer)
        size, questions = self._asked(model, cell, tell)
        progress = Progress("questions", len(questions), tell)
        right, batch = 0, self._options.batch
        counts: list[int] = []
        for first in range(0, len(questions), batch):
            some = questions[first : first + batch]
            texts = (
                self._prompt(one, number, size, tokens, counts)
                for number, one in enumerate(some, start=first)
            )
            outputs = greedy(model, texts, max_new_tokens=NEW_TOKENS, batch=batch)
            scored = zip(some, outputs, strict=True)
            right += sum(facts.is_right(self._task, one, output) for one, output in scored)
            progress.show(first + len(some))
        accuracy = right / len(questions)
        return {
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(questions)),
            "samples": len(questions),
            "context_tokens": round(sum(counts) / len(questions)),
        }

    def _asked(
        self, model: Loaded, cell: str, tell: Callable[[str], None]
    ) -> tuple[int, list[Question]]:
        """Tokens of facts and background at a length, and the questions."""
        tokens = TextTokens.of(model.tokenizer)
        specials = len(model.tokenizer("")["input_ids"])
        size = self._context_size(cell, tokens, specials)
        return size, self._questions(cell, size, tokens, tell)

    @cached_property
    def _facts_hash(self) -> str:
        return sha256_file(self._path)

    def _context_size(self, cell: str, tokens: TextTokens, specials: int) -> int:
        """Tokens of facts and background: what the rest of the prompt leaves of the length."""
        asked = sorted({one.question for one in self._all})
        _, longest = max(zip(map(len, tokens.ids(asked)), asked, strict=True))
        rest = tokens.count(facts.prompt(self._task, "", longest, bare=self._bare))
        rest = max(PROMPT_TOKENS, rest + specials)
        if 0 < self._lengths[cell] <= rest:
            raise Misfit(
                f"{cell}: {rest} tokens are for the rest of the prompt",
                where="--lengths",
                fix="use longer ones, or 0k for the facts alone",
            )
        return max(0, self._lengths[cell] - rest)

    def _questions(
        self, cell: str, size: int, tokens: TextTokens, tell: Callable[[str], None]
    ) -> list[Question]:
        """The same ones at every length, but for those whose facts are too many or too long."""
        wanted = self._options.samples
        if wanted is None:
            wanted = SAMPLES if self._lengths[cell] <= LONG else LONG_SAMPLES
        found = random.Random(f"{self._options.seed} {self._task}").sample(
            self._all, len(self._all)
        )
        if size:
            found = facts.with_few_facts(found, size // TOKENS_PER_FACT)
        taken, left_out = _that_fit(found, size, wanted, tokens) if size else (found[:wanted], 0)
        if not taken:
            raise Misfit(
                f"{cell}: every question has more facts than {size} tokens hold",
                where="--lengths",
                fix="use longer ones, or 0k for the facts alone",
            )
        if left_out or len(taken) < wanted:
            count = f"{len(taken)} questions" + f", not {wanted}" * (len(taken) < wanted)
            long = f"; {left_out} left out, whose facts are more than {size} tokens"
            tell(f"{self.name} {cell}: {count}{long * bool(left_out)}")
        return taken

    def _prompt(
        self,
        question: Question,
        number: int,
        size: int,
        tokens: TextTokens,
        counts: list[int],
    ) -> str:
        """A prompt, whose context's tokens are added to ``counts``."""
        dice = random.Random(f"{self._options.seed} {self._task} {size} {number}")
        hidden = hide(question.facts, size, self._background, tokens, dice)
        counts.append(hidden.tokens)
        return facts.prompt(self._task, hidden.context, question.question, bare=self._bare)


def _that_fit(
    questions: Sequence[Question], size: int, wanted: int, tokens: TextTokens
) -> tuple[list[Question], int]:
    """The first ``wanted`` whose facts are at most ``size`` tokens; how many others were met."""
    taken: list[Question] = []
    for met, one in enumerate(questions):
        if len(taken) == wanted:
            return taken, met - wanted
        if sum(map(len, tokens.ids(one.facts))) <= size:
            taken.append(one)
    return taken, len(questions) - len(taken)


def open_tasks(names: Sequence[str], options: Options) -> list[BabilongTask]:
    """The tasks of names such as ``babilong_qa1``, their data at hand.

    Raises:
        UserError: facts or background that are missing or cannot be read, or a wrong option.
    """
    background = Background(options.background)
    return [BabilongTask(name.removeprefix(PREFIX), options, background) for name in names]


def length(text: str) -> int:
    """Tokens of a length such as ``0k``, ``4k``, ``1M`` or ``2048``.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"([0-9]+)([kM]?)", text)
    if match is None:
        raise Misfit(
            f"{text!r} is no length",
            where="--lengths",
            fix="use tokens, thousands (4k) or millions (1M)",
        )
    return int(match[1]) * _UNITS[match[2]]
