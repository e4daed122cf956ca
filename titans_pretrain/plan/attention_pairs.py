"""How many pairs of a query and a key an attention multiplies. No torch here.

Pairs are those a query sees, or, ``performed``, all of the blocks that plain SDPA multiplies.
"""


def window_pairs(length: int, window: int | None, *, performed: bool) -> int:
    """Causal attention to a sequence over the last ``window`` tokens, None for all before."""
    reach = min(window or length, length)
    if not performed:
        return reach * (reach + 1) // 2 + (length - reach) * reach
    if window is None:
        return length**2
    pairs = 0
    for first in range(0, length, max(reach, 1)):
        last = min(first + reach, length)
        pairs += (last - first) * (last - max(0, first - window + 1))
    return pairs


def segment_pairs(length: int, segment: int, persistent: int, *, performed: bool) -> int:
    """MAC: a token sees the persistent ones, and as many reads as tokens of its segment."""
    whole, rest = divmod(length, segment)
    own = sum(
        count * (n * n if performed else n * (n + 1) // 2)
        for n, count in ((segment, whole), (rest, 1))
    )
    return 2 * own + persistent * length
