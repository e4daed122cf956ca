"""Ways to read one stream of tokens, as contenders: ours, webdataset's, and the bare file's.

A folder holds the stream as ``raw.bin`` (uint16) and in our format in ``ours/``. Loaders that need
other packages can be built in files of their own with ``passes``.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SPAN = 4096  # tokens of a sequence
SEQUENCES = 64  # of a batch of ours: 2^18 tokens, as in a member of our tars
RAW, OURS = "raw.bin", "ours"
Reader = Callable[[], Iterable[torch.Tensor]]


def build(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """A loader out of ``READERS``; pass ``read`` hands out all tokens once.

    Args:
        options: ``loader`` and ``folder``.
    """
    folder = Path(options["folder"])
    return passes(READERS[options["loader"]](folder), folder)


def passes(read: Reader, folder: Path) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """What a builder returns of a loader; a pass that does not hand out every token fails.

    Args:
        read: gives int64 tensors.
        folder: of the stream.
    """
    torch.set_num_threads(1)
    tokens = spans(folder).size

    def whole() -> None:
        found = sum(part.numel() for part in read())
        if found != tokens:
            raise ValueError(f"{found} of {tokens} tokens were handed out")

    return {"tokens": tokens}, {"read": whole}


def spans(folder: Path) -> NDArray[np.uint16]:
    """The raw stream, (spans, SPAN)."""
    return np.memmap(folder / RAW, np.uint16, "r").reshape(-1, SPAN)


def shuffled(count: int) -> list[int]:
    """An order of that many spans."""
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """int64, copied."""
    return torch.from_numpy(array.astype(np.int64))


def _raw_sequential(folder: Path) -> Reader:
    found = spans(folder)
    return lambda: (as_tensor(span) for span in found)


def _raw_random(folder: Path) -> Reader:
    found = spans(folder)
    order = shuffled(len(found))
    return lambda: (as_tensor(found[index]) for index in order)


def _webdataset(folder: Path) -> Reader:
    from webdataset import WebDataset

    tars = sorted(map(str, (folder / OURS).glob("*.tar")))

    def read() -> Iterator[torch.Tensor]:
        samples = WebDataset(tars, shardshuffle=False, empty_check=False).decode()
        return (as_tensor(sample["npy"]) for sample in samples)

    return read


def _ours(folder: Path, *, check: bool, workers: int) -> Reader:
    from titans_pretrain.data.loader import Batch, SequenceLoader
    from titans_pretrain.data.mixture import Corpus
    from titans_pretrain.data.prefetch import ReadAhead

    corpus = Corpus.open([(str(folder / OURS / "manifest.json"), 1.0)], check=check)
    loader = SequenceLoader(corpus, sequence_length=SPAN, seed=0, validation_fraction=0)

    def batch(step: int, position: int) -> Batch:
        return loader.batch(step=step, position=position, sequences=SEQUENCES, rank=0, ranks=1)

    tokens = SEQUENCES * SPAN
    steps = len(spans(folder)) // SEQUENCES
    epochs = iter(range(10**9))

    def read() -> Iterator[torch.Tensor]:
        first = next(epochs) * steps
        ahead = ReadAhead(batch, tokens=tokens, steps=first + steps, workers=workers)
        return (
            ahead.take(step, step * tokens).tokens[:, 1:] for step in range(first, first + steps)
        )

    return read


READERS: dict[str, Callable[[Path], Reader]] = {
    "raw-sequential": _raw_sequential,
    "raw-random": _raw_random,
    "webdataset": _webdataset,
    "ours-0": partial(_ours, check=False, workers=0),
    "ours-1": partial(_ours, check=False, workers=1),
    "ours-checked-0": partial(_ours, check=True, workers=0),
    "ours-checked-1": partial(_ours, check=True, workers=1),
}
