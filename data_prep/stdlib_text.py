"""``python -m data_prep.stdlib_text OUT.jsonl``: English prose that every CPython carries.

The language reference of ``pydoc_data.topics`` and the standard library's docstrings, without
doctests, one document a topic or class or module, in FineWeb-Edu's schema. Equal bytes for equal
Pythons.
"""

import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.output import writing

SENTENCES = 1
LONGEST = 4000
SHORTEST = 200
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "__pycache__", "pydoc_data"}
ENTITIES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main(arguments: list[str]) -> int:
    """Write the corpus to the file that the arguments name."""
    if len(arguments) != 1:
        print("usage: python -m data_prep.stdlib_text OUT.jsonl", file=sys.stderr)
        return 2
    output = Path(arguments[0])
    rows = [row(text, name) for name, text in corpus()]
    with writing(output) as handle:
        for values in rows:
            handle.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
    characters = sum(len(str(values["text"])) for values in rows)
    print(f"{output}: {len(rows)} documents, {characters:,} characters")
    return 0


def corpus() -> Iterator[tuple[str, str]]:
    """Names and texts of all documents; no paragraph comes twice."""
    seen: set[str] = set()
    for name, text in (*_topics(), *_docstrings()):
        paragraphs = []
        for paragraph in _paragraphs(text):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        for part, document in enumerate(_grouped(paragraphs)):
            yield f"{name}#{part}", document


def row(text: str, name: str) -> dict[str, object]:
    """A document in FineWeb-Edu's schema."""
    version = f"cpython-{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "text": text,
        "id": hashlib.sha256(text.encode()).hexdigest()[:32],
        "dump": version,
        "url": f"https://docs.python.org/#{name}",
        "file_path": name,
        "language": "en",
        "language_score": 1.0,
        "token_count": len(text.split()),
        "score": 3.0,
        "int_score": 3,
    }


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", re.sub(r"\n\*{3,}\n|\n[=~\-^\"]{3,}\n", "\n\n", topics[name])


def _docstrings() -> Iterator[tuple[str, str]]:
    """A document a module, and one a class: their docstrings and those of their functions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # templates that are no Python
            yield from _entities(tree, relative.with_suffix("").as_posix())


def _entities(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    parts = [_prose(tree)]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _entities(node, f"{name}.{node.name}")
        elif isinstance(node, ENTITIES):
            parts.append(_prose(node))
    if text := "\n\n".join(part for part in parts if part):
        yield name, text


def _prose(node: ast.AST) -> str:
    assert isinstance(node, ENTITIES)
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return text if len(re.findall(r"[a-z)][.?!](?=\s|$)", text)) >= SENTENCES else ""


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs that read as prose: no doctest, no table, no block of code."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = inspect.cleandoc(paragraph).split("\n")
        body = "\n".join(line.rstrip() for line in lines)
        words = re.findall(r"\b[A-Za-z]{2,}\b", body)
        letters = sum(map(len, words))
        if ">>>" not in body and len(words) >= 4 and letters >= 0.6 * len("".join(body.split())):
            yield body


def _grouped(paragraphs: list[str]) -> Iterator[str]:
    """Neighbouring paragraphs as documents of bounded length; short remainders are dropped."""
    group: list[str] = []
    for paragraph in paragraphs:
        if group and sum(map(len, group)) + len(paragraph) > LONGEST:
            yield "\n\n".join(group)
            group = []
        group.append(paragraph)
    document = "\n\n".join(group)
    if len(document) >= SHORTEST:
        yield document


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
