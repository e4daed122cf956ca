# mypy: ignore-errors
# (what is decorated here is Triton's language, whose types are not Python's)
"""Triton kernels of the scan at depth 2, forward: the state in global memory, tile by tile.

Notation: ``memory_triton_kernels.py``; ``x`` are the keys' activations, ``r`` the queries'. A state
is read from one slot and written to another. What one phase writes and another reads is separated
by a barrier, for threads of a program share out the two differently.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .memory_triton_kernels import activate, fetch, norm, product, put, shrink, slope


@triton.jit
def hidden_2(
    keys, anchor, units, at, hidden: tl.constexpr, width: tl.constexpr, precision: tl.constexpr
):
    """The keys' hidden units before the activation, and the second layer's weights from these."""
    first = fetch(anchor, units, at, hidden, width)
    second = fetch(anchor + hidden * width, at, units, width, hidden)
    return product(keys, tl.trans(first), precision), second


@triton.jit
def surprise_2(
    keys,
    values,
    anchor,
    width: tl.constexpr,
    wide: tl.constexpr,
    hidden: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
    gelu: tl.constexpr,
    residual: tl.constexpr,
    clipped: tl.constexpr,
):
    """The second layer's error (block, wide), norms of x and of the first layer's error."""
    at = tl.arange(0, wide)
    prediction = tl.zeros([block, wide], tl.float32)
    x_square = tl.zeros([block], tl.float32)
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        x = activate(z, gelu)
        prediction += product(x, tl.trans(second), precision)
        x_square += tl.sum(x * x, 1)
    if residual:
        prediction += keys
    error = 2.0 * (prediction - values)
    square = tl.zeros([block], tl.float32)
    if clipped:
        for j in range(0, hidden, tile):
            units = j + tl.arange(0, tile)
            z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
            back = product(error, second, precision) * slope(z, gelu)
            square += tl.sum(back * back, 1)
    return error, tl.sqrt(x_square), tl.sqrt(square)


@triton.jit
def step_2(
    q,
    k,
    v,
    y,
    mixing,
    shares,
    anchor,
    source,
    target,
    live,
    clip,
    width: tl.constexpr,
    wide: tl.constexpr,
    hidden: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
    gelu: tl.constexpr,
    residual: tl.constexpr,
    clipped: tl.constexpr,
    reads: tl.constexpr,
):
    """One block: the state from ``source`` to ``target``, which may be one; ``reads`` fills y."""
    matrix: tl.constexpr = hidden * width
    rows, at = tl.arange(0, block), tl.arange(0, wide)
    keys = fetch(k, rows, at, live, width)
    error, x_norm, back_norm = surprise_2(
        keys, fetch(v, rows, at, live, width), anchor,
        width, wide, hidden, tile, block, precision, gelu, residual, clipped,
    )  # fmt: skip
    scale = shrink(back_norm, norm(keys), clip, clipped)
    scaled = error * shrink(norm(error), x_norm, clip, clipped)[:, None]
    last = live - 1
    reach, final = tl.load(mixing + last * block + rows), tl.load(shares + 2 * block + rows)
    carried, past = tl.load(shares + rows)[:, None], tl.load(shares + block + rows)[:, None]
    left, kept = tl.load(shares + last), tl.load(shares + block + last)
    since = tl.load(shares + 3 * block + last)
    if reads:
        mix = fetch(mixing, rows, rows, block, block)
        queries = fetch(q, rows, at, live, width)
        mixed = mix * product(queries, tl.trans(keys), precision) * scale[None, :]
        read = tl.zeros([block, wide], tl.float32)
        raw = tl.zeros([block, block], tl.float32)
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        x = activate(z, gelu)
        back = product(error, second, precision) * slope(z, gelu)
        w1 = fetch(source, units, at, hidden, width)
        w2 = fetch(source + matrix, at, units, width, hidden)
        s1 = fetch(source + 2 * matrix, units, at, hidden, width)
        s2 = fetch(source + 3 * matrix, at, units, width, hidden)
        if reads:
            h = carried * product(queries, tl.trans(w1), precision)
            h += past * product(queries, tl.trans(s1), precision)
            r = activate(h - product(mixed, back, precision), gelu)
            read += carried * product(r, tl.trans(w2), precision)
            read += past * product(r, tl.trans(s2), precision)
            raw += product(r, tl.trans(x), precision)
        back *= scale[:, None]
        w1 = left * w1 + kept * s1 - product(tl.trans(back * reach[:, None]), keys, precision)
        s1 = since * s1 - product(tl.trans(back * final[:, None]), keys, precision)
        w2 = left * w2 + kept * s2 - product(tl.trans(scaled * reach[:, None]), x, precision)
        s2 = since * s2 - product(tl.trans(scaled * final[:, None]), x, precision)
        tl.debug_barrier()
        put(target, w1, units, at, hidden, width)
        put(target + matrix, w2, at, units, width, hidden)
        put(target + 2 * matrix, s1, units, at, hidden, width)
        put(target + 3 * matrix, s2, at, units, width, hidden)
    if reads:
        read -= product(mix * raw, scaled, precision)
        if residual:
            read += queries
        put(y, read, rows, at, live, width)
    tl.debug_barrier()


@triton.jit
def scan_forward_2(
    q,
    k,
    v,
    mixing,
    shares,
    states,
    y,
    time,
    chunk,
    chunks,
    per_chunk,
    clip,
    width: tl.constexpr,
    wide: tl.constexpr,
    hidden: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
    gelu: tl.constexpr,
    residual: tl.constexpr,
    clipped: tl.constexpr,
    keep: tl.constexpr,
):
    """Reads and states: slot n before chunk n, or two slots in turn where not to ``keep`` them."""
    pid = tl.program_id(0).to(tl.int64)
    size = tl.full([], 4 * hidden * width, tl.int64)
    states += pid * size * (chunks + 1 if keep else 2)
    blocks = pid * chunks * per_chunk
    for n in range(chunks):
        if keep:
            anchor, target = states + n * size, states + (n + 1) * size
        else:
            anchor, target = states + n % 2 * size, states + (n + 1) % 2 * size
        source = anchor
        tokens = tl.minimum(chunk, time - n * chunk)
        for b in range(tl.cdiv(tokens, block)):
            place = (pid * time + n * chunk + b * block) * width
            index = blocks + n * per_chunk + b
            step_2(
                q + place, k + place, v + place, y + place,
                mixing + index * block * block, shares + index * 4 * block,
                anchor, source, target, tl.minimum(block, tokens - b * block), clip,
                width, wide, hidden, tile, block, precision, gelu, residual, clipped, True,
            )  # fmt: skip
            source = target
