// A few query rows, as in decoding, against keys and values where they lie: packing them would cost more than using them.
//
//   W_s = Q_s K_sᵀ for all keys; m_s = max W_s; W_s = exp(scale (W_s − m_s)); s_s = ΣW_s      `weigh`, one reading of K
//   O   = (W_1 / s_1 − gate · W_2 / s_2) V                                                    `add_up`, one reading of V
//
// The weights of a few rows are small beside the keys, so they are held until their sums are known: V then meets one
// map, D + D + E multiply-adds for a head and key instead of D + D + E + E. The keys may be cut into parts; a part's
// weights are relative to its own m_s, which `add_up` sets right with what all parts found.
//
// FACTORED: a key of width D is held as D / 2 numbers t, and is (t ∘ T_1, t ∘ T_2) with a table T of its place that all
// heads share (collinear attention's keys before they are turned).
//
// Memory is the limit: for 4 rows of two streams, D = 64 and E = 128 in float32 a key brings 1 KB and needs 64 vector
// multiply-adds at VL = 16. Each number of a key or value is therefore loaded once for up to MOST rows, VL sums across
// a vector take VL − 1 additions, and every line is asked for AHEAD keys before it is needed.
#pragma once
#include "held.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number, bool FACTORED = false>
class Decode {
 public:
  Decode(const clearhead_problem& problem, const Ids& ids)
      : p(problem), ids(ids), z(problem, BLOCK), all_rows(z.streams * z.rows), row_stride(rounded_up(z.keys, VL) + VL),
        held(FACTORED ? z.d / 2 : z.d), held_wide(rounded_up(units<Unit>(held), VL)),
        left_stride((FACTORED ? 2 : 1) * held_wide + VL), codes(problem) {
    static_assert(!FACTORED || Unit::PER_UNIT == 1, "a table is of floats");
  }

  // Not where a gradient will follow: it computes the logits anew, and these differ from its own in their last bit.
  bool applies() const { return z.rows <= FEW_ROWS && !p.statistics && !p.noise.data; }

  int64_t weights_floats() const { return all_rows * row_stride; }                          // of a group
  int64_t state_floats() const { return rounded_up(2 * all_rows, VL) + z.rows * z.e_wide; }  // of a part of a group
  int64_t scratch_floats() const {
    const int64_t own = rounded_up(all_rows * left_stride + z.rows * TILE, VL);
    return p.held ? own + codes_floats() : own;
  }

