"""The forward pass, also of a few rows against many keys.

A program has BLOCK_M rows of one key-value group and walks over blocks of its keys. K and V are read once for all query
heads of the rows and for both streams; each stream has its own running maximum, sum and accumulator.
Multiply-adds for a row and key: streams · (D + E).

With more than one split the keys of a row block are shared out among programs, whose unfinished rows `combine` puts
together in the order of the splits: that is how few rows keep a GPU busy.

With TABLE a key is held as t (D/2 numbers), and one table (S, D) of all heads and streams makes it whole in registers:
k_n = (t_n ∘ first half of table_n, t_n ∘ second half). D and WIDTH are then those of t.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from clearhead.kernels.triton.endings import finish, keep_part
from clearhead.kernels.triton.tiles import (
    key_range,
    load_packed,
    load_rows,
    product,
    scores,
    visible,
)


@triton.jit
def online(t, v, maximum, total, accumulator, PRECISION: tl.constexpr):
    """One more block of logits for one stream; a row that has seen nothing keeps the maximum −∞."""
    higher = tl.maximum(maximum, tl.max(t, 1))
    reference = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(t - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = product(weights.to(v.dtype), v, accumulator * shrink[:, None], PRECISION)
    return higher, total, accumulator


@triton.jit
def logits(query, rest, keys, turn1, turn2, TABLE: tl.constexpr, PRECISION: tl.constexpr):
    """q kᵀ of one stream. Keys that are held at half their width are (keys ∘ turn1, keys ∘ turn2), each rounded as a
    whole key would be, and `rest` is the query's second half."""
    if TABLE:
        wide = keys.to(tl.float32)
        tile = scores(query, tl.trans((wide * turn1).to(keys.dtype)), PRECISION)
        tile = product(rest, tl.trans((wide * turn2).to(keys.dtype)), tile, PRECISION)
    else:
        tile = scores(query, tl.trans(keys), PRECISION)
    return tile


