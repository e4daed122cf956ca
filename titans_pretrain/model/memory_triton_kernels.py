# mypy: ignore-errors
# (what is decorated here is Triton's language, whose types are not Python's)
"""Triton kernels of the memory's scan: coefficients, and forward and backward for depth 1 and 2.

A program is one batch row and head and walks over the chunks in order, a chunk in blocks of at most
64 tokens. Names follow the dual form of ``memory_chunk.py``: x a layer's inputs, ``error`` what is
propagated back to its outputs, ``mixing`` (block, block) the share of token i's surprise in the
weights after token t, ``shares`` (4, block) the rows: share of W in the weights, of S in the
weights, of surprises in the last momentum, of S in the momentum. Row ``last`` is that of the
block's last token; rows past it are padding.

A state is [W1, S1] at depth 1 and [W1, W2, S1, S2] at depth 2, each (out, in), one after the other.
``wide`` is the head width padded to a power of two, ``tile`` the hidden units held at once.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def product(a, b, precision: tl.constexpr):
    """A matrix product, accumulated in float32."""
    if precision == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif precision == "rounded":  # the interpreter cannot multiply bfloat16
        left, right = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
        result = tl.dot(left, right, input_precision="tf32x3")
    else:
        result = tl.dot(a, b, input_precision=precision)
    return result


@triton.jit
def fetch(base, rows, cols, n_rows, n_cols):
    """Rows and columns of a row-major matrix in float32, zero outside."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tile = tl.load(base + rows[:, None] * n_cols + cols[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def put(base, tile, rows, cols, n_rows, n_cols):
    """The counterpart of ``fetch``."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(base + rows[:, None] * n_cols + cols[None, :], tile, mask=inside)


@triton.jit
def activate(x, gelu: tl.constexpr):
    """GELU, exact, or SiLU."""
    return x * (0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) if gelu else tl.sigmoid(x))


@triton.jit
def slope(x, gelu: tl.constexpr):
    """The activation's derivative."""
    if gelu:
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        result = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    else:
        s = tl.sigmoid(x)
        result = s * (1.0 + x * (1.0 - s))
    return result


@triton.jit
def bend(x, gelu: tl.constexpr):
    """The activation's second derivative."""
    if gelu:
        result = tl.exp(-0.5 * x * x) * 0.3989422804014327 * (2.0 - x * x)
    else:
        s = tl.sigmoid(x)
        result = s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    return result


@triton.jit
def norm(x):
    """Of each row."""
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def ratio(a, b):
    """A / b, zero where b is: the slope of a norm at zero counts as zero."""
    return tl.where(b > 0, a / tl.where(b > 0, b, 1.0), 0.0)


@triton.jit
def shrink(error_norm, x_norm, clip, clipped: tl.constexpr):
    """What each token's surprise in a layer is scaled by."""
    scale = tl.zeros_like(error_norm) + 1.0
    if clipped:
        scale = clip / (error_norm * x_norm + clip)
    return scale


@triton.jit
def shrink_backward(along, scale, error_norm, x_norm, clip, clipped: tl.constexpr):
    """From the scaled error's gradient along the error: how much of error and of x to add."""
    if clipped:
        pull = -scale * scale / clip * along
        to_error, to_x = pull * ratio(x_norm, error_norm), pull * ratio(error_norm, x_norm)
    else:
        to_error, to_x = tl.zeros_like(along), tl.zeros_like(along)
    return to_error, to_x


@triton.jit
def products_since(factors, rows):
    """P[t, j]: the product of factors over j < m <= t, zero above the diagonal; exact at 0."""
    below = rows[:, None] > rows[None, :]
    grown = tl.cumprod(tl.where(below, factors[:, None], 1.0), 0)
    return tl.where(rows[:, None] >= rows[None, :], grown, 0.0)


@triton.jit
def load_gate(gate, first, rows, live, otherwise):
    """A gate of a block's tokens, the first at ``first``."""
    return tl.load(gate + first + rows, mask=rows < live, other=otherwise).to(tl.float32)