  // Weights and statistics of one part of the keys of a group.
  void weigh(int64_t b, int64_t g, int64_t part, int64_t parts, float* scratch, float* weights, float* state) const {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < z.rows; i++)
        for (int64_t half = 0; half < (FACTORED ? 2 : 1); half++)
          pack_left_row<Unit>(row_of<Number>(p.q[s], b, z.head_of(g, i), z.token_of(i)) + half * held, held, z.flip,
                              scratch + (s * z.rows + i) * left_stride + half * held_wide);
    vf most[2 * FEW_ROWS];
    for (int64_t i = 0; i < all_rows; i++) most[i] = all(-__builtin_inff());
    const int64_t each = all_rows / z.key_streams;
    for_each_block(b, part, parts, [&](const Rows& rows, View view, int64_t begin, int64_t count) {
      const int64_t columns = rounded_up(count, VL);
      if (begin < p.held) weigh_codes(b, g, begin, count, scratch, weights);
      for (int s = 0; s < z.key_streams && begin >= p.held; s++)
        for (int64_t i = 0; i < each; i += MOST) {
          const int64_t row = s * each + i;
          logits(each - i, scratch + row * left_stride, row_of<Number>(p.k[s], b, g, begin - p.held), p.k[s].token,
                 FACTORED ? row_of<float>(p.table, b, 0, begin) : nullptr, count, i ? 0 : AHEAD,
                 weights + row * row_stride + begin);
        }
      for (int64_t i = 0; i < all_rows; i++) {
        float* row = weights + i * row_stride + begin;
        if (view == View::PART && i % z.rows == 0) rows.hide(row, row_stride, begin, columns);
        for (int64_t c = 0; c < columns; c += VL) most[i] = greater(load(row + c), most[i]);
      }
    });
    for (int64_t i = 0; i < all_rows; i++) {
      const float reference = greatest_of(most[i]);
      // A row that has seen nothing has only −inf here, which any finite reference turns into weights of zero.
      const vf from = all(reference == -__builtin_inff() ? 0.0f : reference);
      vf sum = all(0.0f);
      for_each_block(b, part, parts, [&](const Rows&, View, int64_t begin, int64_t count) {
        float* row = weights + i * row_stride + begin;
        for (int64_t c = 0; c < count; c += VL) {
          const vf weight = exponential(load(row + c) - from, z.exponent);
          store(row + c, weight);
          sum = sum + weight;
        }
      });
      state[i] = reference;
      state[all_rows + i] = sum_of(sum);
    }
  }

  // The output of one part; `states`: those of all parts of the group.
  void add_up(int64_t b, int64_t g, int64_t part, int64_t parts, float* scratch, const float* weights,
              float* states) const {
    float factor[2 * FEW_ROWS];
    for (int64_t i = 0; i < all_rows; i++) factor[i] = factor_of(i, part, parts, states);
    for (int64_t i = z.rows; i < all_rows; i++)
      factor[i] *= *row_of<float>(p.gate, b, z.head_of(g, i - z.rows), z.token_of(i - z.rows));
    float* out = states + part * state_floats() + rounded_up(2 * all_rows, VL);
    memset(out, 0, sizeof(float) * static_cast<size_t>(z.rows * z.e_wide));
    float* tile = scratch + all_rows * left_stride;
    for_each_block(b, part, parts, [&](const Rows& rows, View view, int64_t begin, int64_t count) {
      for (int64_t i = 0; i < z.rows; i++)
        for (int64_t c = 0; c < count; c += VL) {
          vf mixed = load(weights + i * row_stride + begin + c) * all(factor[i]);
          if (z.streams == 2)
            mixed = mixed - load(weights + (z.rows + i) * row_stride + begin + c) * all(factor[z.rows + i]);
          // Two values meet one instruction, as halves, where the processor multiplies them so.
          if constexpr (PAIRED)
            if (begin >= p.held) {
              store_halves(reinterpret_cast<Half*>(tile + i * TILE) + c, mixed);
              continue;
            }
          store(tile + i * TILE + c, mixed);
        }
      // What is not seen weighs nothing, and codes are never NaN.
      if (begin < p.held) return codes.add_values(z.rows, tile, b, g, begin / KEY_BLOCK, out, z.e_wide);
      const Number* from = row_of<Number>(p.v, b, g, begin - p.held);
      if (view == View::ALL) {
        for (int64_t i = 0; i < z.rows; i += MOST)
          values(z.rows - i, tile + i * TILE, from, count, i ? 0 : AHEAD, out + i * z.e_wide);
        return;
      }
      // A value that is not seen is not touched: 0 · NaN would be NaN.
      for (int64_t i = 0; i < z.rows; i++)
        for (int64_t j = 0; j < count; j++)
          if (rows.sees(i, begin + j))
            values(1, weight_of(tile + i * TILE, j), from + j * p.v.token, 1, 0, out + i * z.e_wide);
    });
  }

  // Writes the sum of what the parts of a group made.
  void finish(int64_t b, int64_t g, int64_t parts, const float* states) const {
    for (int64_t i = 0; i < z.rows; i++)
      for (int64_t c = 0; c < z.e; c += VL) {
        vf sum = all(0.0f);
        for (int64_t part = 0; part < parts; part++)
          sum = sum + load(states + part * state_floats() + rounded_up(2 * all_rows, VL) + i * z.e_wide + c);
        store_some(row_of<Number>(p.out, b, z.head_of(g, i), z.token_of(i)) + c, sum, z.e - c);
      }
  }

  const Sizes<Unit>& sizes() const { return z; }

 private:
  static constexpr int MOST = 4;        // rows that share what is loaded
  static constexpr int64_t AHEAD = 64;  // keys
  // Whether weights are bfloat16 where they meet values; a place in a tile is then still given as a float's.
  static constexpr bool PAIRED = Unit::PER_UNIT == 2;

  const clearhead_problem& p;
  const Ids& ids;
  const Sizes<Unit> z;
  const int64_t all_rows, row_stride;
  const int64_t held, held_wide, left_stride;  // numbers of a key as it lies; vectors of a query that meet them
  const HeldDecode codes;

  // body(rows, view, first key, keys) for each block of the part that some row sees something of.
  template <class Body>
  void for_each_block(int64_t b, int64_t part, int64_t parts, const Body& body) const {
    Rows rows;
    rows.place(p, ids, b, 0, z.rows);
    const int64_t first = rows.first / z.block, blocks = (rows.last + z.block - 1) / z.block - first;
    for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; i++) {
      const int64_t begin = (first + i) * z.block, count = z.keys_of(first + i);
      const View view = rows.view(begin, count);
      if (view != View::NONE) body(rows, view, begin, count);
    }
  }

  // Room beside the scratch for a block of codes: the rows as quads, or under a table one key stream as floats.
  int64_t codes_floats() const {
    if (FACTORED) return BLOCK * held_wide;
    return rounded_up(all_rows * codes.row_quads() * static_cast<int64_t>(sizeof(Quad)) / 4 + 2 * VL, VL);
  }

  void weigh_codes(int64_t b, int64_t g, int64_t begin, int64_t count, float* scratch, float* weights) const {
    float* own = scratch + rounded_up(all_rows * left_stride + z.rows * TILE, VL);
    const int64_t each = all_rows / z.key_streams, block = begin / KEY_BLOCK;
    for (int s = 0; s < z.key_streams; s++) {
      float* to = weights + s * each * row_stride + begin;
      if constexpr (FACTORED) {
        const HeldRows<Number> made(p);
        for (int64_t j = 0; j < count; j++) made.numbers_of_key(s, b, g, begin + j, held, own + j * held_wide);
        for (int64_t i = 0; i < each; i += MOST)
          logits(each - i, scratch + (s * each + i) * left_stride, own, held_wide, row_of<float>(p.table, b, 0, begin),
                 count, 0, to + i * row_stride);
        continue;
      }
      Quad* quads = reinterpret_cast<Quad*>(own) + s * each * codes.row_quads();
      float step[2 * FEW_ROWS], shift[2 * FEW_ROWS];
      for (int64_t i = 0; i < each; i++) {
        const int64_t row = s * each + i, of = row % z.rows;
        const Number* q = row_of<Number>(p.q[row / z.rows], b, z.head_of(g, of), z.token_of(of));
        codes.scale_row(q, z.flip ? -1.0f : 1.0f, s, b, g, block, quads + i * codes.row_quads(), step + i, shift + i);
      }
      codes.logits(each, quads, step, shift, row_of<uint8_t>(p.k_codes[s].codes, b, g, block), to, row_stride);
    }
  }

  // What the weights of row i in this part, relative to its own reference, are multiplied with.
  float factor_of(int64_t i, int64_t part, int64_t parts, const float* states) const {
    const auto reference = [&](int64_t of) { return states[of * state_floats() + i]; };
    float best = reference(0), sum = 0;
    for (int64_t of = 1; of < parts; of++) best = reference(of) > best ? reference(of) : best;
    for (int64_t of = 0; of < parts; of++)
      sum += states[of * state_floats() + all_rows + i] * relative(reference(of), best);
    return sum == 0.0f ? 0.0f : relative(reference(part), best) / sum;  // a row that saw nothing gives zeros
  }
  float relative(float reference, float best) const {
    if (reference == best) return 1.0f;
    return reference == -__builtin_inff() ? 0.0f : exponential(all(reference - best), z.exponent)[0];
  }

  template <class Key>
  static void ask_for(const Key* row, int64_t width) {
    for (int64_t c = 0; c < width * static_cast<int64_t>(sizeof(Key)); c += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + c, 0, 2);
  }

  // Logits of `count` keys for the first MOST of `rows` rows; lines `ahead` keys on are asked for.
  template <class Key>
  void logits(int64_t rows, const float* left, const Key* keys, int64_t stride, const float* table, int64_t count,
              int64_t ahead, float* to) const {
    if (rows == 1)
      logits_of<1>(rows, left, keys, stride, table, count, ahead, to);
    else if (rows == 2)
      logits_of<2>(rows, left, keys, stride, table, count, ahead, to);
    else
      logits_of<MOST>(rows, left, keys, stride, table, count, ahead, to);
  }

  // Where there are fewer rows than R, the last one is done again: the same numbers end up in the same place.
  template <int R, class Key>
  void logits_of(int64_t rows, const float* left, const Key* keys, int64_t stride, const float* table, int64_t count,
                 int64_t ahead, float* to) const {
    constexpr int K = VL / R;  // keys at a time: VL sums in all
    const float* query[R];
    float* logits[R];
    for (int r = 0; r < R; r++) {
      query[r] = left + (r < rows ? r : rows - 1) * left_stride;
      logits[r] = to + (r < rows ? r : rows - 1) * row_stride;
    }
    const int64_t whole = held / (VL * Unit::PER_UNIT) * VL;
    for (int64_t j = 0; j < count; j += K) {
      const Key* key[K];
      const float* place[K];
      for (int k = 0; k < K; k++) {
        const int64_t number = j + k < count ? j + k : count - 1;
        key[k] = keys + number * stride;
        place[k] = FACTORED ? table + number * p.table.token : nullptr;
        if (ahead) ask_for(key[k] + ahead * stride, held);
      }
      vf sums[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) sums[i] = all(0.0f);
      for (int64_t u = 0; u < whole; u += VL) {
        vf q[2 * R];
#pragma GCC unroll 8
        for (int r = 0; r < (FACTORED ? 2 : 1) * R; r++) q[r] = load(query[r % R] + r / R * held_wide + u);
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
          const vf x = load_units<Unit>(key[k], u * Unit::PER_UNIT, (u + VL) * Unit::PER_UNIT);
          if constexpr (FACTORED) {
            const vf first = x * load(place[k] + u), second = x * load(place[k] + held + u);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r * K + k] = q[r] * first + (q[R + r] * second + sums[r * K + k]);
          } else {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r * K + k] = Unit::multiply_add(q[r], x, sums[r * K + k]);
          }
        }
      }
      if (whole < held_wide)
        for (int k = 0; k < K; k++) {
          const vf x = load_units<Unit>(key[k], whole * Unit::PER_UNIT, held);
          for (int half = 0; half < (FACTORED ? 2 : 1); half++) {
            const vf y = FACTORED ? x * load_some(place[k] + half * held + whole, held - whole) : x;
            for (int r = 0; r < R; r++)
              sums[r * K + k] = Unit::multiply_add(load(query[r] + half * held_wide + whole), y, sums[r * K + k]);
          }
        }
      alignas(64) float done[VL];
      store(done, sums_across(sums));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) memcpy(logits[r] + j, done + r * K, K * sizeof(float));
    }
  }

  static const float* weight_of(const float* row, int64_t j) {
    if constexpr (PAIRED) return reinterpret_cast<const float*>(reinterpret_cast<const Half*>(row) + j);
    return row + j;
  }

