"""Where documents begin inside rows of tokens."""

import numpy as np
from numpy.typing import NDArray


def document_starts(
    tokens: NDArray[np.int64], real: NDArray[np.int64], eos_id: int
) -> NDArray[np.int64]:
    """The column of the first token of each input's document.

    Args:
        tokens: (rows, length + 1); the last column is a target only.
        real: (rows,), tokens of a row that are no pads; pads belong to the last document.
        eos_id: ends every document.

    Returns:
        (rows, length); 0 where the document began before the row.
    """
    columns = np.arange(tokens.shape[1] - 1)
    begins = np.zeros((len(tokens), len(columns)), np.bool_)
    begins[:, 1:] = (tokens[:, :-2] == eos_id) & (columns[1:] < real[:, None])
    return np.maximum.accumulate(np.where(begins, columns, 0), axis=1)


def cut(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Rows of starts cut into pieces of ``length`` columns, (rows * pieces, length)."""
    pieces = starts.reshape(len(starts), -1, length)
    origins = np.arange(pieces.shape[1]) * length
    return np.maximum(pieces - origins[:, None], 0).reshape(-1, length)
