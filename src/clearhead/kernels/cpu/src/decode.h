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
// multiply-adds at VL = 16. Each number of a key or value is therefore loaded once for up to MOST_ROWS rows, VL sums across
// a vector take VL − 1 additions, and lines are asked for in the order in which they lie (few_logits.h, few_values.h, ahead.h).
#pragma once
#include "few_logits.h"
#include "few_values.h"
#include "held.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number, bool FACTORED = false>
class Decode {
 public:
  Decode(const clearhead_problem& problem, const Ids& ids)
      : p(problem), ids(ids), z(problem, BLOCK), all_rows(z.streams * z.rows), row_stride(rounded_up(z.keys, VL) + VL),
        held(FACTORED ? z.d / 2 : z.d), held_wide(rounded_up(units<Unit>(held), VL)),
        left_stride((FACTORED ? 2 : 1) * held_wide + VL),
        products{held, held_wide, left_stride, row_stride, problem.table.token}, sums{z.e, z.e_wide, problem.v.token},
        codes(problem) {
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
    for_each_block(b, part, parts, [&](const Rows& rows, View view, int64_t begin, int64_t count) {
      const int64_t columns = rounded_up(count, VL);
      if (begin < p.held) weigh_codes(b, g, begin, count, scratch, weights);
      if (begin >= p.held) weigh_numbers(b, g, begin, count, scratch, weights);
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
      if (view == View::ALL) return sums.run(z.rows, tile, from, count, out);
      // A value that is not seen is not touched: 0 · NaN would be NaN.
      for (int64_t i = 0; i < z.rows; i++)
        for (int64_t j = 0; j < count; j++)
          if (rows.sees(i, begin + j))
            sums.one(Sums::weight_of(tile + i * TILE, j), from + j * p.v.token, out + i * z.e_wide);
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
  using Sums = FewValues<Unit, Number>;
  static constexpr bool PAIRED = Sums::PAIRED;

  const clearhead_problem& p;
  const Ids& ids;
  const Sizes<Unit> z;
  const int64_t all_rows, row_stride;
  const int64_t held, held_wide, left_stride;  // numbers of a key as it lies; vectors of a query that meet them
  const FewLogits<Unit, FACTORED> products;
  const Sums sums;
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

  // Logits of a block's keys, as many at a time as stay in the first cache for all rows and both streams.
  void weigh_numbers(int64_t b, int64_t g, int64_t begin, int64_t count, const float* scratch, float* weights) const {
    const int64_t each = all_rows / z.key_streams, token = p.k[0].token, bytes = held * static_cast<int64_t>(sizeof(Number));
    const int64_t turns = (each + MOST_ROWS - 1) / MOST_ROWS;
    // Keys of both streams that lie side by side, as in a cache, are one row of memory.
    const bool joined = z.key_streams == 2 && token == 2 * held && p.k[1].token == token &&
                        row_of<Number>(p.k[1], b, g, 0) == row_of<Number>(p.k[0], b, g, 0) + held;
    for (int64_t at = begin; at < begin + count; at += FEW_KEYS) {
      const int64_t some = begin + count - at < FEW_KEYS ? begin + count - at : FEW_KEYS;
      Ahead ahead;
      for (int s = 0; s < z.key_streams; s++) {
        const Number* keys = row_of<Number>(p.k[s], b, g, at - p.held);
        if (s == 0 || !joined)
          ahead = Ahead(keys, joined ? 2 * bytes : bytes, p.k[s].token * static_cast<int64_t>(sizeof(Number)), turns);
        for (int64_t i = 0; i < each; i += MOST_ROWS) {
          const int64_t row = s * each + i;
          products.run(each - i, scratch + row * left_stride, keys, p.k[s].token,
                       FACTORED ? row_of<float>(p.table, b, 0, at) : nullptr, some, ahead, weights + row * row_stride + at);
        }
      }
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
        Ahead nothing;
        const HeldRows<Number> made(p);
        for (int64_t j = 0; j < count; j++) made.numbers_of_key(s, b, g, begin + j, held, own + j * held_wide);
        for (int64_t i = 0; i < each; i += MOST_ROWS)
          products.run(each - i, scratch + (s * each + i) * left_stride, own, held_wide,
                       row_of<float>(p.table, b, 0, begin), count, nothing, to + i * row_stride);
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
};

}  // namespace clearhead::CLEARHEAD_ISA
