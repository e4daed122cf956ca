# mypy: ignore-errors
# (what is decorated here is Triton's language, whose types are not Python's)
"""Triton kernels of the scan at depth 1: the state stays on chip from the first chunk to the last.

Notation: ``memory_triton_kernels.py``. ``starts`` (chunks, 2, width, width) per program are the
states before each chunk, ``inner`` (per_chunk - 1, 2, width, width) room for those before the
further blocks of a chunk.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .memory_triton_kernels import fetch, norm, product, put, shrink, shrink_backward


@triton.jit
def error_1(k, v, anchor, precision: tl.constexpr, residual: tl.constexpr):
    """The gradient of ||M(k) - v||^2 by what the layer gives, not yet clipped."""
    prediction = product(k, tl.trans(anchor), precision)
    if residual:
        prediction += k
    return 2.0 * (prediction - v)


@triton.jit
def write_1(w, s, k, scaled, mixing, shares, last, block: tl.constexpr, precision: tl.constexpr):
    """The state after a block."""
    rows = tl.arange(0, block)
    reach = tl.load(mixing + last * block + rows)
    final = tl.load(shares + 2 * block + rows)
    carried, past = tl.load(shares + last), tl.load(shares + block + last)
    since = tl.load(shares + 3 * block + last)
    written = product(tl.trans(scaled * reach[:, None]), k, precision)
    new_w = carried * w + past * s - written
    new_s = since * s - product(tl.trans(scaled * final[:, None]), k, precision)
    return new_w, new_s


@triton.jit
def scan_forward_1(
    q,
    k,
    v,
    mixing,
    shares,
    state,
    starts,
    y,
    time,
    chunk,
    chunks,
    per_chunk,
    clip,
    width: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
    residual: tl.constexpr,
    clipped: tl.constexpr,
    keep: tl.constexpr,
):
    """Reads, and the state after the last token in place of the first; ``keep`` fills starts."""
    pid = tl.program_id(0).to(tl.int64)
    matrix: tl.constexpr = width * width
    rows, at = tl.arange(0, block), tl.arange(0, wide)
    state += pid * 2 * matrix
    starts += pid * chunks * 2 * matrix
    mixing += pid * chunks * per_chunk * block * block
    shares += pid * chunks * per_chunk * 4 * block
    w = fetch(state, at, at, width, width)
    s = fetch(state + matrix, at, at, width, width)
    for n in range(chunks):
        if keep:
            put(starts, w, at, at, width, width)
            put(starts + matrix, s, at, at, width, width)
            starts += 2 * matrix
        anchor = w
        tokens = tl.minimum(chunk, time - n * chunk)
        for b in range(tl.cdiv(tokens, block)):
            index = n * per_chunk + b
            live = tl.minimum(block, tokens - b * block)
            place = (pid * time + n * chunk + b * block) * width
            own, share = mixing + index * block * block, shares + index * 4 * block
            keys = fetch(k + place, rows, at, live, width)
            queries = fetch(q + place, rows, at, live, width)
            values = fetch(v + place, rows, at, live, width)
            error = error_1(keys, values, anchor, precision, residual)
            scaled = error * shrink(norm(error), norm(keys), clip, clipped)[:, None]
            carried, past = tl.load(share + rows), tl.load(share + block + rows)
            read = carried[:, None] * product(queries, tl.trans(w), precision)
            read += past[:, None] * product(queries, tl.trans(s), precision)
            mixed = product(queries, tl.trans(keys), precision)
            mixed *= fetch(own, rows, rows, block, block)
            read -= product(mixed, scaled, precision)
            if residual:
                read += queries
            put(y + place, read, rows, at, live, width)
            w, s = write_1(w, s, keys, scaled, own, share, live - 1, block, precision)
    put(state, w, at, at, width, width)
    put(state + matrix, s, at, at, width, width)


@triton.jit
def scan_backward_1(
    q,
    k,
    v,
    mixing,
    shares,
    starts,
    inner,
    y_grad,
    state_grad,
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
    block: tl.constexpr,
    precision: tl.constexpr,
    residual: tl.constexpr,
    clipped: tl.constexpr,
):
    """All gradients; ``state_grad`` is that of the last state and becomes that of the first."""
    pid = tl.program_id(0).to(tl.int64)
    matrix: tl.constexpr = width * width
    rows, at = tl.arange(0, block), tl.arange(0, wide)
    state_grad += pid * 2 * matrix
    starts += (pid + 1) * chunks * 2 * matrix
    inner += pid * (per_chunk - 1) * 2 * matrix
    blocks = pid * chunks * per_chunk
    dw = fetch(state_grad, at, at, width, width)
    ds = fetch(state_grad + matrix, at, at, width, width)
    for back in range(chunks):
        n = chunks - 1 - back
        starts -= 2 * matrix
        anchor = fetch(starts, at, at, width, width)
        tokens = tl.minimum(chunk, time - n * chunk)
        count = tl.cdiv(tokens, block)
        w, s = anchor, fetch(starts + matrix, at, at, width, width)
        for b in range(count - 1):
            place = (pid * time + n * chunk + b * block) * width
            index = blocks + n * per_chunk + b
            keys = fetch(k + place, rows, at, block, width)
            values = fetch(v + place, rows, at, block, width)
            error = error_1(keys, values, anchor, precision, residual)
            scaled = error * shrink(norm(error), norm(keys), clip, clipped)[:, None]
            own, share = mixing + index * block * block, shares + index * 4 * block
            w, s = write_1(w, s, keys, scaled, own, share, block - 1, block, precision)
            put(inner + b * 2 * matrix, w, at, at, width, width)
            put(inner + b * 2 * matrix + matrix, s, at, at, width, width)
        tl.debug_barrier()
        anchor_grad = tl.zeros([wide, wide], tl.float32)
        for late in range(count):
            b = count - 1 - late
            if late > 0:
                before = starts if b == 0 else inner + (b - 1) * 2 * matrix
                w = fetch(before, at, at, width, width)
                s = fetch(before + matrix, at, at, width, width)
            index = blocks + n * per_chunk + b
            own, share = mixing + index * block * block, shares + index * 4 * block
            live = tl.minimum(block, tokens - b * block)
            last = live - 1
            place = (pid * time + n * chunk + b * block) * width
            keys = fetch(k + place, rows, at, live, width)
            queries = fetch(q + place, rows, at, live, width)
            values = fetch(v + place, rows, at, live, width)
            dy = fetch(y_grad + place, rows, at, live, width)
            mix = fetch(own, rows, rows, block, block)
            reach, final = tl.load(own + last * block + rows), tl.load(share + 2 * block + rows)
            carried, past = tl.load(share + rows), tl.load(share + block + rows)
            left, kept = tl.load(share + last), tl.load(share + block + last)
            since = tl.load(share + 3 * block + last)
            error = error_1(keys, values, anchor, precision, residual)
            error_norm, key_norm = norm(error), norm(keys)
            scale = shrink(error_norm, key_norm, clip, clipped)
            scaled = error * scale[:, None]

            raw = product(queries, tl.trans(keys), precision)
            mixed_grad = -product(dy, tl.trans(scaled), precision)
            to_raw = mix * mixed_grad
            by_w, by_s = product(dy, w, precision), product(dy, s, precision)
            dq = carried[:, None] * by_w + past[:, None] * by_s + product(to_raw, keys, precision)
            if residual:
                dq += dy
            put(q_grad + place, dq, rows, at, live, width)
            key_w = product(keys, tl.trans(dw), precision)
            key_s = product(keys, tl.trans(ds), precision)
            scaled_grad = -product(tl.trans(mix * raw), dy, precision)
            scaled_grad -= reach[:, None] * key_w + final[:, None] * key_s
            reach_grad = -tl.sum(scaled * key_w, 1)
            final_grad = -tl.sum(scaled * key_s, 1)
            dk = product(tl.trans(to_raw), queries, precision)
            dk -= product(scaled * reach[:, None], dw, precision)
            dk -= product(scaled * final[:, None], ds, precision)

            at_last = rows == last
            out = mixing_grad + index * block * block
            grown = raw * mixed_grad + tl.where(at_last[:, None], reach_grad[None, :], 0.0)
            put(out, grown, rows, rows, block, block)
            out = shares_grad + index * 4 * block + rows
            left_grad, kept_grad = tl.sum(tl.sum(dw * w, 1), 0), tl.sum(tl.sum(dw * s, 1), 0)
            since_grad = tl.sum(tl.sum(ds * s, 1), 0)
            tl.store(out, tl.sum(by_w * queries, 1) + tl.where(at_last, left_grad, 0.0))
            tl.store(out + block, tl.sum(by_s * queries, 1) + tl.where(at_last, kept_grad, 0.0))
            tl.store(out + 2 * block, final_grad)
            tl.store(out + 3 * block, tl.where(at_last, since_grad, 0.0))
            ds = kept * dw + since * ds + product(tl.trans(dy * past[:, None]), queries, precision)
            dw = left * dw + product(tl.trans(dy * carried[:, None]), queries, precision)

            along = tl.sum(scaled_grad * error, 1)
            to_error, to_keys = shrink_backward(along, scale, error_norm, key_norm, clip, clipped)
            dp = 2.0 * (scaled_grad * scale[:, None] + error * to_error[:, None])
            dk += keys * to_keys[:, None] + product(dp, anchor, precision)
            if residual:
                dk += dp
            put(k_grad + place, dk, rows, at, live, width)
            put(v_grad + place, -dp, rows, at, live, width)
            anchor_grad += product(tl.trans(dp), keys, precision)
        dw += anchor_grad
        tl.debug_barrier()
    put(state_grad, dw, at, at, width, width)
    put(state_grad + matrix, ds, at, at, width, width)
