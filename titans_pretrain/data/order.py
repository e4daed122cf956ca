"""The global order: a keyed permutation computed on the fly, so that it needs no array.

A Feistel network over pairs (left, right) of about the square root each, walked along its cycles
in the rare case that a value falls outside ``range(count)``.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def permute(
    index: NDArray[np.int64], count: int, *, seed: int, epoch: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where the permutation of ``range(count)`` for this seed and epoch sends each index.

    Args:
        index: (n,), values in ``range(count)``.
        count: size of the permuted range.
        seed: names the order.
        epoch: each has a permutation of its own; one for all indices, or (n,).

    Returns:
        (n,), values in ``range(count)``.
    """
    epochs = np.atleast_1d(np.asarray(epoch, np.uint64))
    keys = _keys(seed, epochs[:1] if (epochs == epochs[:1]).all() else epochs, count)
    values = index.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        own = keys if keys.shape[1] == 1 else keys[:, outside]
        values[outside] = _feistel(values[outside], count, own)
        outside = outside[values[outside] >= np.uint64(count)]
    return values.astype(np.int64)


def _keys(seed: int, epochs: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """One key a round for each epoch, (ROUNDS, epochs); a mixture needs those of 1000 at once."""
    text = f"titans order {seed} {count}".encode()
    words = np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8")
    return _mix(epochs * _GOLDEN, words[:, None])


def _feistel(
    values: NDArray[np.uint64], count: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A permutation of ``range(a * b)``, a * b being little above count.

    Args:
        values: (n,).
        count: see above.
        keys: (rounds, n), or (rounds, 1) for all alike.
    """
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    left, right = np.divmod(values, np.uint64(b))
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + _mix(left, key) % np.uint64(b)) % np.uint64(b)
        else:
            left = (left + _mix(right, key) % np.uint64(a)) % np.uint64(a)
    return left * np.uint64(b) + right


def _mix(values: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of values and key reaches every output bit."""
    x = values ^ key
    x ^= x >> _SHIFTS[0]
    x *= _MULTIPLIERS[0]
    x ^= x >> _SHIFTS[1]
    x *= _MULTIPLIERS[1]
    x ^= x >> _SHIFTS[2]
    return x
