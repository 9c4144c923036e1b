"""What becomes of a row once its keys have passed: its streams are mixed, and it is normed if asked.

    λ = gate, or σ(gate) with SIGMOID                         V2's gate: one number a token and head
    o = o_1 − λ o_2
    y = gain · weight ∘ o / √(mean(o²) + eps)   with NORM     V1's head norm; gain is its 1 − λ_init

All of it in float32, on the tile that is in registers anyway, rounded once when it is stored. The gradient of both is
taken by `deltas` before the backward pass, which sees λ and the gradient of o as if there were neither.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from clearhead.kernels.triton.tiles import load_rows, store_packed


@triton.jit
def opened(gate, SIGMOID: tl.constexpr):
    """λ in float32."""
    lam = gate.to(tl.float32)
    if SIGMOID:
        lam = 1.0 / (1.0 + tl.exp(-lam))
    return lam


@triton.jit
def gains(weight, gain, E: tl.constexpr, VALUES: tl.constexpr):
    """(VALUES,) float32: what each column of a normed row is multiplied with."""
    column = tl.arange(0, VALUES)
    return tl.load(weight + column, mask=column < E, other=0.0).to(tl.float32) * gain


@triton.jit
def shrinkage(rows, eps, E: tl.constexpr):
    """1 / √(mean(x²) + eps) of each row; columns beyond E are zeros."""
    return 1.0 / tl.sqrt(tl.sum(rows * rows, 1) / E + eps)


@triton.jit
def normed(rows, weight, eps, gain, E: tl.constexpr, VALUES: tl.constexpr):
    return rows * shrinkage(rows, eps, E)[:, None] * gains(weight, gain, E, VALUES)[None, :]


@triton.jit
def keep_part(
    parts, statistics, accumulator1, maximum1, total1, accumulator2, maximum2, total2, split, pair, row, inside, rows,
    STREAMS: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What one split found, unfinished, for `combine`."""
    at = ((split * tl.num_programs(1) + pair).to(tl.int64) * rows + row) * STREAMS
    half = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * rows * STREAMS
    store_packed(parts, accumulator1, at, at * 0, inside, 0, E, VALUES, E)
    tl.store(statistics + at, maximum1, mask=inside)
    tl.store(statistics + half + at, total1, mask=inside)
    if STREAMS == 2:
        store_packed(parts, accumulator2, at + 1, at * 0, inside, 0, E, VALUES, E)
        tl.store(statistics + at + 1, maximum2, mask=inside)
        tl.store(statistics + half + at + 1, total2, mask=inside)


