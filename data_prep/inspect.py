"""``titans data inspect``: what a prepared directory holds."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.output import writing
from data_prep.tar import TarStream
from data_prep.tokenizer import Tokenizer
from data_prep.verify import open_stream
from titans_pretrain.errors import UserError

BAR = 40  # characters of the longest bar


def inspect(directory: Path, documents: int, *, histogram: Path | None = None) -> None:
    """Print counts, the lengths of documents, and the first documents, decoded.

    Args:
        directory: the prepared directory.
        documents: how many to print.
        histogram: a PNG file to draw the lengths to.

    Raises:
        UserError: no manifest, or a tokenizer other than the data's.
    """
    content = manifest.load(directory / manifest.MANIFEST)
    shards = [*content["shards"], *content["held_out"]]
    print(_summary(content, sum(bytes_ for _, bytes_ in manifest.sizes(shards))))
    lengths, counts = lengths_of(directory, shards)
    print("\n" + histogram_text(lengths, counts))
    if histogram:
        draw(histogram, lengths, counts)
        print(f"\n{histogram}: drawn")
    tokenizer = load_tokenizer(directory, content)
    for shard in content["shards"]:
        if documents <= 0:
            break
        table = pq.read_table(directory / shard["provenance"]["name"]).slice(0, documents)
        _show(open_stream(directory, content, shard), table, tokenizer, shard["name"])
        documents -= table.num_rows


def _summary(content: Mapping[str, Any], size: int) -> str:
    counts = content["documents"]
    reasons = [key for key in counts if key not in ("read", "kept", "held_out", "repaired")]
    dropped = ", ".join(f"{counts[key]:,} {key}" for key in reasons if counts[key]) or "none"
    bos = f", BOS {content['bos_id']}" if content["bos"] else ""
    shards, held_out = len(content["shards"]), len(content["held_out"])
    lines = {
        "shards": f"{shards} and {held_out} held out ({size:,} bytes)",
        "tokens": f"{content['tokens']:,} and {content['held_out_tokens']:,} held out "
        f"({content['dtype']})",
        "documents": f"{counts['kept']:,} of {counts['read']:,} (dropped: {dropped})",
        "of these": f"{counts.get('held_out', 0):,} held out, "
        f"{counts.get('repaired', 0):,} with characters that were repaired",
        "vocabulary": f"{content['vocab_size']:,}, EOS {content['eos_id']}{bos}",
        "unigram entropy": f"{content['unigram_entropy']:.3f} nats per token",
        "fingerprint": content["fingerprint"],
    }
    return "\n".join(f"{name:<18}{line}" for name, line in lines.items())


def lengths_of(
    directory: Path, shards: Sequence[Mapping[str, Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents' lengths in tokens, ascending, and how many have each, both (lengths,)."""
    lengths = counts = np.zeros(0, np.int64)
    for shard in shards:
        found = pq.read_table(_provenance(directory, shard), columns=["tokens"])[
            "tokens"
        ].to_numpy()
        own, times = np.unique(found, return_counts=True)
        lengths, place = np.unique(np.concatenate([lengths, own]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times])).astype(np.int64)
    return lengths, counts


def _provenance(directory: Path, shard: Mapping[str, Any]) -> Path:
    """A shard's provenance, with the checksum that the manifest tells."""
    path = directory / shard["provenance"]["name"]
    if problem := manifest.file_problem(directory, shard["provenance"]):
        raise UserError(problem, where=str(path), fix=manifest.redo(directory, shard["task"]))
    return path


def histogram_text(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> str:
    """Mean and quantiles, then a bar for each power of two."""
    bins = np.bincount(np.log2(lengths).astype(np.int64), counts).astype(np.int64)
    first = int(np.flatnonzero(bins)[0])
    lines = [f"tokens a document: {_quantiles(lengths, counts)}"]
    for power in range(first, len(bins)):
        bar = "#" * -(-BAR * int(bins[power]) // int(bins.max()))
        lines.append(f"{2**power:>11,} - {2 ** (power + 1) - 1:<11,}{bins[power]:>13,}  {bar}")
    return "\n".join(line.rstrip() for line in lines)


def _quantiles(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> str:
    total, sums = counts.sum(), np.cumsum(counts)
    median, most = (lengths[np.searchsorted(sums, share * total)] for share in (0.5, 0.99))
    mean = float(lengths @ counts) / total
    return f"mean {mean:,.0f}, median {median:,}, 99 % up to {most:,}, longest {lengths[-1]:,}"


def draw(path: Path, lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Draw the histogram: logarithmic lengths; documents, and the tokens that lie in them.

    Raises:
        UserError: no matplotlib, or a place that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the package `matplotlib` is not installed",
            where="--histogram",
            fix="pip install matplotlib, or leave out --histogram",
        ) from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    edges = (2 ** np.arange(0, np.log2(lengths[-1]) + 0.5, 0.25)).tolist()
    for weights, name in ((counts, "documents"), (counts * lengths, "tokens")):
        share = weights / weights.sum()
        axes.hist(lengths, edges, weights=share, histtype="step", linewidth=1.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens a document")
    axes.set_ylabel("share")
    axes.set_title(_quantiles(lengths, counts), fontsize="small")
    axes.legend()
    with writing(path) as handle:
        figure.savefig(handle, format="png", dpi=150)


def load_tokenizer(directory: Path, content: Mapping[str, Any]) -> Tokenizer:
    """The directory's tokenizer.

    Raises:
        UserError: it is missing or not the one that the data was prepared with.
    """
    tokenizer = Tokenizer(directory / manifest.TOKENIZER)
    if tokenizer.sha256 != content["tokenizer_sha256"]:
        raise UserError(
            "the tokenizer is not the one that the data was prepared with",
            where=str(tokenizer.path),
            fix=f"copy back the model with sha256 {content['tokenizer_sha256']}",
        )
    return tokenizer


def _show(stream: TarStream, table: pa.Table, tokenizer: Tokenizer, name: str) -> None:
    for row in table.to_pylist():
        print(f"\n--- {name} {row['offset']}: {row['id'] or 'no id'}, {row['tokens']} tokens")
        ids = stream.read(row["offset"], row["tokens"] - 1)
        sys.stdout.write(tokenizer.decode(ids.tolist()) + "\n")
