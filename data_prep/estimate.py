"""How many tokens a plan will give: the size of its text times the ratio of a small sample."""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep import filters, inputs
from data_prep.inputs import Input
from data_prep.manifest import token_type
from data_prep.settings import Settings
from data_prep.sources import Layout, Reader, Row, shuffled
from data_prep.tokenizer import Tokenizer

SAMPLE_BYTES = 2**20  # of text that is encoded
SAMPLE_UNITS = 16
READ_BYTES = 2**30  # of stored text, read to sample from: units are read whole
FILES = 64  # whose footers are read; the others are taken to be like them
READERS = 16
DOCUMENT_BYTES = 64  # of provenance, compressed: identifiers and addresses of web pages
SAMPLE = 1  # stream of the seed


def expected(
    items: Sequence[Input], layouts: Sequence[Layout], tokenizer: Tokenizer, settings: Settings
) -> dict[str, int]:
    """What preparing will give, from a sample that is the same on every machine.

    Returns:
        ``tokens`` and ``documents`` (held-out ones included), ``bytes`` of all files,
        ``text_bytes`` (UTF-8, as read), and ``units``.
    """
    places = [place for place in shuffled(len(items), SAMPLE) if layouts[place].units][:FILES]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda place: _sizes(items[place], layouts[place].units, settings), places)
    sizes = dict(zip(places, found, strict=True))
    seen = sum(items[place].size for place in places)
    everything = sum(item.size for item in items) / max(seen, 1)
    total = everything * sum(parts.sum() for parts in sizes.values())
    units = [(place, unit) for place in places for unit in range(layouts[place].units)]
    sample, measured = _Sample(tokenizer, settings), 0.0
    with Reader(settings.columns()) as reader:
        for index in shuffled(len(units), SAMPLE)[:SAMPLE_UNITS]:
            if measured >= READ_BYTES:
                break
            place, unit = units[index]
            size = sizes[place][unit]
            share = min(SAMPLE_UNITS, len(units))
            sample.add(reader.rows(items[place], layouts[place], unit), size, SAMPLE_BYTES // share)
            measured += size
    scale = total / measured if measured else 0.0
    tokens, documents = sample.tokens * scale, sample.documents * scale
    width = np.dtype(token_type(tokenizer.vocab_size)).itemsize + bool(settings.prompt_column)
    return {
        "tokens": round(tokens),
        "documents": round(documents),
        "bytes": round(tokens * width * 1.004 + documents * DOCUMENT_BYTES),
        "text_bytes": round(sample.text_bytes * scale),
        "units": sum(shape.units for shape in layouts),
    }


def _sizes(item: Input, units: int, settings: Settings) -> NDArray[np.float64]:
    """Bytes that grow as the text of a file's units does, (units,).

    Of parquet the uncompressed size of the text columns, of other files an equal part.
    """
    if inputs.kind(item.url) != "parquet":
        return np.full(units, item.size / units)
    wanted = {settings.text_column, settings.prompt_column}
    with inputs.open_file(item) as handle:
        footer = pq.ParquetFile(handle, pre_buffer=False).metadata
    groups = [footer.row_group(index) for index in range(units)]
    sizes = [
        sum(
            column.total_uncompressed_size
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema in wanted
        )
        for group in groups
    ]
    return np.array(sizes, np.float64)


class _Sample:
    """Sums over sampled rows.

    Attributes:
        text_bytes: UTF-8 bytes of all texts.
        documents: kept.
        tokens: of these, as far as a part of them tells.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.text_bytes = self.documents = 0
        self.tokens = 0.0

    def add(self, batches: Iterable[Sequence[Row]], size: float, budget: int) -> None:
        """Count a unit's rows; of those kept every n-th is encoded.

        Args:
            batches: of rows.
            size: bytes of their text, about.
            budget: bytes to encode.
        """
        step, documents = max(1, math.ceil(size / budget)), 0
        whole = part = encoded = 0
        for rows in batches:
            kept = [row for row in rows if filters.verdict(row, self._settings) == "kept"]
            chosen = kept[-documents % step :: step]
            texts = [row.prompt + row.text for row in chosen]
            encoded += sum(map(len, self._tokenizer.encode(texts)))
            part += sum(map(_bytes, chosen))
            whole += sum(map(_bytes, kept))
            documents += len(kept)
            self.text_bytes += sum(map(_bytes, rows))
        self.documents += documents
        self.tokens += whole * encoded / max(part, 1) + documents * (1 + self._settings.bos)


def _bytes(row: Row) -> int:
    return len(row.prompt.encode()) + len(row.text.encode())
