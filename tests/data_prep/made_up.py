"""A made-up corpus."""

import json
import random

TEXT = """
memory learns at test time what surprises it most and forgets what it has no use for
while attention reads the near past a river of words flows on in 1984 or 2024
"""
WORDS = TEXT.split()


def sentences(count, seed=0):
    """Documents of made-up English, two lines each."""
    draw = random.Random(seed)
    lines = [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 20))).capitalize() + "."
        for _ in range(2 * count)
    ]
    return [f"{first}\n{second}" for first, second in zip(lines[::2], lines[1::2], strict=True)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, seed=0):
    return [
        {
            "text": text,
            "id": f"doc-{seed}-{i}",
            "url": f"https://example.org/{i}",
            "dump": "CC-1",
            "score": 3 + i % 2,
            "language": "en" if i % 4 else "de",
        }
        for i, text in enumerate(sentences(count, seed))
    ]
