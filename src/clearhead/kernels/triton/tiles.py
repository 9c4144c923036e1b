"""What the forward and the backward pass share: how rows are numbered, and how tiles are loaded and masked.

The rows of a key-value group are the tokens of all its query heads, token by token: row r is token r // R of head
g·R + r % R, with R query heads a group. So one program serves several heads with one read of K and V, and a block of
rows covers neighbouring tokens. Logits are held in base 2: t = scale · log2(e) · q kᵀ − slope · log2(e) · distance.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def exact(a, b):
    """a b in Triton's interpreter, rounded to float32 once.

    The interpreter multiplies with NumPy, whose float32 sums differ from processor to processor, and takes the bits of
    bfloat16 for integers.
    """
    return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32."""
    if PRECISION == "interpreter":
        total += exact(a, b)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def scores(a, b, PRECISION: tl.constexpr):
    """a b in float32."""
    tile = exact(a, b) if PRECISION == "interpreter" else tl.dot(a, b, input_precision=PRECISION)
    return tile


@triton.jit
def load_rows(base, rows, inside, stride, WIDTH: tl.constexpr, D: tl.constexpr):
    """(rows, WIDTH) with zeros beyond D and where `inside` is false; WIDTH is D or the power of two above it."""
    columns = tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if D == WIDTH:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def load_packed(base, tokens, heads, inside, stride_head, stride_token, WIDTH: tl.constexpr, D: tl.constexpr):
    """`load_rows` of rows that are tokens of several heads."""
    starts = heads.to(tl.int64) * stride_head + tokens.to(tl.int64) * stride_token
    return load_rows(base, starts, inside, 1, WIDTH, D)


@triton.jit
def store_packed(
    base, tile, tokens, heads, inside, stride_head, stride_token, WIDTH: tl.constexpr, D: tl.constexpr
):
    columns = tl.arange(0, WIDTH)
    starts = heads.to(tl.int64) * stride_head + tokens.to(tl.int64) * stride_token
    there = inside[:, None]
    if D != WIDTH:
        there = there & (columns < D)[None, :]
    tl.store(base + starts[:, None] + columns[None, :], tile.to(base.dtype.element_ty), mask=there)


@triton.jit
def visible(
    positions,
    row_documents,
    keys,
    real,
    key_documents,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Which keys each row sees. Rows and keys come as (M, 1) and (1, N), or the other way round."""
    seen = real & (positions == positions)
    if CAUSAL:
        seen = seen & (keys <= positions)
    if WINDOW:
        seen = seen & (keys - positions < window) & (positions - keys < window)
    if DOCUMENTS:
        seen = seen & (row_documents == key_documents)
    return seen


@triton.jit
def key_range(first, last, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[low, high): the keys that a row at a position from `first` to `last` may see, by the causal mask and the window;
    and [all_low, all_high): those that each of these rows sees."""
    low, high = 0, keys
    all_low, all_high = 0, keys
    if CAUSAL:
        high = tl.minimum(keys, last + 1)
        all_high = tl.minimum(keys, first + 1)
    elif WINDOW:
        high = tl.minimum(keys, last + window)
        all_high = tl.minimum(keys, first + window)
    if WINDOW:
        low = tl.maximum(0, first - window + 1)
        all_low = tl.maximum(0, last - window + 1)
    return low, high, all_low, all_high