@triton.jit
def walk(
    low, high,
    q1, rest1, q2, rest2, k1, k2, v, table, padding, documents,
    maximum1, total1, accumulator1, maximum2, total2, accumulator2,
    positions, row_documents, row_slopes,
    keys, window, factor, stride_k, stride_v, stride_table,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, BLOCK_N: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All blocks of keys in [low, high); without MASKED every row sees every key of them."""
    for start in range(low, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        real = key < keys
        if PADDING:
            real = real & (tl.load(padding + key, mask=real, other=0) != 0)
        key_documents = key
        if DOCUMENTS:
            key_documents = tl.load(documents + key, mask=key < keys, other=0)
        first = load_rows(k1, key, real, stride_k, WIDTH, D)
        value = load_rows(v, key, real, stride_v, VALUES, E)
        turn1, turn2 = first, first
        if TABLE:
            turn1 = load_rows(table, key, real, stride_table, WIDTH, D)
            turn2 = load_rows(table + D, key, real, stride_table, WIDTH, D)
        t1 = logits(q1, rest1, first, turn1, turn2, TABLE, PRECISION) * factor
        t2 = t1
        if STREAMS == 2:
            second = first
            if OWN_KEYS:
                second = load_rows(k2, key, real, stride_k, WIDTH, D)
            t2 = logits(q2, rest2, second, turn1, turn2, TABLE, PRECISION) * factor
        if SLOPES:
            bias = row_slopes[:, None] * tl.abs(positions[:, None] - key[None, :]).to(tl.float32)
            t1 -= bias
            t2 -= bias
        if MASKED:
            seen = visible(
                positions[:, None], row_documents[:, None], key[None, :], real[None, :], key_documents[None, :],
                window, CAUSAL, WINDOW, DOCUMENTS,
            )  # fmt: skip
            t1 = tl.where(seen, t1, float("-inf"))
            t2 = tl.where(seen, t2, float("-inf"))
        maximum1, total1, accumulator1 = online(t1, value, maximum1, total1, accumulator1, PRECISION)
        if STREAMS == 2:
            maximum2, total2, accumulator2 = online(t2, value, maximum2, total2, accumulator2, PRECISION)
    return maximum1, total1, accumulator1, maximum2, total2, accumulator2


@triton.jit
def sweep(
    low, high, all_low, all_high, query1, rest1, query2, rest2, k1, k2, v, table, padding, documents,
    positions, row_documents, row_slopes,
    keys, window, factor, stride_kt, stride_vt, stride_table,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys in [low, high) for one block of rows, with a mask only where a row may not see all of a block."""
    maximum1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total1 = tl.zeros([BLOCK_M], tl.float32)
    accumulator1 = tl.zeros([BLOCK_M, VALUES], tl.float32)
    maximum2, total2, accumulator2 = maximum1, total1, accumulator1
    if PADDING or DOCUMENTS:
        maximum1, total1, accumulator1, maximum2, total2, accumulator2 = walk(
            low, high, query1, rest1, query2, rest2, k1, k2, v, table, padding, documents,
            maximum1, total1, accumulator1, maximum2, total2, accumulator2, positions, row_documents, row_slopes,
            keys, window, factor, stride_kt, stride_vt, stride_table, D, E, WIDTH, VALUES, BLOCK_N, STREAMS,
            OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES, TABLE, True, PRECISION,
        )  # fmt: skip
    else:
        # Whole blocks between the edges need no mask.
        middle = tl.minimum(tl.maximum(tl.cdiv(all_low, BLOCK_N) * BLOCK_N, low), high)
        edge = tl.minimum(tl.maximum(all_high // BLOCK_N * BLOCK_N, middle), high)
        if WINDOW:
            maximum1, total1, accumulator1, maximum2, total2, accumulator2 = walk(
                low, middle, query1, rest1, query2, rest2, k1, k2, v, table, padding, documents,
                maximum1, total1, accumulator1, maximum2, total2, accumulator2, positions, row_documents, row_slopes,
                keys, window, factor, stride_kt, stride_vt, stride_table, D, E, WIDTH, VALUES, BLOCK_N, STREAMS,
                OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES, TABLE, True, PRECISION,
            )  # fmt: skip
        maximum1, total1, accumulator1, maximum2, total2, accumulator2 = walk(
            middle, edge, query1, rest1, query2, rest2, k1, k2, v, table, padding, documents,
            maximum1, total1, accumulator1, maximum2, total2, accumulator2, positions, row_documents, row_slopes,
            keys, window, factor, stride_kt, stride_vt, stride_table, D, E, WIDTH, VALUES, BLOCK_N, STREAMS,
            OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES, TABLE, False, PRECISION,
        )  # fmt: skip
        maximum1, total1, accumulator1, maximum2, total2, accumulator2 = walk(
            edge, high, query1, rest1, query2, rest2, k1, k2, v, table, padding, documents,
            maximum1, total1, accumulator1, maximum2, total2, accumulator2, positions, row_documents, row_slopes,
            keys, window, factor, stride_kt, stride_vt, stride_table, D, E, WIDTH, VALUES, BLOCK_N, STREAMS,
            OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES, TABLE, True, PRECISION,
        )  # fmt: skip
    return maximum1, total1, accumulator1, maximum2, total2, accumulator2


@triton.jit
def share(low, high, split, splits, BLOCK_N: tl.constexpr):
    """The part of [low, high) that one of the splits has, in whole blocks."""
    keys = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), splits) * BLOCK_N
    low = low + split * keys
    return low, tl.minimum(high, low + keys)


@triton.jit
def load_query(
    base, token, head, inside, stride_head, stride_token, WIDTH: tl.constexpr, D: tl.constexpr, TABLE: tl.constexpr
):  # fmt: skip
    """The rows of a query and, with TABLE, those of its second half."""
    query = load_packed(base, token, head, inside, stride_head, stride_token, WIDTH, D)
    rest = query
    if TABLE:
        rest = load_packed(base + D, token, head, inside, stride_head, stride_token, WIDTH, D)
    return query, rest


@triton.jit
def forward(
    q1, q2, k1, k2, v, gate, padding, documents, position, slopes, ranges, table, weight,
    out, noise, statistics, parts, mixed,
    factor, eps, gain, groups, queries, keys, offset, window, splits,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot, stride_padding, stride_documents, stride_ranges,
    stride_tb, stride_tt,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, REPEATS: tl.constexpr,
    STREAMS: tl.constexpr, OWN_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, DOCUMENTS: tl.constexpr, POSITION: tl.constexpr, SLOPES: tl.constexpr,
    TABLE: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last rows see the most keys under a causal mask: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    pair, split = tl.program_id(1), tl.program_id(2)
    b, g = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < queries * REPEATS
    token, head = row // REPEATS, g * REPEATS + row % REPEATS
    if POSITION:
        offset = tl.load(position).to(tl.int32)
    first_position = offset + block * BLOCK_M // REPEATS
    last_position = offset + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // REPEATS, queries - 1)
    positions = offset + token
    low, high, all_low, all_high = key_range(first_position, last_position, keys, window, CAUSAL, WINDOW)
    if PADDING or DOCUMENTS:
        at = ranges + b * stride_ranges + block * 2
        low = tl.maximum(low, tl.load(at) * BLOCK_N)
        high = tl.minimum(high, tl.load(at + 1) * BLOCK_N)
    low = low // BLOCK_N * BLOCK_N
    if SPLIT:
        low, high = share(low, high, split, splits, BLOCK_N)

    query1, rest1 = load_query(q1 + b * stride_qb, token, head, inside, stride_qh, stride_qt, WIDTH, D, TABLE)
    query2, rest2 = query1, rest1
    if STREAMS == 2:
        query2, rest2 = load_query(
            q2 + b * stride_qb, token, head, inside, stride_qh, stride_qt, WIDTH, D, TABLE
        )
    k1 += b * stride_kb + g * stride_kg
    k2 += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    padding += b * stride_padding
    documents += b * stride_documents
    row_documents = token
    if DOCUMENTS:
        row_documents = tl.load(documents + positions, mask=inside, other=0)
    row_slopes = positions.to(tl.float32)
    if SLOPES:
        row_slopes = tl.load(slopes + head, mask=inside, other=0.0)

    maximum1, total1, accumulator1, maximum2, total2, accumulator2 = sweep(
        low, high, all_low, all_high, query1, rest1, query2, rest2, k1, k2, v, table + b * stride_tb, padding,
        documents, positions, row_documents, row_slopes, keys, window, factor, stride_kt, stride_vt, stride_tt,
        D, E, WIDTH, VALUES, BLOCK_M, BLOCK_N, STREAMS,
        OWN_KEYS, CAUSAL, WINDOW, PADDING, DOCUMENTS, SLOPES, TABLE, PRECISION,
    )  # fmt: skip
    if SPLIT:
        keep_part(
            parts, statistics, accumulator1, maximum1, total1, accumulator2, maximum2, total2,
            split, pair, row, inside, queries * REPEATS, STREAMS, E, VALUES,
        )  # fmt: skip
    else:
        plane = tl.num_programs(1).to(tl.int64) * REPEATS * queries
        flat = (b * groups * REPEATS + head) * queries + token
        at = gate + b * stride_gb + head * stride_gh + token.to(tl.int64) * stride_gt
        finish(
            out + b * stride_ob, noise + b * stride_ob, mixed + b * stride_ob, statistics, weight, eps, gain,
            accumulator1, maximum1, total1, accumulator2, maximum2, total2,
            at, token, head, inside, flat, plane, stride_oh, stride_ot, STREAMS, SIGMOID, NORM, KEEP, E, VALUES,
        )  # fmt: skip
