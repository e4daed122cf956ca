"""bAbI's questions, BABILong's prompts, and when an answer counts. No torch here."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

TASKS = tuple(f"qa{number}" for number in range(1, 21))
Split = Literal["train", "test"]
_LINE = re.compile(r"([1-9][0-9]*) ([^\t]*)(?:\t([^\t]+)\t([0-9 ]*))?")
_OFFICIAL = Path(__file__).with_name("babilong_prompts.json")
_PARTS = ("instruction", "examples", "post_prompt")
_SINGLE_TARGET_CHARACTERS = 3  # "n,w" is one label, "apple,milk" are two


@dataclass(frozen=True)
class Question:
    """A question and the facts told before it.

    Attributes:
        facts: sentences, in their order.
        question: about them.
        answer: one word, or several with commas between.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def find(directory: Path, task: str, split: Split) -> Path:
    """The file of a task, such as ``qa1_single-supporting-fact_test.txt``.

    Raises:
        UserError: there is none, or more than one.
    """
    pattern = f"{task}_*_{split}.txt"
    found = sorted(directory.glob(pattern))
    if len(found) == 1:
        return found[0]
    inside = sorted(directory.glob(f"*/{pattern}"))
    fix = f"give {inside[0].parent}" if inside else "give the folder en-10k of the bAbI tasks v1.2"
    raise UserError(
        f"{len(found)} files named {pattern} instead of one",
        where=f"--facts {directory}",
        fix="leave one of them there" if found else fix,
    )


def read(path: Path) -> list[Question]:
    """All questions of a bAbI file, each with every fact of its story so far.

    Raises:
        UserError: no such file, or a line that is neither a fact nor a question.
    """
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"the facts cannot be read: {reason}", where=str(path), fix="give bAbI's own files"
        ) from None
    questions, facts = [], list[str]()
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"line {number} is neither a fact nor a question: {line!r}",
                where=str(path),
                fix="give bAbI's own files",
            )
        place, text, answer, _ = match.groups()
        if place == "1":
            facts = []
        if answer is None:
            facts.append(text)
        else:
            questions.append(Question(tuple(facts), text.strip(), answer))
    if not questions:
        raise UserError("it holds no question", where=str(path), fix="give bAbI's own files")
    return questions


def with_few_facts(questions: Iterable[Question], most: int) -> list[Question]:
    """Those of at most so many sentences, the question included."""
    return [one for one in questions if len(one.facts) + 1 <= most]


def prompt(task: str, context: str, question: str, *, bare: bool) -> str:
    """What a model reads.

    Args:
        task: ``qa1`` to ``qa20``.
        context: facts and other text.
        question: the question.
        bare: context and question alone, without instruction, examples and the answer's form.
    """
    parts = {name: "" if bare else official()["tasks"][task][name] for name in _PARTS}
    text: str = official()["template"].format(context=context.strip(), question=question, **parts)
    return text.strip()


def is_right(task: str, question: Question, output: str) -> bool:
    """Whether an output names the answer, and no other of the task's labels.

    Only its first sentence counts, up to an example that the model begins. Labels that the question
    names do not count, nor does upper case.
    """
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    labels = {label.lower() for label in official()["tasks"][task]["labels"]}
    asked = {label for label in labels if label in question.question.lower()}
    named = {label for label in labels if label in said} - asked
    target = question.answer.lower()
    several = "," in target and len(target) > _SINGLE_TARGET_CHARACTERS
    wanted = target.split(",") if several else [target]
    return named == set(wanted) and len(named) == len(wanted)


@cache
def official() -> dict[str, Any]:
    """BABILong's own prompts and labels: ``template`` and ``tasks``."""
    content: dict[str, Any] = json.loads(_OFFICIAL.read_text(encoding="utf-8"))
    return content


def fingerprint() -> str:
    """The sha256 of the prompts and labels."""
    return sha256_file(_OFFICIAL)
