"""BABILong samples to train on: documents of an exact number of tokens. No torch here."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titans_pretrain import files
from titans_pretrain.errors import UserError, nearest
from titans_pretrain.evaluate import babilong_facts as facts
from titans_pretrain.evaluate.babilong_context import SENTENCE_TOKENS, Background, woven
from titans_pretrain.evaluate.babilong_facts import Question
from titans_pretrain.evaluate.progress import Progress
from titans_pretrain.evaluate.text_tokens import TextTokens

if TYPE_CHECKING:
    from data_prep.tokenizer import Tokenizer

ATTEMPTS = 20
_CORRECTIONS = 4
_NEAR = 24  # characters around a cut that are tried
_SPARE_TOKENS = 32  # behind the last sentence, which may have to become longer


@dataclass(frozen=True)
class Documents:
    """What is written.

    Attributes:
        tasks: ``qa1`` to ``qa20``, in turn.
        length: tokens of a document, the EOS (and the BOS) included.
        samples: how many.
        bos: whether a BOS begins each, as ``titans data prepare --bos`` has it.
        seed: of questions, places and background.
    """

    tasks: Sequence[str]
    length: int
    samples: int
    bos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in facts.TASKS:
                fix = nearest(task, facts.TASKS)
                raise UserError(f"{task!r} is no bAbI task", where="--tasks", fix=fix)


def write(
    output: Path,
    tokenizer: "Tokenizer",
    directory: Path,
    background: Background,
    wanted: Documents,
    tell: Callable[[str], None],
) -> None:
    """Write samples as JSON lines of ``id``, ``prompt`` and ``answer``, one document each.

    The prompts are those of ``--few-shot 0``. ``titans data prepare --prompt-column prompt
    --text-column answer`` makes exactly ``length`` tokens of each, of which the answer's and the
    EOS are targets.

    Args:
        output: file to write, whole or not at all.
        tokenizer: that will encode them.
        directory: of the bAbI files; their training questions are taken.
        background: text between the facts.
        wanted: which and how many.
        tell: takes lines about the progress.

    Raises:
        UserError: facts that cannot be read, or a length that holds no question.
    """
    maker = _Maker(tokenizer, background, wanted)
    progress = Progress("documents", wanted.samples, tell)
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(output, "w") as lines:
        chosen = _questions(directory, maker, wanted, tell)
        for number, (task, question) in enumerate(chosen):
            row = {
                "id": f"babilong-{task}-{wanted.length}-{wanted.seed}-{number}",
                "prompt": maker.prompt(task, question, number),
                "answer": _answer(question),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.show(number + 1)


def _questions(
    directory: Path, maker: "_Maker", wanted: Documents, tell: Callable[[str], None]
) -> Iterator[tuple[str, Question]]:
    """Tasks in turn, each one's questions in random order, all before any comes again."""
    turns = []
    for task in wanted.tasks:
        path = facts.find(directory, task, "train")
        every = facts.read(path)
        sizes = [maker.size(task, one) for one in every]
        spare = [wanted.length - size for size in sizes]
        # a few tokens are often no cut of any text
        fits = [left == 0 or left >= SENTENCE_TOKENS for left in spare]
        fitting = list(itertools.compress(every, fits))
        if not fitting:
            raise UserError(
                f"no question of {task} fits into {wanted.length} tokens",
                where="--length",
                fix=f"use at least {min(sizes)}, and more to hide the facts",
            )
        if len(fitting) < len(every):
            tell(f"{task}: {len(fitting):,} of {len(every):,} questions fit")
        random.Random(f"{wanted.seed} {task}").shuffle(fitting)
        turns.append((task, fitting))
    for number in range(wanted.samples):
        task, questions = turns[number % len(turns)]
        yield task, questions[number // len(turns) % len(questions)]


class _Maker:
    """Prompts whose documents are exactly as long as wanted."""

    def __init__(self, tokenizer: "Tokenizer", background: Background, wanted: Documents) -> None:
        if wanted.bos and tokenizer.bos_id is None:
            raise UserError("the tokenizer has no BOS", where="--bos", fix="leave it out")
        self._tokenizer, self._background, self._wanted = tokenizer, background, wanted
        self._tokens = TextTokens(self._encode, tokenizer.decode)

    def size(self, task: str, question: Question) -> int:
        """Tokens of a document of the facts alone."""
        return self._count(task, question, " ".join(question.facts))

    def prompt(self, task: str, question: Question, number: int) -> str:
        """A prompt, with its answer and EOS ``length`` tokens."""
        for attempt in range(ATTEMPTS):
            dice = random.Random(f"{self._wanted.seed} {task} training {number} {attempt}")
            context = self._context(task, question, dice)
            if context is not None:
                return facts.prompt(task, context, question.question, bare=True)
        raise UserError(
            f"no document of exactly {self._wanted.length} tokens was found in {ATTEMPTS} attempts",
            where="--tokenizer",
            fix="use another length, or a tokenizer of titans data tokenizer",
        )

    def _context(self, task: str, question: Question, dice: random.Random) -> str | None:
        """Facts and background whose document has the length; None where no cut gives it."""
        left = self._wanted.length - self.size(task, question)
        if not left:
            return " ".join(question.facts)
        kept, rest, last = self._sentences(left, dice)
        positions = sorted(dice.randrange(len(kept) + 2) for _ in question.facts)
        for _ in range(_CORRECTIONS):
            text = self._first(rest, last)
            if text is None:
                return None
            context = " ".join(woven(question.facts, positions, [*kept, text]))
            off = self._wanted.length - self._count(task, question, context)
            if not off:
                return context
            last += off  # tokens joined, or did not, where the parts meet
        return None

    def _sentences(self, size: int, dice: random.Random) -> tuple[list[str], str, int]:
        """Whole sentences, the text after them, and how many of its tokens are still needed."""
        drawn = self._background.sentences(size + _SPARE_TOKENS, self._tokens, dice)
        whole = 0
        for ids in self._tokens.ids(drawn):
            if len(ids) >= size:
                break
            whole, size = whole + 1, size - len(ids)
        return drawn[:whole], " ".join(drawn[whole:]), size

    def _first(self, text: str, count: int) -> str | None:
        """The beginning of a text that is so many tokens; None where no cut gives it."""
        near = len(self._tokens.text(self._tokens.ids([text])[0][: max(count, 0)]))
        for shift in sorted(range(-_NEAR, _NEAR + 1), key=abs):
            part = text[: max(near + shift, 0)].strip()
            if part and self._tokens.count(part) == count:
                return part
        return None

    def _count(self, task: str, question: Question, context: str) -> int:
        """Tokens of a document, as ``titans data prepare`` makes them."""
        prompt = facts.prompt(task, context, question.question, bare=True)
        (ids,) = self._encode([prompt + _answer(question)])
        return len(ids) + 1 + self._wanted.bos

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self._tokenizer.encode_arrays(texts)]


def _answer(question: Question) -> str:
    return f" {question.answer}"
