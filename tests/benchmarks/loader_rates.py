"""Loaders of other libraries, as contenders of ``titans bench data``; see data_loader.py.

Run by the interpreter that has them. ``build LOADER FOLDER`` makes a loader's files of the stream
in a folder.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1]), str(HERE)]  # this project's, whose names others may have

from titans_pretrain.bench.loaders import SPAN, as_tensor, passes, shuffled, spans  # noqa: E402

PARTS = 8  # that litdata is given the stream in


def build_mosaic(folder):
    from mosaic import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{SPAN}"}
    with MDSWriter(out=str(folder / "mosaic"), columns=columns, size_limit=2**26) as writer:
        for span in spans(folder):
            writer.write({"tokens": np.array(span)})


def build_litdata(folder):
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


BUILDERS = {"mosaic": build_mosaic, "litdata": build_litdata}
READERS = {
    "mosaic-iterate": mosaic_iterate,
    "mosaic-random": mosaic_random,
    "litdata": litdata_tokens,
}


def build(options):
    """A loader as a contender, see ``titans_pretrain/bench/worker.py``."""
    folder = Path(options["folder"])
    return passes(READERS[options["loader"]](folder), folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    BUILDERS[sys.argv[2]](Path(sys.argv[3]))
