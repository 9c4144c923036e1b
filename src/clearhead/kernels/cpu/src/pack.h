// Copies blocks of the caller's tensors into the layouts `product` reads, padded with zeros.
//
//   left        A: rows as they are, their width in units
//   transposed  B = Xᵀ: the reduction runs over the width of X, its rows become columns
//   stacked     B = X:  the reduction runs over the rows of X; two neighbouring rows to a unit under policy Pair
//
// Rows that nobody may see are read as zeros, so that what they hold, NaN included, goes nowhere.
#pragma once
#include "gemm.h"
#include "problem.h"

namespace clearhead::CLEARHEAD_ISA {

struct Half {
  uint16_t bits;
};

CLEARHEAD_INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class Unit>
CLEARHEAD_INLINE int64_t units(int64_t n) {
  return (n + Unit::PER_UNIT - 1) / Unit::PER_UNIT;
}

// `count` <= VL numbers from p as floats, zeros after them.
CLEARHEAD_INLINE vf load_some(const float* p, int64_t count) {
  if (count >= VL) return load(p);
  float values[VL] = {};
  for (int64_t i = 0; i < count; i++) values[i] = p[i];
  return load(values);
}

CLEARHEAD_INLINE vf load_some(const Half* p, int64_t count) {
  if (count >= VL) return load_halves(p);
  uint16_t values[VL] = {};
  for (int64_t i = 0; i < count; i++) values[i] = p[i].bits;
  return load_halves(values);
}

CLEARHEAD_INLINE vi load_some(const uint8_t* p, int64_t count) {
  if (count >= VL) return load_bytes(p);
  uint8_t values[VL] = {};
  for (int64_t i = 0; i < count; i++) values[i] = p[i];
  return load_bytes(values);
}

CLEARHEAD_INLINE vi load_some(const int16_t* p, int64_t count) {
  if (count >= VL) return load_shorts(p);
  int16_t values[VL] = {};
  for (int64_t i = 0; i < count; i++) values[i] = p[i];
  return load_shorts(values);
}

CLEARHEAD_INLINE void store_some(float* p, vf x, int64_t count) {
  if (count >= VL) return store(p, x);
  for (int64_t i = 0; i < count; i++) p[i] = x[i];
}

CLEARHEAD_INLINE void store_some(Half* p, vf x, int64_t count) {
  if (count >= VL) return store_halves(p, x);
  for (int64_t i = 0; i < count; i++) p[i].bits = narrow(x[i]);
}

// VL units of a row from number `at` on; the row has `width` numbers.
template <class Unit, class Number>
CLEARHEAD_INLINE vf load_units(const Number* row, int64_t at, int64_t width) {
  if constexpr (Unit::PER_UNIT == 1) {
    return load_some(row + at, width - at);
  } else {
    if (width - at >= 2 * VL) return load(row + at);
    uint16_t halves[2 * VL] = {};
    for (int64_t i = 0; i < width - at; i++) halves[i] = row[at + i].bits;
    return load(halves);
  }
}

// Two rows of VL floats as VL units: as they are (the second is unused), or as pairs (first in the low half).
template <class Unit>
CLEARHEAD_INLINE vf pair_up(vf first, vf second) {
#if defined(__AVX512BF16__)
  if constexpr (Unit::PER_UNIT == 2) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, both);
  }
#endif
  (void)second;
  return first;
}

// Whether every lane of every vector that was added is finite: x − x is 0 for finite x and NaN otherwise.
struct Finite {
  vf sum = all(0.0f);
  __attribute__((always_inline)) void add(vf x) { sum = sum + (x - x); }
  __attribute__((always_inline)) bool holds() const { return sum_of(sum) == 0.0f; }
};

// Unit (row, u) at to[row·ld + u]; `flip` is xor-ed into every unit (a sign bit for each number, or 0).
template <class Unit, class Number>
static void pack_left_row(const Number* row, int64_t width, int32_t flip, float* to) {
  const int64_t count = rounded_up(units<Unit>(width), VL);
  for (int64_t u = 0; u < count; u += VL)
    store(to + u, (vf)((vi)load_units<Unit>(row, u * Unit::PER_UNIT, width) ^ all_ints(flip)));
}

// Row r is at row(r), or reads as zeros when visible[r] is 0. Column r of panel r / PANEL, unit u in row u. A row is done
// with before the next one is asked for. Returns whether every number is finite.
template <class Unit, class Row>
static bool pack_transposed(Row row, int64_t rows, int64_t width, const uint8_t* visible, float* to) {
  const int64_t depth = units<Unit>(width), wide = rounded_up(depth, VL), columns = rounded_up(rows, VL);
  Finite finite;
  // VL rows are first copied as they lie: memory read in order is fetched ahead of time, memory read by columns is not.
  alignas(64) float copy[VL * CLEARHEAD_WIDEST];
  for (int64_t r = 0; r < columns; r += VL) {
    float* panel = to + r / PANEL * PANEL * depth + r % PANEL;
    for (int64_t i = 0; i < VL; i++) {
      const bool real = r + i < rows && (!visible || visible[r + i]);
      const auto from = real ? row(r + i) : nullptr;
      for (int64_t u = 0; u < wide; u += VL) {
        const vf x = real ? load_units<Unit>(from, u * Unit::PER_UNIT, width) : all(0.0f);
        store(copy + i * wide + u, x);
        if constexpr (Unit::PER_UNIT == 1) {
          finite.add(x);
        } else {  // both numbers of a unit, each as a float of its own
          finite.add((vf)((vi)x & all_ints(static_cast<int32_t>(0xffff0000u))));
          finite.add((vf)((vi)x << 16));
        }
      }
    }
    for (int64_t u = 0; u < depth; u += VL) {
      vf block[VL];
#pragma GCC unroll 16
      for (int64_t i = 0; i < VL; i++) block[i] = load(copy + i * wide + u);
      transpose(block);
      const int64_t last = depth - u < VL ? depth - u : VL;
      for (int64_t i = 0; i < last; i++) store(panel + (u + i) * PANEL, block[i]);
    }
  }
  return finite.holds();
}

// Row r is at row(r), or reads as zeros when visible[r] is 0. Number c of it in column c of panel c / PANEL, row
// r / PER_UNIT. Returns whether every number is finite.
template <class Unit, class Row>
static bool pack_stacked(Row row, int64_t rows, int64_t width, const uint8_t* visible, int32_t flip, float* to) {
  const int64_t depth = units<Unit>(rows);
  Finite finite;
  for (int64_t k = 0; k < depth; k++) {
    decltype(row(0)) from[Unit::PER_UNIT];
    for (int64_t i = 0; i < Unit::PER_UNIT; i++) {
      const int64_t r = k * Unit::PER_UNIT + i;
      from[i] = r < rows && (!visible || visible[r]) ? row(r) : nullptr;
    }
    for (int64_t c = 0; c < width; c += VL) {
      vf pair[Unit::PER_UNIT];
      for (int64_t i = 0; i < Unit::PER_UNIT; i++) {
        pair[i] = from[i] ? load_some(from[i] + c, width - c) : all(0.0f);
        finite.add(pair[i]);
      }
      const vf unit = pair_up<Unit>(pair[0], pair[Unit::PER_UNIT - 1]);
      store(to + c / PANEL * PANEL * depth + k * PANEL + c % PANEL, (vf)((vi)unit ^ all_ints(flip)));
    }
  }
  return finite.holds();
}

}  // namespace clearhead::CLEARHEAD_ISA
