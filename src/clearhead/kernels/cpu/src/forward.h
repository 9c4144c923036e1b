// The forward pass.
//
// For a chunk of ROWS query rows, over the blocks of BLOCK keys that they see (m, s, O per row and stream, start −inf, 0, 0):
//
//   S_s = Q_s K_sᵀ                                       one product a stream
//   m_s = max(m_s, max S_s);  P_s = exp(scale (S_s − m_s));  s_s += ΣP_s     the reference m moves only when it must
//   O_s = O_s + P_s V                                    the block of V is read once for both streams
//   at the end   O = O_1 / s_1 − gate · O_2 / s_2
//
// Multiply-adds for a head, query and key: streams · (D + E). With D = d, E = 2d and two streams that is 6d, against 4d
// for two softmax heads of width d. The second stream's output O_2 / s_2 is kept for the backward pass; where none follows,
// run_holding needs 4d.
#pragma once
#include "held.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number>
class Forward {
 public:
  Forward(const clearhead_problem& problem, const Ids& ids)
      : p(problem), ids(ids), z(problem, problem.heads / problem.groups * problem.queries <= ROWS ? FEW_KEYS : BLOCK) {}

  int64_t block_floats() const { return z.key_streams * z.d_units * z.block + units<Unit>(z.block) * z.e_panels; }
  int64_t scratch_floats() const {
    return z.streams * ROWS * (z.d_left + TILE + z.e_wide + VL) + 2 * block_floats();
  }
  // What one part of the keys leaves behind for a chunk: outputs, references and sums.
  int64_t state_floats() const { return z.streams * ROWS * (z.e_wide + VL + 1); }

  // One block of keys and values in the layouts of the products; false if a number in it is not finite.
  bool pack_block(int64_t b, int64_t g, int64_t block, const uint8_t* visible, float* to) const {
    const int64_t begin = block * z.block, count = z.keys_of(block);
    // Rows that do not lie as numbers become some here, one after the other; two values are looked at together.
    alignas(64) Number buffer[2][CLEARHEAD_WIDEST];
    const HeldRows<Number> made(p);
    bool finite = true;
    for (int s = 0; s < z.key_streams; s++, to += z.d_units * z.block) {
      const auto key = [&](int64_t j) { return made.key(s, b, g, begin + j, buffer[0]); };
      finite &= pack_transposed<Unit>(key, count, z.d, visible, to);
    }
    const auto value = [&](int64_t j) { return made.value(b, g, begin + j, buffer[j % 2]); };
    return pack_stacked<Unit>(value, count, z.e, visible, 0, to) && finite;
  }

  const uint8_t* padding(int64_t b, int64_t block) const {
    return p.padding ? p.padding + b * p.padding_batch + block * z.block : nullptr;
  }

  // State of a chunk: per stream ROWS outputs, ROWS x VL partial sums, ROWS references.
  struct State {
    float *out, *sums, *reference;
    State(float* at, const Sizes<Unit>& z)
        : out(at), sums(at + z.streams * ROWS * z.e_wide), reference(sums + z.streams * ROWS * VL) {}
  };

  // Rows from `begin` on, against blocks first, first + step, ...; packed blocks if there are any, else packed here.
  void run(int64_t b, int64_t g, int64_t begin, int64_t first, int64_t step, const float* packed, const uint8_t* finite,
           float* scratch, float* state_at) const {
    Rows rows;
    rows.place(p, ids, b, begin, z.rows_of(begin));
    State state(state_at, z);
    clear(state);
    float* left = scratch;
    float* tile = left + z.streams * ROWS * z.d_left;
    float* local = tile + z.streams * ROWS * TILE;
    pack_left(rows, b, g, begin, left);
    int64_t block = rows.first / z.block;
    block += (first - block % step + step) % step;
    for (; block * z.block < rows.last; block += step) {
      const View view = rows.view(block * z.block, z.keys_of(block));
      if (view == View::NONE) continue;
      const bool clean = packed ? finite[block] : pack_block(b, g, block, padding(b, block), local);
      const float* operands = packed ? packed + block * block_floats() : local;
      if (!clean && view == View::PART) {
        add_block_by_rows(rows, b, g, block, left, local + block_floats(), tile, state);
      } else if (packed) {
        Nothing nothing;
        add_block(rows, 0, view, block, left, operands, tile, state, nothing);
      } else {
        Lines next = (block + step) * z.block < rows.last ? lines_of(b, g, block + step) : Lines();
        add_block(rows, 0, view, block, left, operands, tile, state, next);
      }
    }
  }