@triton.jit
def coefficients_forward(
    forget, momentum, step, mixing, shares, time, chunk, per_chunk, block: tl.constexpr
):
    """One block's mixing and shares; program (block, row and head)."""
    index, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = index // per_chunk * chunk + index % per_chunk * block
    live = tl.minimum(tl.minimum(block, chunk - index % per_chunk * block), time - first)
    rows, here = tl.arange(0, block), pid * time + first
    place = pid * tl.num_programs(0) + index
    left = 1.0 - load_gate(forget, here, rows, live, 0.0)
    eta = load_gate(momentum, here, rows, live, 1.0)
    theta = load_gate(step, here, rows, live, 0.0)
    decay = products_since(left, rows)
    kept = products_since(eta, rows)
    kept_since = tl.cumprod(eta, 0)
    own = tl.dot(decay, kept, input_precision="tf32x3") * theta[None, :]
    put(mixing + place * block * block, own, rows, rows, block, block)
    shares += place * 4 * block
    tl.store(shares + rows, tl.cumprod(left, 0))
    tl.store(shares + block + rows, tl.sum(decay * kept_since[None, :], 1))
    final = tl.sum(tl.where(rows[:, None] == live - 1, kept, 0.0), 0)
    tl.store(shares + 2 * block + rows, final * theta)
    tl.store(shares + 3 * block + rows, kept_since)


@triton.jit
def factor_grad(kept, kept_grad, since_grad, factors_before, rows):
    """Gradient of the factors behind ``products_since`` and their running product."""
    total = tl.dot(tl.trans(kept), kept_grad, input_precision="tf32x3")
    below = rows[:, None] > rows[None, :]
    grown = tl.where(rows[:, None] > rows[None, :] + 1, factors_before[:, None], 1.0)
    earlier = tl.where(below, tl.cumprod(grown, 0), 0.0)
    since_total = tl.sum(kept * since_grad[:, None], 0)
    return tl.sum(total * earlier, 1) + since_total * tl.cumprod(factors_before, 0)


@triton.jit
def coefficients_backward(
    forget,
    momentum,
    step,
    mixing_grad,
    shares_grad,
    forget_grad,
    momentum_grad,
    step_grad,
    time,
    chunk,
    per_chunk,
    block: tl.constexpr,
):
    """Gradients of one block's gates; program (block, row and head)."""
    index, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = index // per_chunk * chunk + index % per_chunk * block
    live = tl.minimum(tl.minimum(block, chunk - index % per_chunk * block), time - first)
    rows, here = tl.arange(0, block), pid * time + first
    inside = rows < live
    place = pid * tl.num_programs(0) + index
    left = 1.0 - load_gate(forget, here, rows, live, 0.0)
    eta = load_gate(momentum, here, rows, live, 1.0)
    theta = load_gate(step, here, rows, live, 0.0)
    before = inside & (rows > 0)
    left_before = 1.0 - tl.load(forget + here + rows - 1, mask=before, other=0.0).to(tl.float32)
    eta_before = tl.load(momentum + here + rows - 1, mask=before, other=1.0).to(tl.float32)
    decay = products_since(left, rows)
    kept = products_since(eta, rows)
    kept_since = tl.cumprod(eta, 0)
    at_end = rows[:, None] == live - 1
    shares_grad += place * 4 * block
    own_grad = fetch(mixing_grad + place * block * block, rows, rows, live, block)
    carried_grad = tl.load(shares_grad + rows, mask=inside, other=0.0)
    past_grad = tl.load(shares_grad + block + rows, mask=inside, other=0.0)
    final_grad = tl.load(shares_grad + 2 * block + rows, mask=inside, other=0.0)
    since_grad = tl.load(shares_grad + 3 * block + rows, mask=inside, other=0.0)

    own = tl.dot(decay, kept, input_precision="tf32x3")
    final = tl.sum(tl.where(at_end, kept, 0.0), 0)
    theta_grad = tl.sum(own_grad * own, 0) + final_grad * final
    own_grad = own_grad * theta[None, :]
    decay_grad = tl.dot(own_grad, tl.trans(kept), input_precision="tf32x3")
    decay_grad += past_grad[:, None] * kept_since[None, :]
    kept_grad = tl.dot(tl.trans(decay), own_grad, input_precision="tf32x3")
    kept_grad += tl.where(at_end, (final_grad * theta)[None, :], 0.0)
    since_grad += tl.sum(decay * past_grad[:, None], 0)
    left_grad = factor_grad(decay, decay_grad, carried_grad, left_before, rows)
    eta_grad = factor_grad(kept, kept_grad, since_grad, eta_before, rows)
    tl.store(forget_grad + here + rows, -left_grad, mask=inside)
    tl.store(momentum_grad + here + rows, eta_grad, mask=inside)
    tl.store(step_grad + here + rows, theta_grad, mask=inside)
