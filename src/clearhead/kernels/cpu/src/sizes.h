// Sizes of a problem in the units and blocks of an instruction set, and the constants that fix them.
#pragma once
#include "rows.h"

namespace clearhead::CLEARHEAD_ISA {

constexpr float SLACK = 8.0f;  // logits may exceed the reference by a factor 2^SLACK before the sums are rescaled
constexpr int64_t TILE = BLOCK + VL;  // row stride of a tile: off the power of two that would map rows to one cache set

// Keys of a block when they are used by one chunk of rows only: few enough that what is packed is used from the L1 cache.
constexpr int64_t FEW_KEYS = 32;

// Blocks of keys whose maps may be held for a chunk of rows: some five megabytes a thread.
constexpr int64_t MOST_HELD = 64;

// Rows up to which keys and values are used as they lie in memory: packing would cost more.
constexpr int64_t FEW_ROWS = 8;

// Sizes in units and numbers that both passes share, and where things are.
template <class Unit>
struct Sizes {
  int streams, key_streams;
  int64_t d, e;                // widths D and E
  int64_t d_units, e_units;    // units of a row of Q or K, and of V
  int64_t d_wide, e_wide;      // widths rounded up to whole vectors
  int64_t d_panels, e_panels;  // and to whole panels, the room a stacked operand takes for each row
  int64_t d_left, e_left;      // row strides of left operands
  int64_t keys, queries;
  int64_t heads, rows;         // query heads of a group, and rows of its list
  int64_t block;               // keys of a block, at most BLOCK
  int64_t chunks, blocks;
  Exponent exponent;           // of |scale|
  int32_t flip;                // sign bits that turn Q into −Q when scale is negative

  Sizes(const clearhead_problem& p, int64_t block)
      : streams(p.streams), key_streams(p.key_streams), d(p.key_width), e(p.value_width), d_units(units<Unit>(d)),
        e_units(units<Unit>(e)), d_wide(rounded_up(d, VL)), e_wide(rounded_up(e, VL)), d_panels(rounded_up(d, PANEL)),
        e_panels(rounded_up(e, PANEL)), d_left(rounded_up(d_units, VL) + VL), e_left(rounded_up(e_units, VL) + VL),
        keys(p.keys), queries(p.queries), heads(p.heads / p.groups), rows(heads * queries), block(block),
        chunks((rows + ROWS - 1) / ROWS), blocks((keys + block - 1) / block), exponent(p.scale < 0 ? -p.scale : p.scale),
        flip(p.scale < 0 ? static_cast<int32_t>(Unit::PER_UNIT == 2 ? 0x80008000u : 0x80000000u) : 0) {}

  int64_t head_of(int64_t g, int64_t row) const { return g * heads + row / queries; }
  int64_t token_of(int64_t row) const { return row % queries; }
  int64_t rows_of(int64_t begin) const { return rows - begin < ROWS ? rows - begin : ROWS; }
  int64_t keys_of(int64_t number) const { return keys - number * block < block ? keys - number * block : block; }
  // Keys of a block that a chunk has any use for: the columns above a causal diagonal are not computed.
  int64_t used(const Rows& chunk, int64_t number) const {
    const int64_t left = chunk.last - number * block, count = keys_of(number);
    return left < count ? left : count;
  }
};

template <class Number>
CLEARHEAD_INLINE Number* row_of(const clearhead_tensor& tensor, int64_t b, int64_t head, int64_t token) {
  return static_cast<Number*>(tensor.data) + b * tensor.batch + head * tensor.head + token * tensor.token;
}

}  // namespace clearhead::CLEARHEAD_ISA
