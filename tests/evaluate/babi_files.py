"""bAbI files and background text, made up in their format."""

import random
from pathlib import Path

from titans_pretrain.evaluate.text_tokens import TextTokens

PLACES = ("kitchen", "garden", "office", "hallway")
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra moved to the garden.
2 Where is Sandra? \tgarden\t1
"""


class Words:
    """A tokenizer in transformers' manner whose tokens are words."""

    def __init__(self):
        self.words, self.places = [], {}

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts)}
        return {"input_ids": [self._ids(text) for text in texts]}

    def decode(self, ids, **_):
        return " ".join(self.words[number] for number in ids)

    def _ids(self, text):
        for word in text.split():
            if word not in self.places:
                self.places[word] = len(self.words)
                self.words.append(word)
        return [self.places[word] for word in text.split()]


def words() -> TextTokens:
    return TextTokens.of(Words())


def write_facts(directory: Path, stories: int = 12) -> Path:
    """qa1 of two questions a story, to train on and to test; qa4 of one."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        dice = random.Random(split)
        lines = [line for _ in range(stories) for line in _story(dice)]
        path = directory / f"qa1_single-supporting-fact_{split}.txt"
        path.write_text("\n".join(lines) + "\n")
        lines = [
            "1 The office is north of the garden.",
            "2 The garden is north of the kitchen.",
            "3 What is north of the garden?\toffice\t1",
        ]
        (directory / f"qa4_two-arg-relations_{split}.txt").write_text("\n".join(lines))
    return directory


def write_background(file: Path, sentences: int = 400) -> Path:
    """Sentences of 6 to 30 words, in lines of any length."""
    dice = random.Random(0)
    words, parts = _TEXT.split(), []
    for _ in range(sentences):
        count = dice.randint(6, 30)
        parts.append(" ".join(dice.choice(words) for _ in range(count)).capitalize() + ".")
    file.write_text("".join(part + dice.choice((" ", "\n", "\n\n")) for part in parts))
    return file


def _story(dice: random.Random) -> list[str]:
    lines, where = [], {}
    for number in (1, 2, 4, 5):
        person = dice.choice(PEOPLE)
        where[person] = dice.choice(PLACES), number
        lines.append(f"{number} {person} went to the {where[person][0]}.")
        if number in (2, 5):
            lines.append(f"{number + 1} Where is {person}? \t{where[person][0]}\t{number}")
    return lines


_TEXT = (
    "river learns at test time small waves of surprise pass and nothing is lost in the long "
    "evening while someone reads aloud from an old book about the sea"
)
