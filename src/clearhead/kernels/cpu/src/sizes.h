// Sizes of a problem in the units and blocks of an instruction set, and the constants that fix them.
#pragma once
#include "rows.h"

namespace clearhead::CLEARHEAD_ISA {

constexpr float SLACK = 8.0f;  // logits may exceed the reference by a factor 2^SLACK before the sums are rescaled
constexpr int64_t TILE = BLOCK + VL;  // row stride of a tile: off the power of two that would map rows to one cache set

// Sizes in units and numbers that both passes share.
template <class Unit>
struct Sizes {
  int streams, key_streams;
  int64_t d, e;          // widths D and E
  int64_t d_units;       // units of a row of Q or K
  int64_t d_wide, e_wide;  // widths rounded up to whole vectors
  int64_t d_panels, e_panels;  // and to whole panels, the room a stacked operand takes for each row
  int64_t d_left;        // row stride of a left operand of width D
  int64_t rows;          // rows of a group's list
  int64_t block;         // keys of a block, at most BLOCK
  int64_t chunks, blocks;
  Exponent exponent;     // of |scale|
  int32_t flip;          // sign bits that turn Q into −Q when scale is negative

  Sizes(const clearhead_problem& p, int64_t block)
      : streams(p.streams), key_streams(p.key_streams), d(p.key_width), e(p.value_width), d_units(units<Unit>(p.key_width)),
        d_wide(rounded_up(p.key_width, VL)), e_wide(rounded_up(p.value_width, VL)),
        d_panels(rounded_up(p.key_width, PANEL)), e_panels(rounded_up(p.value_width, PANEL)),
        d_left(rounded_up(units<Unit>(p.key_width), VL) + VL), rows(p.heads / p.groups * p.queries),
        block(block), chunks((rows + ROWS - 1) / ROWS), blocks((p.keys + block - 1) / block),
        exponent(p.scale < 0 ? -p.scale : p.scale) {
    flip = p.scale < 0 ? (Unit::PER_UNIT == 2 ? static_cast<int32_t>(0x80008000u) : static_cast<int32_t>(0x80000000u)) : 0;
  }
};

// Keys of a block when they are used by one chunk of rows only: few enough that what is packed is used from the L1 cache.
constexpr int64_t FEW_KEYS = 32;

// Blocks of keys whose maps may be held for a chunk of rows: some five megabytes a thread.
constexpr int64_t MOST_HELD = 64;

// Rows up to which keys and values are used as they lie in memory, once for each row: packing would cost more.
constexpr int64_t FEW_ROWS = 2;

template <class Number>
CLEARHEAD_INLINE Number* row_of(const clearhead_tensor& tensor, int64_t b, int64_t head, int64_t token) {
  return static_cast<Number*>(tensor.data) + b * tensor.batch + head * tensor.head + token * tensor.token;
}

}  // namespace clearhead::CLEARHEAD_ISA
