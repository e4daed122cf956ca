"""Builds and reads a token stream with one loader, in a process of its own; see data_loader.py.

``build LOADER FOLDER`` makes the loader's files of ``FOLDER/raw.bin``; ``read LOADER FOLDER`` reads
all tokens twice as int64 tensors and prints the tokens and the second pass's processor seconds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

SPAN = 4096
SEQUENCES = 64  # of a batch of ours: 2^18 tokens, as in a member of our tars
PARTS = 8  # that litdata is given the stream in


def spans(folder):
    """The raw stream, (spans, SPAN)."""
    return np.memmap(folder / "raw.bin", np.uint16, "r").reshape(-1, SPAN)


def shuffled(count):
    return np.random.default_rng(0).permutation(count).tolist()


def as_tensor(array):
    return torch.from_numpy(array.astype(np.int64))


def build_mosaic(folder):
    from mosaic import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{SPAN}"}
    with MDSWriter(out=str(folder / "mosaic"), columns=columns, size_limit=2**26) as writer:
        for span in spans(folder):
            writer.write({"tokens": np.array(span)})


def build_litdata(folder):
    from functools import partial

    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader

    optimize(
        fn=partial(litdata_part, folder),
        inputs=list(range(PARTS)),
        output_dir=str(folder / "litdata"),
        chunk_size=512 * SPAN,
        item_loader=TokensLoader(block_size=SPAN),
        num_workers=1,
    )


def litdata_part(folder, part):
    for span in np.array_split(spans(folder), PARTS)[part]:
        yield torch.from_numpy(span.astype(np.int32))


def raw_sequential(folder):
    found = spans(folder)
    return lambda: (as_tensor(span) for span in found)


def raw_random(folder):
    found = spans(folder)
    order = shuffled(len(found))
    return lambda: (as_tensor(found[index]) for index in order)


def webdataset(folder):
    from webdataset import WebDataset

    tars = sorted(map(str, (folder / "ours").glob("*.tar")))

    def read():
        samples = WebDataset(tars, shardshuffle=False, empty_check=False).decode()
        return (as_tensor(sample["npy"]) for sample in samples)

    return read


def mosaic(folder):
    from mosaic import StreamingDataset, clean_stale_shared_memory

    clean_stale_shared_memory()
    return StreamingDataset(
        local=str(folder / "mosaic"), batch_size=8, num_canonical_nodes=1, shuffle=False
    )


def mosaic_iterate(folder):
    data = mosaic(folder)
    return lambda: (as_tensor(sample["tokens"]) for sample in data)


def mosaic_random(folder):
    data = mosaic(folder)
    order = shuffled(len(data))
    return lambda: (as_tensor(data[index]["tokens"]) for index in order)


def litdata_tokens(folder):
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    data = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=SPAN), shuffle=False
    )
    return lambda: (span.long() for span in data)


def ours(*, check, workers):
    def opened(folder):
        from titans_pretrain.data.loader import SequenceLoader
        from titans_pretrain.data.mixture import Corpus
        from titans_pretrain.data.prefetch import ReadAhead

        corpus = Corpus.open([(str(folder / "ours/manifest.json"), 1.0)], check=check)
        loader = SequenceLoader(corpus, sequence_length=SPAN, seed=0, validation_fraction=0)

        def batch(step, position):
            return loader.batch(step=step, position=position, sequences=SEQUENCES, rank=0, ranks=1)

        tokens = SEQUENCES * SPAN
        steps = len(spans(folder)) // SEQUENCES
        rounds = iter(range(10**6))

        def read():
            first = next(rounds) * steps
            ahead = ReadAhead(batch, tokens=tokens, steps=first + steps, workers=workers)
            return (
                ahead.take(step, step * tokens).tokens[:, 1:]
                for step in range(first, first + steps)
            )

        return read

    return opened


BUILDERS = {"mosaic": build_mosaic, "litdata": build_litdata}
READERS: dict[str, Callable[[Path], Callable[[], Iterable[torch.Tensor]]]] = {
    "raw-sequential": raw_sequential,
    "raw-random": raw_random,
    "webdataset": webdataset,
    "mosaic-iterate": mosaic_iterate,
    "mosaic-random": mosaic_random,
    "litdata": litdata_tokens,
    "ours-0": ours(check=False, workers=0),
    "ours-1": ours(check=False, workers=1),
    "ours-checked-0": ours(check=True, workers=0),
    "ours-checked-1": ours(check=True, workers=1),
}


def measure(reader):
    """Tokens of a pass, and the processor seconds of all this process's threads in the second."""
    for _ in range(2):
        started = time.process_time()
        tokens = sum(part.numel() for part in reader())
        seconds = time.process_time() - started
    return {"tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, name, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if verb == "build":
        BUILDERS[name](place)
    else:
        print(json.dumps(measure(READERS[name](place))))