#if defined(__AVX512BF16__)
  // sums += the weighted values of two tokens at a time; an odd last one is its own neighbour, with the weight 0.
  template <int R, int COLUMNS>
  CLEARHEAD_INLINE void add_pairs(const float* const* weight, const Half* from, int64_t token, int64_t count, int64_t width,
                                  int64_t ahead, vf (*sums)[COLUMNS]) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                           36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < count; j += 2) {
      const bool two = j + 1 < count;
      const Half *a = from + j * token, *b = two ? a + token : a;
      if (ahead) {
        ask_for(a + ahead * token, COLUMNS * VL);
        ask_for(b + ahead * token, COLUMNS * VL);
      }
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
        const __m512i first = (__m512i)load_some(a, width), second = (__m512i)load_some(b, width);
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

  // Adds the weighted sum of `count` values to the first MOST of `rows` rows of out.
  void values(int64_t rows, const float* weights, const Number* from, int64_t count, int64_t ahead, float* out) const {
    if (rows == 1)
      values_of<1, 8>(rows, weights, from, count, ahead, out);
    else if (rows == 2)
      values_of<2, 8>(rows, weights, from, count, ahead, out);
    else
      values_of<MOST, 4>(rows, weights, from, count, ahead, out);
  }

  template <int R, int COLUMNS>
  void values_of(int64_t rows, const float* weights, const Number* from, int64_t count, int64_t ahead,
                 float* out) const {
    const float* weight[R];
    float* to[R];
    for (int r = 0; r < R; r++) {
      weight[r] = weights + (r < rows ? r : rows - 1) * TILE;
      to[r] = out + (r < rows ? r : rows - 1) * z.e_wide;
    }
    int64_t e = 0;
    for (; e + COLUMNS * VL <= z.e; e += COLUMNS * VL)
      values_tile<R, COLUMNS>(weight, from + e, count, COLUMNS * VL, ahead, to, e);
    for (; e < z.e; e += VL) values_tile<R, 1>(weight, from + e, count, z.e - e, ahead, to, e);
  }

  template <int R, int COLUMNS>
  void values_tile(const float* const* weight, const Number* from, int64_t count, int64_t width, int64_t ahead,
                   float* const* to, int64_t e) const {
    vf sums[R][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) sums[r][c] = all(0.0f);
#if defined(__AVX512BF16__)
    if constexpr (PAIRED) add_pairs<R, COLUMNS>(weight, from, p.v.token, count, width, ahead, sums);
#endif
    for (int64_t j = PAIRED ? count : 0; j < count; j++) {
      const Number* row = from + j * p.v.token;
      if (ahead) ask_for(row + ahead * p.v.token, COLUMNS * VL);
      vf x[COLUMNS];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) x[c] = load_some(row + c * VL, COLUMNS == 1 ? width : VL);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = all(weight[r][j]) * x[c] + sums[r][c];
    }
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
};

}  // namespace clearhead::CLEARHEAD_ISA
