"""Which documents a step of a run trains on: from any token back to where it came from."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain import config as run_config
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Place, open_loader
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
        step: optimizer step, from 1.
        run: the run's directory, whose metrics tell how many tokens came before; None counts them
            from the configuration.
        text: decode the sequences, too.

    Returns:
        ``step``, ``position`` (tokens before it) and ``sequences``: for each its ``manifest``,
        ``epoch`` (from 0), ``shard`` and ``offset`` of its first token in the shard's stream, and
        ``documents``: their ``id``, ``url``, ``dump``, ``shard``, and ``first`` and ``stop``, the
        columns that they take.

    Raises:
        UserError: data that cannot be read, or metrics that do not tell of the step.
    """
    loader = open_loader(config.data)
    length = config.data.sequence_length
    position, tokens = 0, config.train.global_batch_size * length
    if run is None:
        position = (step - 1) * tokens
    else:
        position, tokens = _taken(run / "metrics.jsonl", step, tokens)
    provenance = _Provenance()
    sequences = []
    for place, spans in loader.places(position=position, sequences=tokens // length):
        source = loader.corpus.sources[place.source]
        sequences.append(_sequence(source, place, spans, provenance))
        if text:
            sequences[-1]["text"] = _text(source, place, spans)
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


def _sequence(
    source: TokenShards, place: Place, spans: Spans, provenance: "_Provenance"
) -> dict[str, Any]:
    start = spans.place(place.span)
    stop = min(start + spans.length, spans.stop)
    shard, offset = spans.stream.place(start)
    found: dict[str, Any] = {
        "manifest": source.manifest,
        "epoch": place.epoch,
        "shard": shard.name,
        "offset": offset,
        "documents": [],
    }
    column = 0
    while start + column < stop:
        shard, offset = spans.stream.place(start + column)
        count = min(shard.tokens - offset, stop - start - column)
        for document in provenance.of(source, shard, offset, offset + count):
            columns = (document.pop("from") - offset, document.pop("to") - offset)
            first, end = max(columns[0], 0) + column, min(columns[1], count) + column
            found["documents"].append(document | {"first": first, "stop": end})
        column += count
    return found


def _text(source: TokenShards, place: Place, spans: Spans) -> str:
    from data_prep.tokenizer import Tokenizer

    start = spans.place(place.span)
    ids = spans.stream.read(start, min(start + spans.length, spans.stop))
    return Tokenizer(source.tokenizer).decode(ids.tolist())


class _Provenance:
    """The provenance files that were asked for."""

    def __init__(self) -> None:
        self._tables: dict[Path, Mapping[str, Any]] = {}

    def of(
        self, source: TokenShards, shard: Shard, start: int, stop: int
    ) -> Iterator[dict[str, Any]]:
        """The documents that have tokens within [start, stop) of a shard's stream."""
        table = self._table(source.storage.local(shard.provenance))
        offsets = table["offset"]
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        for row in range(first, int(np.searchsorted(offsets, stop))):
            begin = int(offsets[row])
            origin = {name: table[name][row] for name in ORIGIN}
            yield origin | {
                "shard": shard.name,
                "from": begin,
                "to": begin + int(table["tokens"][row]),
            }

    def _table(self, path: Path) -> Mapping[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if path not in self._tables:
            try:
                read = pq.read_table(path, columns=[*ORIGIN, "offset", "tokens"])
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"cannot read {path.name}: {str(error).splitlines()[0]}",
                    where=str(path),
                    fix=f"run `titans data verify {path.parent}`",
                ) from None
            columns = {name: read[name].to_pylist() for name in ORIGIN}
            counts = {name: read[name].to_numpy() for name in ("offset", "tokens")}
            self._tables[path] = columns | counts
        return self._tables[path]
