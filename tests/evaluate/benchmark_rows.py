"""Made-up rows of the nine benchmarks, in the columns they have on the Hub."""

import json
import random
from pathlib import Path

from tiny import WORDS


def rows(count: int = 5, seed: int = 0) -> dict[str, list[dict]]:
    """Benchmark -> its rows."""
    dice = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(least, most)))

    def arc(number: int) -> dict:
        labels = ["A", "B", "C", "D"]
        listed = {"text": [words(1, 4) for _ in labels], "label": labels}
        return {"question": words(3, 9), "choices": listed, "answerKey": labels[number % 4]}

    makers = {
        "wikitext": lambda n: {"page": f" = {words(1, 2)} = \n \n {words(20, 60)} . \n"},
        "lambada_openai": lambda n: {"text": words(6, 30)},
        "piqa": lambda n: {
            "goal": words(3, 9),
            "sol1": words(1, 6),
            "sol2": words(1, 6),
            "label": n % 2,
        },
        "hellaswag": lambda n: {
            "activity_label": words(1, 2),
            "ctx_a": words(3, 9),
            "ctx_b": words(1, 2),
            "endings": [words(1, 6) for _ in range(4)],
            "label": str(n % 4),
        },
        "winogrande": lambda n: {
            "sentence": f"{words(2, 5)} _ {words(1, 4)}",
            "option1": "river",
            "option2": "waves",
            "answer": str(n % 2 + 1),
        },
        "arc_easy": arc,
        "arc_challenge": arc,
        "social_iqa": lambda n: {
            "context": words(3, 9),
            "question": words(2, 5),
            **{f"answer{letter}": words(1, 4) for letter in "ABC"},
            "label": str(n % 3 + 1),
        },
        "boolq": lambda n: {"passage": words(9, 40), "question": words(2, 6), "label": n % 2},
    }
    return {name: [make(number) for number in range(count)] for name, make in makers.items()}


def write(directory: Path, **changes: list[dict]) -> Path:
    """A directory for ``--task-data``; ``changes`` are other rows of some benchmarks."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, several in (rows() | changes).items():
        text = "".join(json.dumps(row) + "\n" for row in several)
        (directory / f"{name}.jsonl").write_text(text)
    return directory
