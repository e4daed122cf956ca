"""Which documents a step of a run trains on: from any token back to where it came from."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titans_pretrain import config as run_config
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Place, SequenceLoader, open_loader
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.data.stream import Shard, Spans
from titans_pretrain.errors import UserError

ORIGIN = ("id", "url", "dump")


def describe(
    config: RunConfig, step: int, *, run: Path | None = None, text: bool = False
) -> dict[str, Any]:
    """The documents of the global batch of a step.

    Args:
        config: of the run.
        step: optimizer step, from 1 to ``train.steps``.
        run: the run's directory, which tells how many tokens came before and of which data; None
            counts them from the configuration.
        text: decode the sequences, too.

    Returns:
        ``step``, ``position`` (tokens before it) and ``sequences``: for each its ``manifest``,
        ``epoch`` (from 0), ``shard`` and ``offset`` of its first token in the shard's stream, and
        ``documents``: their ``id``, ``url``, ``dump``, ``shard``, and ``first`` and ``stop``, the
        columns that they take.

    Raises:
        UserError: a step beyond the run, data that cannot be read or is not the run's, or metrics
            that do not tell of the step.
    """
    if step > config.train.steps:
        raise UserError(
            f"step {step} of a run of {config.train.steps}",
            where="train.steps",
            fix=f"ask for one from 1 to {config.train.steps}",
        )
    loader = open_loader(config.data)
    length = config.data.sequence_length
    position, tokens = 0, config.train.global_batch_size * length
    if run is None:
        position = (step - 1) * tokens
    else:
        _check_data(run / "data.json", loader)
        position, tokens = _taken(run / "metrics.jsonl", step, tokens)
    sequences: list[dict[str, Any]] = []
    pieces: list[_Piece] = []
    for place, spans in loader.places(position=position, sequences=tokens // length):
        source = loader.corpus.sources[place.source]
        own = list(_pieces(len(sequences), spans, place))
        pieces += own
        sequences.append(
            {
                "manifest": source.manifest,
                "epoch": place.epoch,
                "shard": own[0].shard.name,
                "offset": own[0].start,
                "documents": [],
            }
        )
        if text:
            sequences[-1]["text"] = _text(source, place, spans)
    for number, document in _documents(pieces):
        sequences[number]["documents"].append(document)
    for sequence in sequences:
        sequence["documents"].sort(key=lambda document: document["first"])
    return {"step": step, "position": position, "sequences": sequences}


def show(place: Path, step: int, *, text: bool = False, as_json: bool = False) -> None:
    """Print ``describe`` of a configuration or of a run's directory."""
    run = place if place.is_dir() else None
    config = run_config.load(place / "config.yaml" if run else place)
    found = describe(config, step, run=run, text=text)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print(f"step {step}: {len(found['sequences'])} sequences from token {found['position']:,} on")
    for row, sequence in enumerate(found["sequences"]):
        print(
            f"\nsequence {row}: {sequence['shard']} from {sequence['offset']:,}, "
            f"epoch {sequence['epoch']}, {sequence['manifest']}"
        )
        for document in sequence["documents"]:
            origin = "  ".join(str(document[name]) for name in ORIGIN if document[name] is not None)
            print(f"  {document['first']:>7}-{document['stop']:<7} {origin}")
        if text:
            print(sequence["text"])


def _check_data(path: Path, loader: SequenceLoader) -> None:
    """Refuse other data than the run's."""
    where, fix = str(path), "give the configuration instead of the run"
    try:
        began = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        raise UserError("the run has not begun", where=where, fix=fix) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot be read: {error!r}", where=where, fix=fix) from None
    found = loader.corpus.fingerprint
    if found != began:
        raise UserError(
            f"the data has fingerprint {found}, the run began with {began}",
            where=where,
            fix="bring the data that the run began with back to its place",
        )


def _taken(metrics: Path, step: int, tokens: int) -> tuple[int, int]:
    """The tokens before a step and those it takes, from a run's metrics; later steps go on evenly.

    Args:
        metrics: the run's ``metrics.jsonl``.
        step: from 1.
        tokens: that a step takes now.
    """
    after, taken = {0: 0}, {}
    for row in _rows(metrics):
        if row.get("event") == "rollback" and not row.get("undone"):
            after[row["step"]] = row["position"]
        elif "event" not in row and "tokens" in row:
            number = row["step"]
            after[number] = row["tokens"]
            taken[number] = row["tokens"] - after.get(number - 1, row["tokens"])
    newest = max(after)
    if step > newest:
        return after[newest] + (step - 1 - newest) * tokens, tokens
    if not taken.get(step):
        raise UserError(
            f"no rows of steps {step - 1} and {step}",
            where=str(metrics),
            fix="ask for a step that they tell of, or give the configuration instead of the run",
        )
    return after[step - 1], taken[step]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows; the last may be torn."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield json.loads(line)


class _Piece(NamedTuple):
    """The part [start, stop) of a shard's stream that a sequence has from a column on."""

    sequence: int
    column: int
    shard: Shard
    start: int
    stop: int


def _pieces(sequence: int, spans: Spans, place: Place) -> Iterator[_Piece]:
    """The parts of a span, one a shard."""
    begin = start = spans.place(place.span)
    stop = min(start + spans.length, spans.stop)
    while start < stop:
        shard, offset = spans.stream.place(start)
        count = min(shard.tokens - offset, stop - start)
        yield _Piece(sequence, start - begin, shard, offset, offset + count)
        start += count


def _text(source: TokenShards, place: Place, spans: Spans) -> str:
    from data_prep.tokenizer import Tokenizer

    start = spans.place(place.span)
    ids = spans.stream.read(start, min(start + spans.length, spans.stop))
    return Tokenizer(source.tokenizer).decode(ids.tolist())


def _documents(pieces: Iterable[_Piece]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each piece's documents with its sequence; one shard's table at a time is in memory."""
    by_shard = defaultdict(list)
    for piece in pieces:
        by_shard[piece.shard].append(piece)
    for shard, own in by_shard.items():
        table = _table(shard.provenance())
        starts, counts = (table[name].to_numpy() for name in ("offset", "tokens"))
        for piece in own:
            first = int(np.searchsorted(starts, piece.start, side="right")) - 1
            end = int(np.searchsorted(starts, piece.stop))
            ahead = piece.column - piece.start
            origins = table.select(ORIGIN).slice(first, end - first).to_pylist()
            for row, origin in enumerate(origins, first):
                begin, stop = int(starts[row]), int(starts[row] + counts[row])
                columns = {
                    "first": max(begin, piece.start) + ahead,
                    "stop": min(stop, piece.stop) + ahead,
                }
                yield piece.sequence, {**origin, "shard": shard.name, **columns}


def _table(path: Path) -> Any:
    """A provenance file as an Arrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=[*ORIGIN, "offset", "tokens"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"cannot read {path.name}: {str(error).splitlines()[0]}",
            where=str(path),
            fix=f"run `titans data verify {path.parent}`",
        ) from None