  // Two streams without a gradient to follow: the maps of a chunk are held until their sums are known, P_1 / s_1 − λ P_2 / s_2
  // is formed and multiplied with V once, for D + D + E multiply-adds instead of D + D + E + E.
  int64_t held_floats() const {
    const bool pays = z.streams == 2 && !p.statistics && z.chunks > 1 && z.blocks <= MOST_HELD;
    return pays ? z.blocks * 2 * ROWS * (TILE + 1) : 0;
  }

  // Writes the rows from `begin` on; false, with nothing done, where a block needs to be taken row by row.
  bool run_holding(int64_t b, int64_t g, int64_t begin, const float* packed, const uint8_t* finite, float* scratch,
                   float* state_at, float* held) const {
    Rows rows;
    rows.place(p, ids, b, begin, z.rows_of(begin));
    const int64_t first = rows.first / z.block, end = (rows.last + z.block - 1) / z.block;
    for (int64_t block = first; block < end; block++)
      if (!finite[block] && rows.view(block * z.block, z.keys_of(block)) == View::PART) return false;
    State state(state_at, z);
    clear(state);
    pack_left(rows, b, g, begin, scratch);
    float* references = held + z.blocks * 2 * ROWS * TILE;
    for (int64_t block = first; block < end; block++) {
      const View view = rows.view(block * z.block, z.keys_of(block));
      const int64_t columns = view == View::NONE ? 0 : rounded_up(z.used(rows, block), VL);
      const float* keys = packed + block * block_floats();
      for (int s = 0; s < 2 && columns; s++) {
        float* logits = held + (block * 2 + s) * ROWS * TILE;
        product<Unit, true>(rows.count, columns, z.d_units, scratch + s * ROWS * z.d_left, z.d_left,
                            keys + (z.key_streams == 2 ? s : 0) * z.d_units * z.block, PANEL, PANEL * z.d_units, logits,
                            TILE, false);
        if (view == View::PART) rows.hide(logits, TILE, block * z.block, columns);
        weigh<false>(rows.count, columns, logits, state.reference + s * ROWS, state.sums + s * ROWS * VL,
                     state.out + s * ROWS * z.e_wide);
        memcpy(references + (block * 2 + s) * ROWS, state.reference + s * ROWS, ROWS * sizeof(float));
      }
    }
    for (int64_t block = first; block < end; block++) {
      if (rows.view(block * z.block, z.keys_of(block)) == View::NONE) continue;
      const int64_t count = z.used(rows, block);
      float* weights = held + block * 2 * ROWS * TILE;
      mix(rows.count, rounded_up(count, VL), b, g, begin, references + block * 2 * ROWS, state, weights);
      product<Unit, true>(rows.count, z.e_wide, units<Unit>(count), weights, TILE,
                          packed + block * block_floats() + z.key_streams * z.d_units * z.block, PANEL,
                          PANEL * units<Unit>(z.keys_of(block)), state.out, z.e_wide, true);
    }
    write(rows.count, b, g, begin, state.out);
    return true;
  }

