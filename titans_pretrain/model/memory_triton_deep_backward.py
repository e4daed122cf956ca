# mypy: ignore-errors
# (what is decorated here is Triton's language, whose types are not Python's)
"""Triton kernels of the scan at depth 2, backward: each chunk made again, chunks in reverse.

Notation: ``memory_triton_kernels.py`` and ``memory_triton_deep.py``.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .memory_triton_deep import hidden_2, step_2, surprise_2
from .memory_triton_kernels import (
    activate,
    bend,
    fetch,
    norm,
    product,
    put,
    shrink,
    shrink_backward,
    slope,
)


@triton.jit
def block_backward_2(
    q,
    k,
    v,
    mixing,
    shares,
    anchor,
    source,
    scratch,
    y_grad,
    state_grad,
    anchor_grad,
    q_grad,
    k_grad,
    v_grad,
    mixing_grad,
    shares_grad,
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
):
    """One block: ``state_grad`` from that of its last state to that of its first.

    ``scratch`` holds queries' hidden units before the activation, gradients of the first layer's
    scaled error and of x (block, hidden), and of the second layer's error (block, width). Tiles
    are read again rather than held: registers are what is scarce.
    """
    matrix: tl.constexpr = hidden * width
    plane: tl.constexpr = block * hidden
    rows, at = tl.arange(0, block), tl.arange(0, wide)
    last = live - 1
    at_last = rows == last
    keys = fetch(k, rows, at, live, width)
    queries = fetch(q, rows, at, live, width)
    dy = fetch(y_grad, rows, at, live, width)
    error, x_norm, back_norm = surprise_2(
        keys, fetch(v, rows, at, live, width), anchor,
        width, wide, hidden, tile, block, precision, gelu, residual, clipped,
    )  # fmt: skip
    error_norm, key_norm = norm(error), norm(keys)
    scale = shrink(back_norm, key_norm, clip, clipped)
    error_scale = shrink(error_norm, x_norm, clip, clipped)
    scaled = error * error_scale[:, None]
    mix = fetch(mixing, rows, rows, block, block)
    reach = tl.load(mixing + last * block + rows)[:, None]
    final = tl.load(shares + 2 * block + rows)[:, None]
    carried, past = tl.load(shares + rows)[:, None], tl.load(shares + block + rows)[:, None]
    left, kept = tl.load(shares + last), tl.load(shares + block + last)
    since = tl.load(shares + 3 * block + last)
    key_raw = product(queries, tl.trans(keys), precision)

    # second layer, to the gradient of its scaled error
    mixed = mix * key_raw * scale[None, :]
    raw = tl.zeros([block, block], tl.float32)
    x_w = tl.zeros([block, wide], tl.float32)
    x_s = tl.zeros([block, wide], tl.float32)
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        x = activate(z, gelu)
        back = product(error, second, precision) * slope(z, gelu)
        w1 = fetch(source, units, at, hidden, width)
        s1 = fetch(source + 2 * matrix, units, at, hidden, width)
        h = carried * product(queries, tl.trans(w1), precision)
        h += past * product(queries, tl.trans(s1), precision)
        h -= product(mixed, back, precision)
        put(scratch, h, rows, units, block, hidden)
        raw += product(activate(h, gelu), tl.trans(x), precision)
        dw2 = fetch(state_grad + matrix, at, units, width, hidden)
        ds2 = fetch(state_grad + 3 * matrix, at, units, width, hidden)
        x_w += product(x, tl.trans(dw2), precision)
        x_s += product(x, tl.trans(ds2), precision)
    mixed_grad = -product(dy, tl.trans(scaled), precision)
    put(mixing_grad, raw * mixed_grad, rows, rows, block, block)
    to_raw = mix * mixed_grad
    scaled_grad = -product(tl.trans(mix * raw), dy, precision) - reach * x_w - final * x_s
    reach_grad = -tl.sum(scaled * x_w, 1)
    final_grad = -tl.sum(scaled * x_s, 1)
    along = tl.sum(scaled_grad * error, 1)
    to_error, to_x = shrink_backward(along, error_scale, error_norm, x_norm, clip, clipped)
    error_grad = scaled_grad * error_scale[:, None] + error * to_error[:, None]
    put(scratch + 3 * plane, error_grad, rows, at, block, width)
    key_mixed = mix * key_raw
    tl.debug_barrier()

    # through the second layer's read and the whole of the first layer, to its scaled error
    dq = tl.zeros([block, wide], tl.float32)
    dk = tl.zeros([block, wide], tl.float32)
    if residual:
        dq += dy
    carried_grad = tl.zeros([block], tl.float32)
    past_grad = tl.zeros([block], tl.float32)
    along = tl.zeros([block], tl.float32)
    left_grad = tl.zeros([wide], tl.float32)
    kept_grad = tl.zeros([wide], tl.float32)
    since_grad = tl.zeros([wide], tl.float32)
    key_mixed_grad = tl.zeros([block, block], tl.float32)
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        keys = fetch(k, rows, at, live, width)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        x = activate(z, gelu)
        back = product(error, second, precision) * slope(z, gelu)
        h = fetch(scratch, rows, units, block, hidden)
        r = activate(h, gelu)
        w = fetch(source + matrix, at, units, width, hidden)
        s = fetch(source + 3 * matrix, at, units, width, hidden)
        dw = fetch(state_grad + matrix, at, units, width, hidden)
        ds = fetch(state_grad + 3 * matrix, at, units, width, hidden)
        dy = fetch(y_grad, rows, at, live, width)
        by_w, by_s = product(dy, w, precision), product(dy, s, precision)
        carried_grad += tl.sum(by_w * r, 1)
        past_grad += tl.sum(by_s * r, 1)
        dh = carried * by_w + past * by_s + product(to_raw, x, precision)
        dh *= slope(h, gelu)
        dx = product(tl.trans(to_raw), r, precision) + x * to_x[:, None]
        scaled = error * error_scale[:, None]
        dx -= product(scaled * reach, dw, precision) + product(scaled * final, ds, precision)
        put(scratch + 2 * plane, dx, rows, units, block, hidden)
        left_grad += tl.sum(dw * w, 1)
        kept_grad += tl.sum(dw * s, 1)
        since_grad += tl.sum(ds * s, 1)
        ds = kept * dw + since * ds + product(tl.trans(dy * past), r, precision)
        dw = left * dw + product(tl.trans(dy * carried), r, precision)
        tl.debug_barrier()
        put(state_grad + matrix, dw, at, units, width, hidden)
        put(state_grad + 3 * matrix, ds, at, units, width, hidden)

        w = fetch(source, units, at, hidden, width)
        s = fetch(source + 2 * matrix, units, at, hidden, width)
        dw = fetch(state_grad, units, at, hidden, width)
        ds = fetch(state_grad + 2 * matrix, units, at, hidden, width)
        key_w = product(keys, tl.trans(dw), precision)
        key_s = product(keys, tl.trans(ds), precision)
        key_mixed_grad -= product(dh, tl.trans(back), precision)
        back_grad = -product(tl.trans(key_mixed), dh, precision) - reach * key_w - final * key_s
        put(scratch + plane, back_grad, rows, units, block, hidden)
        along += tl.sum(back_grad * back, 1)
        back *= scale[:, None]
        reach_grad -= tl.sum(back * key_w, 1)
        final_grad -= tl.sum(back * key_s, 1)
        queries = fetch(q, rows, at, live, width)
        by_w, by_s = product(dh, w, precision), product(dh, s, precision)
        carried_grad += tl.sum(by_w * queries, 1)
        past_grad += tl.sum(by_s * queries, 1)
        dq += carried * by_w + past * by_s
        dk -= product(back * reach, dw, precision) + product(back * final, ds, precision)
        left_grad += tl.sum(dw * w, 0)
        kept_grad += tl.sum(dw * s, 0)
        since_grad += tl.sum(ds * s, 0)
        ds = kept * dw + since * ds + product(tl.trans(dh * past), queries, precision)
        dw = left * dw + product(tl.trans(dh * carried), queries, precision)
        tl.debug_barrier()
        put(state_grad, dw, units, at, hidden, width)
        put(state_grad + 2 * matrix, ds, units, at, hidden, width)
    key_mixed_grad *= scale[None, :]
    keys = fetch(k, rows, at, live, width)
    queries = fetch(q, rows, at, live, width)
    own_grad = product(queries, tl.trans(keys), precision) * key_mixed_grad
    own_grad += fetch(mixing_grad, rows, rows, block, block)
    to_raw = fetch(mixing, rows, rows, block, block) * key_mixed_grad
    dq += product(to_raw, keys, precision)
    dk += product(tl.trans(to_raw), queries, precision)
    put(q_grad, dq, rows, at, live, width)
    own_grad += tl.where(at_last[:, None], reach_grad[None, :], 0.0)
    tl.debug_barrier()
    put(mixing_grad, own_grad, rows, rows, block, block)
    tl.store(shares_grad + rows, carried_grad + tl.where(at_last, tl.sum(left_grad, 0), 0.0))
    tl.store(shares_grad + block + rows, past_grad + tl.where(at_last, tl.sum(kept_grad, 0), 0.0))
    tl.store(shares_grad + 2 * block + rows, final_grad)
    tl.store(shares_grad + 3 * block + rows, tl.where(at_last, tl.sum(since_grad, 0), 0.0))
    to_back, to_keys = shrink_backward(along, scale, back_norm, key_norm, clip, clipped)
    dk += keys * to_keys[:, None]
    tl.debug_barrier()

    # through the errors to the anchor, keys and values
    error_grad = fetch(scratch + 3 * plane, rows, at, block, width)
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        back = product(error, second, precision) * slope(z, gelu)
        back_grad = fetch(scratch + plane, rows, units, block, hidden)
        back_grad = back_grad * scale[:, None] + back * to_back[:, None]
        error_grad += product(back_grad * slope(z, gelu), tl.trans(second), precision)
    dp = 2.0 * error_grad
    put(v_grad, -dp, rows, at, live, width)
    if residual:
        dk += dp
    for j in range(0, hidden, tile):
        units = j + tl.arange(0, tile)
        z, second = hidden_2(keys, anchor, units, at, hidden, width, precision)
        by_second = product(error, second, precision)
        bent = slope(z, gelu)
        back_grad = fetch(scratch + plane, rows, units, block, hidden)
        back_grad = back_grad * scale[:, None] + by_second * bent * to_back[:, None]
        dx = fetch(scratch + 2 * plane, rows, units, block, hidden)
        dx += product(dp, second, precision)
        dz = dx * bent + back_grad * by_second * bend(z, gelu)
        first = fetch(anchor, units, at, hidden, width)
        dk += product(dz, first, precision)
        second_grad = fetch(anchor_grad + matrix, at, units, width, hidden)
        second_grad += product(tl.trans(error), back_grad * bent, precision)
        second_grad += product(tl.trans(dp), activate(z, gelu), precision)
        first_grad = fetch(anchor_grad, units, at, hidden, width)
        first_grad += product(tl.trans(dz), keys, precision)
        tl.debug_barrier()
        put(anchor_grad, first_grad, units, at, hidden, width)
        put(anchor_grad + matrix, second_grad, at, units, width, hidden)
    put(k_grad, dk, rows, at, live, width)
    tl.debug_barrier()


@triton.jit
def scan_backward_2(
    q,
    k,
    v,
    mixing,
    shares,
    states,
    inner,
    scratch,
    y_grad,
    state_grad,
    anchor_grad,
    q_grad,
    k_grad,
    v_grad,
    mixing_grad,
    shares_grad,
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
    single: tl.constexpr,
):
    """All gradients; ``state_grad`` is that of the last state and becomes that of the first.

    ``single`` says that a chunk is a block: then the anchor is the state, else its gradient is
    gathered over the chunk in ``anchor_grad`` (2, hidden * width), zero at first, and the states
    inside a chunk are made again in ``inner``.
    """
    pid = tl.program_id(0).to(tl.int64)
    size = tl.full([], 4 * hidden * width, tl.int64)
    states += pid * size * (chunks + 1)
    inner += pid * size * (per_chunk - 1)
    scratch += pid * block * (3 * hidden + width)
    state_grad += pid * size
    if single:
        anchor_grad = state_grad
    else:
        anchor_grad += pid * (2 * hidden * width)
    blocks = pid * chunks * per_chunk
    for late_chunk in range(chunks):
        n = chunks - 1 - late_chunk
        anchor = states + n * size
        tokens = tl.minimum(chunk, time - n * chunk)
        count = tl.cdiv(tokens, block)
        if not single:
            source = anchor
            for b in range(count - 1):
                place = (pid * time + n * chunk + b * block) * width
                index = blocks + n * per_chunk + b
                step_2(
                    q + place, k + place, v + place, q + place,
                    mixing + index * block * block, shares + index * 4 * block,
                    anchor, source, inner + b * size, block, clip,
                    width, wide, hidden, tile, block, precision, gelu, residual, clipped, False,
                )  # fmt: skip
                source = inner + b * size
        for late in range(count):
            b = count - 1 - late
            source = anchor if b == 0 else inner + (b - 1) * size
            place = (pid * time + n * chunk + b * block) * width
            index = blocks + n * per_chunk + b
            own, share = index * block * block, index * 4 * block
            block_backward_2(
                q + place, k + place, v + place, mixing + own, shares + share,
                anchor, source, scratch, y_grad + place, state_grad, anchor_grad,
                q_grad + place, k_grad + place, v_grad + place,
                mixing_grad + own, shares_grad + share,
                tl.minimum(block, tokens - b * block), clip,
                width, wide, hidden, tile, block, precision, gelu, residual, clipped,
            )  # fmt: skip
        if not single:
            for j in range(0, 2 * hidden * width, 1024):
                at = j + tl.arange(0, 1024)
                inside = at < 2 * hidden * width
                gathered = tl.load(anchor_grad + at, mask=inside, other=0.0)
                total = tl.load(state_grad + at, mask=inside, other=0.0) + gathered
                tl.store(state_grad + at, total, mask=inside)
                tl.store(anchor_grad + at, tl.zeros([1024], tl.float32), mask=inside)
            tl.debug_barrier()
