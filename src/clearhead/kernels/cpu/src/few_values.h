// Values where they lie in memory, weighed by a few rows and added up: each number is loaded once for up to MOST_ROWS rows.
//
// In bfloat16, where the processor multiplies pairs, two tokens' values and weights meet in one instruction.
#pragma once
#include "few_logits.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number>
struct FewValues {
  // Whether weights are bfloat16 where they meet values; a place in a tile is then still given as a float's.
  static constexpr bool PAIRED = Unit::PER_UNIT == 2;

  int64_t width, out_stride, token;  // numbers of a value; from row to row of the output, from value to value

  // Adds `count` <= BLOCK values from `from` on, weighed by the rows of a tile, to the rows of `out`: a few values at a
  // time, which stay in the first cache for all rows and columns.
  void run(int64_t rows, const float* tile, const Number* from, int64_t count, float* out) const {
    const int64_t size = sizeof(Number), turns = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t j = 0; j < count; j += FEW_KEYS) {
      const int64_t some = count - j < FEW_KEYS ? count - j : FEW_KEYS;
      const Number* values = from + j * token;
      Ahead ahead(values, width * size, token * size, turns);
      for (int64_t i = 0; i < rows; i += MOST_ROWS)
        add(rows - i, weight_of(tile + i * TILE, j), values, some, ahead, out + i * out_stride);
    }
  }

  // Adds one value to one row.
  void one(const float* weight, const Number* from, float* out) const {
    Ahead nothing;
    add(1, weight, from, 1, nothing, out);
  }

  static const float* weight_of(const float* row, int64_t j) {
    if constexpr (PAIRED) return reinterpret_cast<const float*>(reinterpret_cast<const Half*>(row) + j);
    return row + j;
  }

 private:
  // To the first MOST_ROWS of `rows` rows.
  void add(int64_t rows, const float* weights, const Number* from, int64_t count, Ahead& ahead, float* out) const {
    if (rows == 1)
      add_rows<1, 8>(rows, weights, from, count, ahead, out);
    else if (rows == 2)
      add_rows<2, 8>(rows, weights, from, count, ahead, out);
    else
      add_rows<MOST_ROWS, 4>(rows, weights, from, count, ahead, out);
  }

  template <int R, int COLUMNS>
  void add_rows(int64_t rows, const float* weights, const Number* from, int64_t count, Ahead& ahead, float* out) const {
    const float* weight[R];
    float* to[R];
    for (int r = 0; r < R; r++) {
      weight[r] = weights + (r < rows ? r : rows - 1) * TILE;
      to[r] = out + (r < rows ? r : rows - 1) * out_stride;
    }
    int64_t e = 0;
    for (; e + COLUMNS * VL <= width; e += COLUMNS * VL)
      add_tile<R, COLUMNS>(weight, from + e, count, COLUMNS * VL, ahead, to, e);
    if constexpr (COLUMNS > 4)
      for (; e + 4 * VL <= width; e += 4 * VL) add_tile<R, 4>(weight, from + e, count, 4 * VL, ahead, to, e);
    for (; e < width; e += VL) add_tile<R, 1>(weight, from + e, count, width - e, ahead, to, e);
  }

  template <int R, int COLUMNS>
  void add_tile(const float* const* weight, const Number* from, int64_t count, int64_t columns, Ahead& ahead,
                float* const* to, int64_t e) const {
    // Of a value; at least one, so that what is asked for may be a little more than what is used.
    constexpr int LINES = COLUMNS * VL * static_cast<int>(sizeof(Number)) / static_cast<int>(LINE);
    vf sums[R][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) sums[r][c] = all(0.0f);
    Ahead lines = ahead;  // a copy of its own stays in registers
#if defined(__AVX512BF16__)
    if constexpr (PAIRED) add_pairs<R, COLUMNS>(weight, from, count, columns, lines, sums);
#endif
    for (int64_t j = PAIRED ? count : 0; j < count; j++) {
      const Number* row = from + j * token;
#pragma GCC unroll 8
      for (int i = 0; i < (LINES ? LINES : 1); i++) lines.next();
      vf x[COLUMNS];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) x[c] = load_some(row + c * VL, COLUMNS == 1 ? columns : VL);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = all(weight[r][j]) * x[c] + sums[r][c];
    }
    ahead = lines;
    // Read before written: two rows may be one and the same.
    vf old[R][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) old[r][c] = load(to[r] + e + c * VL);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) store(to[r] + e + c * VL, old[r][c] + sums[r][c]);
  }

#if defined(__AVX512BF16__)
  // sums += the weighted values of two tokens at a time; an odd last one is its own neighbour, with the weight 0.
  template <int R, int COLUMNS>
  __attribute__((always_inline)) void add_pairs(const float* const* weight, const Half* from, int64_t count, int64_t columns,
                                                Ahead& ahead, vf (*sums)[COLUMNS]) const {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                           36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < count; j += 2) {
      const bool two = j + 1 < count;
      const Half *a = from + j * token, *b = two ? a + token : a;
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) ahead.next();
      __m512bh by[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        int32_t pair = 0;
        memcpy(&pair, reinterpret_cast<const Half*>(weight[r]) + j, two ? 4 : 2);
        by[r] = (__m512bh)_mm512_set1_epi32(two ? pair : pair & 0xffff);
      }
      vf x[COLUMNS];
      if constexpr (COLUMNS % 2 == 0) {
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c += 2) {
          const __m512i first = _mm512_loadu_si512(a + c * VL), second = _mm512_loadu_si512(b + c * VL);
          x[c] = (vf)_mm512_permutex2var_epi16(first, lower, second);
          x[c + 1] = (vf)_mm512_permutex2var_epi16(first, upper, second);
        }
      } else {
        const __m512i first = (__m512i)load_some(a, columns), second = (__m512i)load_some(b, columns);
        x[0] = (vf)_mm512_or_si512(_mm512_srli_epi32(first, 16), second);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++)
          sums[r][c] = (vf)_mm512_dpbf16_ps((__m512)sums[r][c], (__m512bh)x[c], by[r]);
    }
  }
#endif
};

}  // namespace clearhead::CLEARHEAD_ISA
