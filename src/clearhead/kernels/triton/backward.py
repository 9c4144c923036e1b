"""The backward pass: every gradient from one visit to each tile, without atomics.

With P_s = exp2(t_s − m_s) / l_s, λ the gate, dO the output's gradient and, for each row, δ_1 = dO · O_1 and
δ_2 = dO · O_2, where O_1 = O + λ O_2 (`endings.deltas`):

    dP   = dO Vᵀ                     one product, which both streams share
    dV   = (P_1 − λ P_2)ᵀ dO         one product
    dS_1 = P_1 ∘ (dP − δ_1)          dS_2 = −λ P_2 ∘ (dP − δ_2)
    dQ_s = scale dS_s K_s            dK_s = scale dS_sᵀ Q_s            dλ = −δ_2

Multiply-adds for a row and key: streams · 3D + 2E; 10d for V1 with d = D and E = 2d, what two softmax heads take.

A program has one stretch of keys and one stretch of rows of a key-value group. It holds dK and dV of a block of keys
while the rows pass by, and adds to their dQ in memory. No two programs of a launch share rows or keys: keys and rows
are cut into T stretches each, and of the T launches number w pairs stretch j of the keys with stretch (w − j) mod T of
the rows, a Latin square. Under a causal mask about half of each launch's pairs is empty, in every launch alike. So a
sum always has the same order, and the memory beside the gradients is that of their float32 sums.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from clearhead.kernels.triton.tiles import load_packed, load_rows, product, scores, visible


@triton.jit
def add_to(base, step, key, rows, inside, WIDTH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """rows of base += step key."""
    columns = tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * D + columns[None, :]
    there = inside[:, None]
    if D != WIDTH:
        there = there & (columns < D)[None, :]
    tl.store(pointers, product(step, key, tl.load(pointers, mask=there, other=0.0), PRECISION), mask=there)


@triton.jit
def weigh(query, key, reference, total, bias, factor, PRECISION: tl.constexpr):
    """P of one stream, before the mask."""
    t = scores(query, tl.trans(key), PRECISION) * factor - bias
    return tl.exp2(t - reference[:, None]) * (1.0 / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def walk(
    low, high,
    q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
    first, second, value, grad_k1, grad_k2, grad_v,
    key, real, key_documents, g, rows, queries, offset, window, factor, plane,
    stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All blocks of rows in [low, high) against one block of keys."""
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < rows
        token, head = row // REPEATS, g * REPEATS + row % REPEATS
        flat = head * queries + token
        position = offset + token
        query1 = load_packed(q1, token, head, inside, stride_qh, stride_qt, WIDTH, D)
        cotangent = load_packed(grad, token, head, inside, stride_dh, stride_dt, VALUES, E)
        reference1 = tl.load(statistics + flat, mask=inside, other=0.0)
        total1 = tl.load(statistics + plane + flat, mask=inside, other=0.0)
        bias = 0.0
        if SLOPES:
            slope = tl.load(slopes + head, mask=inside, other=0.0)
            bias = slope[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
        weights1 = weigh(query1, first, reference1, total1, bias, factor, PRECISION)
        seen = real[None, :]
        if MASKED:
            row_documents = token
            if DOCUMENTS:
                row_documents = tl.load(documents + position, mask=inside, other=0)
            seen = visible(
                position[:, None], row_documents[:, None], key[None, :], real[None, :], key_documents[None, :],
                window, CAUSAL, WINDOW, DOCUMENTS,
            ) & inside[:, None]  # fmt: skip
            weights1 = tl.where(seen, weights1, 0.0)
        grad_weights = scores(cotangent, tl.trans(value), PRECISION)
        delta1 = tl.load(delta + flat, mask=inside, other=0.0)
        step1 = (weights1 * (grad_weights - delta1[:, None])).to(query1.dtype)
        add_to(grad_q1, step1, first, flat, inside, WIDTH, D, PRECISION)
        grad_k1 = product(tl.trans(step1), query1, grad_k1, PRECISION)
        mixed = weights1
        if STREAMS == 2:
            query2 = load_packed(q2, token, head, inside, stride_qh, stride_qt, WIDTH, D)
            reference2 = tl.load(statistics + 2 * plane + flat, mask=inside, other=0.0)
            total2 = tl.load(statistics + 3 * plane + flat, mask=inside, other=0.0)
            weights2 = weigh(query2, second, reference2, total2, bias, factor, PRECISION)
            if MASKED:
                weights2 = tl.where(seen, weights2, 0.0)
            at = gate + head * stride_gh + token.to(tl.int64) * stride_gt
            weights2 = tl.load(at, mask=inside, other=0.0)[:, None] * weights2
            mixed = weights1 - weights2
            delta2 = tl.load(delta + plane + flat, mask=inside, other=0.0)
            step2 = (weights2 * (delta2[:, None] - grad_weights)).to(query1.dtype)
            add_to(grad_q2, step2, second, flat, inside, WIDTH, D, PRECISION)
            if OWN_KEYS:
                grad_k2 = product(tl.trans(step2), query2, grad_k2, PRECISION)
            else:
                grad_k1 = product(tl.trans(step2), query2, grad_k1, PRECISION)
        grad_v = product(tl.trans(mixed.to(cotangent.dtype)), cotangent, grad_v, PRECISION)
    return grad_k1, grad_k2, grad_v


@triton.jit
def token_range(
    start, offset, queries, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[low, high): the tokens that see some key of the block at `start`; [all_low, all_high): those that see all."""
    low, high, all_low, all_high = 0, queries, 0, queries
    last = tl.minimum(start + BLOCK_N, keys) - 1
    if CAUSAL:
        low, all_low = start - offset, last - offset
    elif WINDOW:
        low, all_low = start - window + 1 - offset, last - window + 1 - offset
    if WINDOW:
        high, all_high = last + window - offset, start + window - offset
    return low, high, all_low, all_high


@triton.jit
def sweep(
    low_row, high_row, all_low, all_high, gap,
    q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
    first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
    window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All rows in [low_row, high_row) against one block of keys, with a mask only where a row may not see all of it."""
    if PADDING or DOCUMENTS:
        sum_k1, sum_k2, sum_v = walk(
            low_row, high_row, q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
            first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
            window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
            D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, DOCUMENTS, SLOPES, True,
            PRECISION, BLOCK_M,
        )  # fmt: skip
    else:
        # A last block of keys with a gap is masked throughout. Rows beyond the last are zeros and need no mask.
        middle = tl.cdiv(tl.maximum(all_low, 0) * REPEATS, BLOCK_M) * BLOCK_M
        middle = tl.where(gap, high_row, middle)
        middle = tl.minimum(tl.maximum(middle, low_row), high_row)
        edge = high_row
        if WINDOW:
            edge = tl.minimum(tl.maximum(all_high, 0), queries) * REPEATS // BLOCK_M * BLOCK_M
            edge = tl.minimum(tl.maximum(edge, middle), high_row)
        sum_k1, sum_k2, sum_v = walk(
            low_row, middle, q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
            first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
            window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
            D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, DOCUMENTS, SLOPES, True,
            PRECISION, BLOCK_M,
        )  # fmt: skip
        sum_k1, sum_k2, sum_v = walk(
            middle, edge, q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
            first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
            window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
            D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, DOCUMENTS, SLOPES, False,
            PRECISION, BLOCK_M,
        )  # fmt: skip
        if WINDOW:
            sum_k1, sum_k2, sum_v = walk(
                edge, high_row, q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
                first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
                window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
                D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, DOCUMENTS, SLOPES, True,
                PRECISION, BLOCK_M,
            )  # fmt: skip
    return sum_k1, sum_k2, sum_v


@triton.jit
def store_sum(base, tile, rows, inside, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * D + columns[None, :]
    there = inside[:, None]
    if D != WIDTH:
        there = there & (columns < D)[None, :]
    tl.store(pointers, tile, mask=there)


@triton.jit
def visit(
    start, first_row, end_row, end_key, ranges,
    q1, q2, k1, k2, v, grad, gate, statistics, delta, grad_q1, grad_q2, grad_k1, grad_k2, grad_v,
    padding, documents, slopes, g, rows, queries, keys, offset, window, factor, plane,
    stride_qh, stride_qt, stride_kt, stride_vt, stride_dh, stride_dt, stride_gh, stride_gt,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: its dK and dV, and what it adds to dQ of the rows of one stretch."""
    low, high, all_low, all_high = token_range(start, offset, queries, keys, window, CAUSAL, WINDOW, BLOCK_N)
    low_row = tl.maximum(tl.maximum(low, 0) * REPEATS, first_row)
    high_row = tl.minimum(tl.minimum(tl.maximum(high, 0), queries) * REPEATS, end_row)
    if PADDING or DOCUMENTS:
        at = ranges + start // BLOCK_N * 2
        low_row = tl.maximum(low_row, tl.load(at) * BLOCK_M)
        high_row = tl.minimum(high_row, tl.load(at + 1) * BLOCK_M)
    low_row = low_row // BLOCK_M * BLOCK_M
    high_row = tl.maximum(high_row, low_row)

    key = start + tl.arange(0, BLOCK_N)
    there = key < end_key
    real = there
    if PADDING:
        real = real & (tl.load(padding + key, mask=there, other=0) != 0)
    key_documents = key
    if DOCUMENTS:
        key_documents = tl.load(documents + key, mask=there, other=0)
    first = load_rows(k1, key, real, stride_kt, WIDTH, D)
    second = first
    value = load_rows(v, key, real, stride_vt, VALUES, E)
    sum_k1 = load_rows(grad_k1, key, there, D, WIDTH, D)
    sum_k2 = sum_k1
    if OWN_KEYS:
        second = load_rows(k2, key, real, stride_kt, WIDTH, D)
        sum_k2 = load_rows(grad_k2, key, there, D, WIDTH, D)
    sum_v = load_rows(grad_v, key, there, E, VALUES, E)
    sum_k1, sum_k2, sum_v = sweep(
        low_row, high_row, all_low, all_high, start + BLOCK_N > end_key,
        q1, q2, grad, gate, statistics, delta, grad_q1, grad_q2, documents, slopes,
        first, second, value, sum_k1, sum_k2, sum_v, key, real, key_documents, g, rows, queries, offset,
        window, factor, plane, stride_qh, stride_qt, stride_dh, stride_dt, stride_gh, stride_gt,
        D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES,
        PRECISION, BLOCK_M,
    )  # fmt: skip
    store_sum(grad_k1, sum_k1, key, there, WIDTH, D)
    if OWN_KEYS:
        store_sum(grad_k2, sum_k2, key, there, WIDTH, D)
    store_sum(grad_v, sum_v, key, there, VALUES, E)


@triton.jit
def backward(
    q1, q2, k1, k2, v, gate, padding, documents, position, slopes, ranges,
    grad, statistics, delta, grad_q1, grad_q2, grad_k1, grad_k2, grad_v,
    factor, groups, queries, keys, offset, window, wave, stretch_keys, stretch_rows,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt, stride_padding, stride_documents, stride_ranges,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, POSITION: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    own, stretches = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1)
    b, g = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    other = (wave + stretches - own) % stretches
    if POSITION:
        offset = tl.load(position).to(tl.int32)
    rows = queries * REPEATS
    first_key, end_key = own * stretch_keys, tl.minimum((own + 1) * stretch_keys, keys)
    first_row, end_row = other * stretch_rows, tl.minimum((other + 1) * stretch_rows, rows)
    if CAUSAL:  # noqa: SIM102  (the compiler knows this one, not the next)
        # The pair of stretches lies above the diagonal.
        if offset + tl.minimum((end_row - 1) // REPEATS, queries - 1) < first_key:
            return

    q1 += b * stride_qb
    q2 += b * stride_qb
    k1 += b * stride_kb + g * stride_kg
    k2 += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    gate += b * stride_gb
    grad += b * stride_db
    padding += b * stride_padding
    documents += b * stride_documents
    ranges += b * stride_ranges
    plane = tl.num_programs(1).to(tl.int64) * rows
    statistics += b * groups * rows
    delta += b * groups * rows
    grad_q1 += b * groups * rows * D
    grad_q2 += b * groups * rows * D
    grad_k1 += pair.to(tl.int64) * keys * D
    grad_k2 += pair.to(tl.int64) * keys * D
    grad_v += pair.to(tl.int64) * keys * E

    for start in range(first_key, end_key, BLOCK_N):
        visit(
            start, first_row, end_row, end_key, ranges,
            q1, q2, k1, k2, v, grad, gate, statistics, delta, grad_q1, grad_q2, grad_k1, grad_k2, grad_v,
            padding, documents, slopes, g, rows, queries, keys, offset, window, factor, plane,
            stride_qh, stride_qt, stride_kt, stride_vt, stride_dh, stride_dt, stride_gh, stride_gt,
            D, E, WIDTH, VALUES, REPEATS, STREAMS, OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES,
            PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        # The next block of keys adds to the same rows of dQ, from other threads perhaps.
        tl.debug_barrier()
