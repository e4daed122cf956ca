"""The global order: a keyed permutation computed on the fly, so that it needs no array.

A balanced-as-possible Feistel network over the next power of two, walked along its cycles until
the value falls inside ``range(count)``.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


def permute(index: NDArray[np.int64], count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the permutation of ``range(count)`` for this seed and epoch sends each index.

    Args:
        index: (n,), values in ``range(count)``.
        count: size of the permuted range.
        seed: names the order.
        epoch: each has a permutation of its own.

    Returns:
        (n,), values in ``range(count)``.
    """
    bits = max(2, (count - 1).bit_length())
    keys = _keys(seed, epoch, count)
    values = index.astype(np.uint64)
    outside = np.ones(len(values), np.bool_)
    while outside.any():
        values[outside] = _feistel(values[outside], bits, keys)
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _keys(seed: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """One key a round."""
    text = f"titans order {seed} {epoch} {count}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8")


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of ``range(2**bits)``: halves of unequal width swap roles every round."""
    right_bits = bits - bits // 2
    left_bits = bits // 2
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