@triton.jit
def mix(
    noise, statistics, accumulator1, maximum1, total1, accumulator2, maximum2, total2,
    gate, token, head, inside, flat, plane, stride_oh, stride_ot,
    STREAMS: tl.constexpr, SIGMOID: tl.constexpr, KEEP: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The rows of the output; with KEEP what the backward pass needs beside them is stored."""
    mixed = accumulator1 / tl.where(total1 == 0, 1.0, total1)[:, None]
    if STREAMS == 2:
        second = accumulator2 / tl.where(total2 == 0, 1.0, total2)[:, None]
        mixed = mixed - opened(tl.load(gate, mask=inside, other=0.0), SIGMOID)[:, None] * second
        if KEEP:
            store_packed(noise, second, token, head, inside, stride_oh, stride_ot, VALUES, E)
            maximum2 = tl.where(total2 == 0, 0.0, maximum2)
            tl.store(statistics + 2 * plane + flat, maximum2, mask=inside)
            tl.store(statistics + 3 * plane + flat, total2, mask=inside)
    if KEEP:
        maximum1 = tl.where(total1 == 0, 0.0, maximum1)
        tl.store(statistics + flat, maximum1, mask=inside)
        tl.store(statistics + plane + flat, total1, mask=inside)
    return mixed


@triton.jit
def finish(
    out, noise, mixed, statistics, weight, eps, gain,
    accumulator1, maximum1, total1, accumulator2, maximum2, total2,
    gate, token, head, inside, flat, plane, stride_oh, stride_ot,
    STREAMS: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, E: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The rows of the output, stored; with KEEP also those before a norm."""
    rows = mix(
        noise, statistics, accumulator1, maximum1, total1, accumulator2, maximum2, total2,
        gate, token, head, inside, flat, plane, stride_oh, stride_ot, STREAMS, SIGMOID, KEEP, E, VALUES,
    )  # fmt: skip
    if NORM:
        if KEEP:
            store_packed(mixed, rows, token, head, inside, stride_oh, stride_ot, VALUES, E)
        rows = normed(rows, weight, eps, gain, E, VALUES)
    store_packed(out, rows, token, head, inside, stride_oh, stride_ot, VALUES, E)


@triton.jit
def gather(parts, statistics, at, step, half, splits, VALUES: tl.constexpr, E: tl.constexpr):
    """One row of one stream from its splits."""
    column = tl.arange(0, VALUES)
    highest = float("-inf")
    for split in range(splits):
        highest = tl.maximum(highest, tl.load(statistics + at + split * step))
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    row = tl.zeros([VALUES], tl.float32)
    for split in range(splits):
        where = at + split * step
        weight = tl.exp2(tl.load(statistics + where) - reference)
        total += weight * tl.load(statistics + half + where)
        row += weight * tl.load(parts + where * E + column, mask=column < E, other=0.0)
    return row / tl.where(total == 0, 1.0, total)


@triton.jit
def combine(
    parts, statistics, gate, weight, out, eps, gain, groups, queries, splits,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot,
    E: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr, STREAMS: tl.constexpr, SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """One row of the output from what `forward` left of it in each split."""
    row, pair = tl.program_id(0), tl.program_id(1)
    rows = queries * REPEATS
    b, token, head = (pair // groups).to(tl.int64), row // REPEATS, pair % groups * REPEATS + row % REPEATS
    step = tl.num_programs(1).to(tl.int64) * rows * STREAMS
    at = (pair.to(tl.int64) * rows + row) * STREAMS
    mixed = gather(parts, statistics, at, step, step * splits, splits, VALUES, E)
    if STREAMS == 2:
        lam = opened(tl.load(gate + b * stride_gb + head * stride_gh + token * stride_gt), SIGMOID)
        mixed -= lam * gather(parts, statistics, at + 1, step, step * splits, splits, VALUES, E)
    column = tl.arange(0, VALUES)
    if NORM:
        shrink = 1.0 / tl.sqrt(tl.sum(mixed * mixed, 0) / E + eps)
        mixed = mixed * shrink * gains(weight, gain, E, VALUES)
    to = out + b * stride_ob + head * stride_oh + token * stride_ot + column
    tl.store(to, mixed.to(out.dtype.element_ty), mask=column < E)


@triton.jit
def before_norm(out, cotangent, weight, grad_weight, eps, gain, at, E: tl.constexpr, VALUES: tl.constexpr):
    """dO of rows O from the gradient dY of y, with n = O / √(mean(O²) + eps):

    dn = gain · weight ∘ dY           dO = (dn − n mean(dn ∘ n)) / √(mean(O²) + eps)        dweight = gain Σ dY ∘ n
    """
    column = tl.arange(0, VALUES)
    shrink = shrinkage(out, eps, E)[:, None]
    unit = out * shrink
    tl.store(grad_weight + at * E + column, tl.sum(cotangent * unit, 0) * gain, mask=column < E)
    step = cotangent * gains(weight, gain, E, VALUES)[None, :]
    return (step - unit * (tl.sum(step * unit, 1) / E)[:, None]) * shrink


@triton.jit
def deltas(
    grad, out, noise, gate, weight, delta, strength, grad_gate, grad_out, grad_weight, eps, gain, heads, queries,
    stride_db, stride_dh, stride_dt, stride_ob, stride_oh, stride_ot, stride_nb, stride_nh, stride_nt,
    stride_gb, stride_gh, stride_gt, stride_cb, stride_ch, stride_ct,
    E: tl.constexpr, VALUES: tl.constexpr, STREAMS: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """δ_1 and δ_2 of BLOCK_M tokens of one head, and the gradient of their λ.

    With SIGMOID also λ, to `strength`; with NORM also dO, to `grad_out`, and what these rows add to the weight's
    gradient, to a row of `grad_weight` of their own.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < queries
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    cotangent = load_rows(grad + b * stride_db + h * stride_dh, token, inside, stride_dt, VALUES, E).to(
        tl.float32
    )
    first = load_rows(out + b * stride_ob + h * stride_oh, token, inside, stride_ot, VALUES, E).to(tl.float32)
    flat = pair * queries + token
    if NORM:
        at = pair * tl.num_programs(0) + tl.program_id(0)
        rows = before_norm(first, cotangent, weight, grad_weight, eps, gain, at, E, VALUES)
        # Rounded as the backward pass will see it: each row of dS then adds up to zero.
        rows = rows.to(grad_out.dtype.element_ty)
        store_packed(
            grad_out + b * stride_cb, rows, token, token * 0 + h, inside, stride_ch, stride_ct, VALUES, E
        )
        cotangent = rows.to(tl.float32)
    if STREAMS == 2:
        second = load_rows(noise + b * stride_nb + h * stride_nh, token, inside, stride_nt, VALUES, E).to(
            tl.float32
        )
        where = gate + b * stride_gb + h * stride_gh + token.to(tl.int64) * stride_gt
        lam = opened(tl.load(where, mask=inside, other=0.0), SIGMOID)
        first += lam[:, None] * second
        plane = tl.num_programs(1).to(tl.int64) * queries
        delta2 = tl.sum(cotangent * second, 1)
        tl.store(delta + plane + flat, delta2, mask=inside)
        slope = -delta2
        if SIGMOID:
            tl.store(strength + flat, lam, mask=inside)
            slope = slope * lam * (1.0 - lam)
        tl.store(grad_gate + flat, slope.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(delta + flat, tl.sum(cotangent * first, 1), mask=inside)
