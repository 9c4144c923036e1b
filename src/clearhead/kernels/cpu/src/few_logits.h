// Logits of a few rows with keys where they lie in memory: each number of a key is loaded once for up to MOST_ROWS rows.
//
// VL sums, of R rows and VL / R keys, stay in registers; what their lanes hold is added up by `sums_across` for all of
// them at once. For that the loop over a key's vectors must be unrolled, so widths that are usual have code of their own.
#pragma once
#include "ahead.h"
#include "sizes.h"

namespace clearhead::CLEARHEAD_ISA {

constexpr int MOST_ROWS = 4;  // rows that share what is loaded

// FACTORED: see decode.h; the query has then two halves, `half` apart, that meet the key times either half of its table.
template <class Unit, bool FACTORED>
struct FewLogits {
  int64_t width;                   // numbers of a key as it lies
  int64_t half;                    // whole vectors of units that these make
  int64_t left_stride, to_stride;  // of a query row, of a row of logits
  int64_t table_stride;

  // Logits of `count` keys for the first MOST_ROWS of `rows` rows.
  template <class Key>
  void run(int64_t rows, const float* left, const Key* keys, int64_t stride, const float* table, int64_t count,
           Ahead& ahead, float* to) const {
    if (rows == 1)
      by_width<1>(rows, left, keys, stride, table, count, ahead, to);
    else if (rows == 2)
      by_width<2>(rows, left, keys, stride, table, count, ahead, to);
    else
      by_width<MOST_ROWS>(rows, left, keys, stride, table, count, ahead, to);
  }

 private:
  static constexpr int EACH = VL * Unit::PER_UNIT;  // numbers of a vector

  template <int R, class Key>
  void by_width(int64_t rows, const float* left, const Key* keys, int64_t stride, const float* table, int64_t count,
                Ahead& ahead, float* to) const {
    if (width == 2 * EACH)
      tile<R, 2>(rows, left, keys, stride, table, count, ahead, to);
    else if (width == 4 * EACH)
      tile<R, 4>(rows, left, keys, stride, table, count, ahead, to);
    else if (width == 8 * EACH)
      tile<R, 8>(rows, left, keys, stride, table, count, ahead, to);
    else
      tile<R, 0>(rows, left, keys, stride, table, count, ahead, to);
  }

  // WHOLE: the vectors of a key, if they are whole ones and so many, or 0. Where there are fewer rows than R, the last one
  // is done again: the same numbers end up in the same place.
  template <int R, int WHOLE, class Key>
  void tile(int64_t rows, const float* left, const Key* keys, int64_t stride, const float* table, int64_t count,
            Ahead& ahead, float* to) const {
    constexpr int K = VL / R;  // keys at a time
    const float* query[R];
    float* logits[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      query[r] = left + (r < rows ? r : rows - 1) * left_stride;
      logits[r] = to + (r < rows ? r : rows - 1) * to_stride;
    }
    const int64_t whole = WHOLE ? WHOLE * VL : width / EACH * VL;
    Ahead lines = ahead;  // a copy of its own stays in registers
    for (int64_t j = 0; j < count; j += K) {
      const Key* key[K];
      const float* place[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) {
        const int64_t number = j + k < count ? j + k : count - 1;
        key[k] = keys + number * stride;
        place[k] = FACTORED ? table + number * table_stride : nullptr;
      }
      vf sums[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) sums[i] = all(0.0f);
      if constexpr (WHOLE > 0) {
#pragma GCC unroll 8
        for (int u = 0; u < WHOLE; u++) add_vector<R>(query, key, place, u * VL, lines, sums);
      } else {
        for (int64_t u = 0; u < whole; u += VL) add_vector<R>(query, key, place, u, lines, sums);
        if (whole < half) add_rest<R>(query, key, place, whole, lines, sums);
      }
      alignas(64) float done[VL];
      store(done, sums_across(sums));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) memcpy(logits[r] + j, done + r * K, K * sizeof(float));
    }
    ahead = lines;
  }

  // sums[r K + k] += the product of a vector of units of row r and of key k, lane by lane.
  template <int R, class Key>
  __attribute__((always_inline)) void add_vector(const float* const* query, const Key* const* key,
                                                 const float* const* place, int64_t u, Ahead& ahead, vf* sums) const {
    constexpr int K = VL / R;
    vf q[2 * R];
#pragma GCC unroll 8
    for (int r = 0; r < (FACTORED ? 2 : 1) * R; r++) q[r] = load(query[r % R] + r / R * half + u);
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
      if ((u / VL * K + k) % (LINE / (EACH * static_cast<int64_t>(sizeof(Key)))) == 0) ahead.next();
      const vf x = load_units<Unit>(key[k], u * Unit::PER_UNIT, (u + VL) * Unit::PER_UNIT);
      if constexpr (FACTORED) {
        const vf first = x * load(place[k] + u), second = x * load(place[k] + width + u);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r * K + k] = q[r] * first + (q[R + r] * second + sums[r * K + k]);
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r * K + k] = Unit::multiply_add(q[r], x, sums[r * K + k]);
      }
    }
  }

  // The same of the last units of a width that is no whole number of vectors.
  template <int R, class Key>
  void add_rest(const float* const* query, const Key* const* key, const float* const* place, int64_t whole,
                Ahead& ahead, vf* sums) const {
    constexpr int K = VL / R;
    for (int k = 0; k < K; k++) {
      ahead.next();
      const vf x = load_units<Unit>(key[k], whole * Unit::PER_UNIT, width);
      for (int part = 0; part < (FACTORED ? 2 : 1); part++) {
        const vf y = FACTORED ? x * load_some(place[k] + part * width + whole, width - whole) : x;
        for (int r = 0; r < R; r++)
          sums[r * K + k] = Unit::multiply_add(load(query[r] + part * half + whole), y, sums[r * K + k]);
      }
    }
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