  // Adds the state of another part of the keys.
  void merge(const State& into, const State& from) const {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < ROWS; i++) {
        const int64_t at = s * ROWS + i;
        const float ours = into.reference[at], theirs = from.reference[at];
        if (theirs == -__builtin_inff() && sum_of(load(from.sums + at * VL)) == 0.0f) continue;
        const float best = theirs > ours ? theirs : ours;
        const vf keep = weight(ours, best), take = weight(theirs, best);
        store(into.sums + at * VL, load(into.sums + at * VL) * keep + load(from.sums + at * VL) * take);
        for (int64_t c = 0; c < z.e_wide; c += VL) {
          float* out = into.out + at * z.e_wide + c;
          store(out, load(out) * keep + load(from.out + at * z.e_wide + c) * take);
        }
        into.reference[at] = best;
      }
  }

  // Mixes the streams and writes the rows from `begin` on.
  void finish(int64_t b, int64_t g, int64_t begin, const State& state) const {
    const int64_t count = z.rows_of(begin);
    for (int64_t i = 0; i < count; i++) {
      const int64_t head = z.head_of(g, begin + i), token = z.token_of(begin + i);
      float inverse[2] = {0, 0};
      for (int s = 0; s < z.streams; s++) {
        const float sum = sum_of(load(state.sums + (s * ROWS + i) * VL));
        inverse[s] = sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that saw nothing gives zeros
        if (p.statistics) {
          const int64_t size = p.batch * p.heads * p.queries, at = (b * p.heads + head) * p.queries + token;
          p.statistics[(2 * s) * size + at] = state.reference[s * ROWS + i];
          p.statistics[(2 * s + 1) * size + at] = sum;
        }
      }
      Number* out = row_of<Number>(p.out, b, head, token);
      const float* signal = state.out + i * z.e_wide;
      if (z.streams == 1) {
        for (int64_t c = 0; c < z.e; c += VL) store_some(out + c, load(signal + c) * all(inverse[0]), z.e - c);
        continue;
      }
      const vf gate = all(*row_of<float>(p.gate, b, head, token));
      const float* second = state.out + (ROWS + i) * z.e_wide;
      for (int64_t c = 0; c < z.e; c += VL) {
        const vf noise = load(second + c) * all(inverse[1]);
        store_some(out + c, load(signal + c) * all(inverse[0]) - gate * noise, z.e - c);
        if (p.noise.data) store_some(row_of<Number>(p.noise, b, head, token) + c, noise, z.e - c);
      }
    }
  }

  const Sizes<Unit>& sizes() const { return z; }

 protected:
  const clearhead_problem& p;
  const Ids& ids;
  const Sizes<Unit> z;

  const Number* query_row(int s, int64_t b, int64_t g, int64_t row) const {
    return row_of<Number>(p.q[s], b, z.head_of(g, row), z.token_of(row));
  }
  vf weight(float reference, float best) const {
    return reference == -__builtin_inff() ? all(0.0f) : exponential(all(reference - best), z.exponent);
  }

  void pack_left(const Rows& rows, int64_t b, int64_t g, int64_t begin, float* left) const {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < rows.count; i++)
        pack_left_row<Unit>(query_row(s, b, g, begin + i), z.d, z.flip, left + (s * ROWS + i) * z.d_left);
  }

  // The held weights of a block, each relative to the reference its row had then, become units of P_1 / s_1 − λ P_2 / s_2,
  // or of P_1 / s_1.
  void mix(int64_t count, int64_t columns, int64_t b, int64_t g, int64_t begin, const float* references,
           const State& state, float* weights) const {
    for (int64_t i = 0; i < count; i++) {
      vf factor[2];
      for (int s = 0; s < z.streams; s++) {
        const float sum = sum_of(load(state.sums + (s * ROWS + i) * VL)), now = state.reference[s * ROWS + i];
        const float then = references[s * ROWS + i];
        factor[s] = (then == now ? all(1.0f) : weight(then, now)) * all(sum == 0.0f ? 0.0f : 1.0f / sum);
      }
      const bool two = z.streams == 2;
      if (two) factor[1] = factor[1] * all(*row_of<float>(p.gate, b, z.head_of(g, begin + i), z.token_of(begin + i)));
      float *first = weights + i * TILE, *second = weights + (ROWS + i) * TILE;
      for (int64_t c = 0; c < columns; c += VL) {
        const vf one = load(first + c) * factor[0], mixed = two ? one - load(second + c) * factor[1] : one;
        if constexpr (Unit::PER_UNIT == 1)
          store(first + c, mixed);
        else
          store_halves(reinterpret_cast<uint16_t*>(first) + c, mixed);
      }
    }
  }

  void write(int64_t rows, int64_t b, int64_t g, int64_t begin, const float* from) const {
    for (int64_t i = 0; i < rows; i++) {
      Number* out = row_of<Number>(p.out, b, z.head_of(g, begin + i), z.token_of(begin + i));
      for (int64_t c = 0; c < z.e; c += VL) store_some(out + c, load(from + i * z.e_wide + c), z.e - c);
    }
  }

  void clear(const State& state) const {
    memset(state.out, 0, sizeof(float) * static_cast<size_t>(z.streams * ROWS * (z.e_wide + VL)));
    for (int64_t i = 0; i < z.streams * ROWS; i++) state.reference[i] = -__builtin_inff();
  }

  // The memory of a block's keys and values.
  Lines lines_of(int64_t b, int64_t g, int64_t block) const {
    const int64_t size = sizeof(Number), begin = block * z.block - p.held, count = z.keys_of(block);
    Lines lines;
    if (begin < 0 || p.table.data) return lines;
    for (int s = 0; s < z.key_streams; s++)
      lines.add(row_of<Number>(p.k[s], b, g, begin), count, p.k[s].token * size, z.d * size);
    lines.add(row_of<Number>(p.v, b, g, begin), count, p.v.token * size, z.e * size);
    return lines;
  }

  // `at`: where the rows begin in left, tile and state.
  template <class Ahead>
  void add_block(const Rows& rows, int64_t at, View view, int64_t block, const float* left, const float* operands,
                 float* tile, const State& state, Ahead& ahead) const {
    const int64_t begin = block * z.block, count = z.used(rows, block), columns = rounded_up(count, VL);
    const float* values = operands + z.key_streams * z.d_units * z.block;
    const int64_t value_panel = PANEL * units<Unit>(z.keys_of(block));
    for (int s = 0; s < z.streams; s++) {
      const int64_t row = s * ROWS + at;
      float* logits = tile + row * TILE;
      const float* keys = operands + (z.key_streams == 2 ? s : 0) * z.d_units * z.block;
      product<Unit, true>(rows.count, columns, z.d_units, left + row * z.d_left, z.d_left, keys, PANEL,
                          PANEL * z.d_units, logits, TILE, false, ahead);
      if (view == View::PART) rows.hide(logits, TILE, begin, columns);
      weigh<Unit::PER_UNIT == 2>(rows.count, columns, logits, state.reference + row, state.sums + row * VL, state.out + row * z.e_wide);
      product<Unit, true>(rows.count, z.e_wide, units<Unit>(count), logits, TILE, values, PANEL, value_panel,
                          state.out + row * z.e_wide, z.e_wide, true, ahead);
    }
  }

  // A block that holds NaN or inf where some row must not look: row by row, with what the row may not see read as zero.
  void add_block_by_rows(const Rows& rows, int64_t b, int64_t g, int64_t block, const float* left, float* local,
                         float* tile, const State& state) const {
    uint8_t visible[BLOCK];
    for (int64_t i = 0; i < rows.count; i++) {
      if (!rows.seen(i, block * z.block, z.keys_of(block), visible)) continue;
      pack_block(b, g, block, visible, local);
      Nothing nothing;
      add_block(rows.only(i), i, View::PART, block, left, local, tile, state, nothing);
    }
  }

  // Logits to weights in place (as floats, or as halves side by side), with the row's reference, sums and output kept in
  // step.
  template <bool HALVES>
  void weigh(int64_t rows, int64_t columns, float* tile, float* reference, float* sums, float* out) const {
    for (int64_t i = 0; i < rows; i++) {
      float* logits = tile + i * TILE;
      vf most = load(logits);
      for (int64_t c = VL; c < columns; c += VL) most = greater(load(logits + c), most);
      if (any_above(most, all(reference[i] + SLACK / z.exponent.high)))
        raise(greatest_of(greater(most, all(reference[i]))), reference + i, sums + i * VL, out + i * z.e_wide);
      // A row that has seen nothing yet has only −inf here, which any finite reference turns into weights of zero.
      const vf from = all(reference[i] == -__builtin_inff() ? 0.0f : reference[i]);
      vf sum = load(sums + i * VL);
      for (int64_t c = 0; c < columns; c += VL) {
        const vf weight = exponential(load(logits + c) - from, z.exponent);
        sum = sum + weight;
        if constexpr (HALVES)
          store_halves(reinterpret_cast<uint16_t*>(logits) + c, weight);
        else
          store(logits + c, weight);
      }
      store(sums + i * VL, sum);
    }
  }

  void raise(float to, float* reference, float* sums, float* out) const {
    const vf keep = weight(*reference, to);
    store(sums, load(sums) * keep);
    for (int64_t c = 0; c < z.e_wide; c += VL) store(out + c, load(out + c) * keep);
    *reference = to;
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
