// The backward pass.
//
// With P_s = exp(scale (S_s − m_s)) / s_s, λ the gate, dO the output's gradient, and for each row
// δ_1 = dO · O_1, δ_2 = dO · O_2, where O_1 = O + λ O_2:
//
//   dP   = dO Vᵀ                     one product: both streams share it
//   dV   = (P_1 − λ P_2)ᵀ dO         one product
//   dS_1 = P_1 ∘ (dP − δ_1)          dS_2 = −λ P_2 ∘ (dP − δ_2)
//   dQ_s = scale dS_s K_s            dK_s = scale dS_sᵀ Q_s            dλ = −δ_2
//
// Multiply-adds for a head, query and key: streams · 3D + 2E (scores, dQ, dK; dP, dV). With D = d, E = 2d and two
// streams that is 10d, what two softmax heads of width d cost.
//
// A task is one key-value group (or every parts-th block of its keys). It walks over the blocks of keys, whose dK and dV
// stay in the cache, and for each over the chunks of rows, whose dQ is summed in the task's own memory: no two tasks
// write to the same place, so the result does not depend on which thread ran what.
#pragma once
#include "forward.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number>
class Backward {
 public:
  Backward(const clearhead_problem& problem, const Ids& ids) : p(problem), ids(ids), z(problem, BLOCK) {}

  const Sizes<Unit>& sizes() const { return z; }
  int64_t query_floats() const { return z.streams * z.rows * z.d_wide; }  // dQ of a task
  int64_t scratch_floats() const {
    const int64_t queries = z.streams * (ROWS * z.d_left + units<Unit>(ROWS) * z.d_panels + VL) + ROWS * z.e_left +
                            units<Unit>(ROWS) * z.e_panels;
    const int64_t tiles = (z.streams + 1) * ROWS * TILE * 2;
    const int64_t sums = BLOCK * (z.key_streams * z.d_wide + z.e_wide);
    return queries + tiles + sums + 2 * key_floats() + 3 * z.streams * z.rows + VL;
  }

  void run(int64_t b, int64_t g, int64_t part, int64_t parts, float* scratch, float* grad_q) const {
    Space space(scratch, *this);
    memset(grad_q, 0, sizeof(float) * static_cast<size_t>(query_floats()));
    prepare_rows(b, g, space);
    for (int64_t block = part; block < z.blocks; block += parts) {
      memset(space.grad_k, 0, sizeof(float) * static_cast<size_t>(BLOCK * (z.key_streams * z.d_wide + z.e_wide)));
      for_each_tile(b, g, block, space, [&](const Rows& rows, int64_t begin, View view, const float* keys) {
        add_tile(rows, b, g, begin, view, block, keys, grad_q, space);
      });
      write_keys(b, g, block, space);
    }
    if (part == 0) write_gate(b, g, space);
  }

  // Writes rows of dQ as the sum over the parts' own.
  void write_queries(int64_t b, int64_t g, int64_t begin, int64_t count, const float* grad_q, int64_t parts) const {
    const vf scale = all(p.scale);
    for (int s = 0; s < z.streams; s++)
      for (int64_t row = begin; row < begin + count; row++) {
        Number* to = row_of<Number>(p.grad_q[s], b, z.head_of(g, row), z.token_of(row));
        const float* from = grad_q + (s * z.rows + row) * z.d_wide;
        for (int64_t c = 0; c < z.d; c += VL) {
          vf sum = load(from + c);
          for (int64_t part = 1; part < parts; part++) sum = sum + load(from + part * query_floats() + c);
          store_some(to + c, sum * scale, z.d - c);
        }
      }
  }

 private:
  const clearhead_problem& p;
  const Ids& ids;
  const Sizes<Unit> z;

  // Both streams' Kᵀ (for the scores) and K (for dQ), and Vᵀ (for dP).
  int64_t key_floats() const {
    return z.key_streams * (z.d_units * BLOCK + units<Unit>(BLOCK) * z.d_panels) + z.e_units * BLOCK;
  }

  // A worker's memory.
  struct Space {
    float *keys, *masked_keys, *queries_left, *queries_stacked, *grad_left, *grad_stacked, *tile, *turned, *grad_k, *grad_v;
    float *reference, *inverse, *delta;  // by stream and row of the whole group
    Space(float* at, const Backward& of) {
      const Sizes<Unit>& z = of.z;
      const int64_t turned_floats = (z.streams + 1) * ROWS * TILE;
      keys = at;
      masked_keys = keys + of.key_floats();
      queries_left = masked_keys + of.key_floats();
      queries_stacked = queries_left + z.streams * ROWS * z.d_left;
      grad_left = queries_stacked + z.streams * units<Unit>(ROWS) * z.d_panels;
      grad_stacked = grad_left + ROWS * z.e_left;
      tile = grad_stacked + units<Unit>(ROWS) * z.e_panels;
      turned = tile + turned_floats;
      grad_k = turned + turned_floats;
      grad_v = grad_k + z.key_streams * BLOCK * z.d_wide;
      reference = grad_v + BLOCK * z.e_wide;
      inverse = reference + z.streams * z.rows;
      delta = inverse + z.streams * z.rows;
    }
  };

  float gate_of(int64_t b, int64_t g, int64_t row) const {
    return *row_of<float>(p.gate, b, z.head_of(g, row), z.token_of(row));
  }

  // References, inverse sums and δ of every row.
  void prepare_rows(int64_t b, int64_t g, const Space& space) const {
    float *first = space.delta, *second = space.delta + z.rows;
    for (int64_t row = 0; row < z.rows; row++) {
      const int64_t head = z.head_of(g, row), token = z.token_of(row);
      const int64_t size = p.batch * p.heads * p.queries, at = (b * p.heads + head) * p.queries + token;
      for (int s = 0; s < z.streams; s++) {
        const float reference = p.statistics[2 * s * size + at], sum = p.statistics[(2 * s + 1) * size + at];
        space.reference[s * z.rows + row] = reference == -__builtin_inff() ? 0.0f : reference;
        space.inverse[s * z.rows + row] = sum == 0.0f ? 0.0f : 1.0f / sum;
      }
      const Number* grad = row_of<Number>(p.grad_out, b, head, token);
      first[row] = dot(grad, row_of<Number>(p.out, b, head, token));
      if (z.streams == 2) second[row] = p.noise.data ? dot(grad, row_of<Number>(p.noise, b, head, token)) : 0.0f;
    }
    if (z.streams == 1) return;
    if (!p.noise.data)
      for (int64_t block = 0; block < z.blocks; block++)
        for_each_tile(b, g, block, space, [&](const Rows& rows, int64_t begin, View view, const float* keys) {
          add_delta(rows, b, g, begin, view, block, keys, space);
        });
    for (int64_t row = 0; row < z.rows; row++) first[row] += gate_of(b, g, row) * second[row];
  }

  // δ_2 where O_2 was not kept: the sum over the keys of P_2 ∘ dP.
  void add_delta(const Rows& rows, int64_t b, int64_t g, int64_t begin, View view, int64_t block, const float* keys,
                 const Space& space) const {
    const int64_t columns = weigh_tile(rows, b, g, begin, view, block, keys, 1, space);
    for (int64_t i = 0; i < rows.count; i++) {
      const Row row = row_constants(b, g, begin + i, space);
      vf sum = all(0.0f);
      for (int64_t c = 0; c < columns; c += VL)
        sum = row.weight(1, load(space.tile + (ROWS + i) * TILE + c), z.exponent) *
                  load(space.tile + (2 * ROWS + i) * TILE + c) + sum;
      space.delta[z.rows + begin + i] += sum_of(sum);
    }
  }

  void write_gate(int64_t b, int64_t g, const Space& space) const {
    if (z.streams == 1) return;
    for (int64_t row = 0; row < z.rows; row++)
      p.grad_gate[(b * p.heads + z.head_of(g, row)) * p.queries + z.token_of(row)] = -space.delta[z.rows + row];
  }

  float dot(const Number* a, const Number* b) const {
    vf sum = all(0.0f);
    for (int64_t c = 0; c < z.e; c += VL) sum = load_some(a + c, z.e - c) * load_some(b + c, z.e - c) + sum;
    return sum_of(sum);
  }

  bool pack_keys(int64_t b, int64_t g, int64_t block, const uint8_t* visible, float* to) const {
    const int64_t begin = block * BLOCK, count = z.keys_of(block);
    bool finite = true;
    for (int s = 0; s < z.key_streams; s++) {
      const Number* keys = row_of<Number>(p.k[s], b, g, begin);
      finite &= pack_transposed<Unit>([&](int64_t j) { return keys + j * p.k[s].token; }, count, z.d, visible, to);
      to += z.d_units * BLOCK;
      pack_stacked<Unit>([&](int64_t j) { return keys + j * p.k[s].token; }, count, z.d, visible, 0, to);
      to += units<Unit>(BLOCK) * z.d_panels;
    }
    const Number* values = row_of<Number>(p.v, b, g, begin);
    const auto value = [&](int64_t j) { return values + j * p.v.token; };
    return pack_transposed<Unit>(value, count, z.e, visible, to) && finite;
  }

  void pack_queries(int64_t b, int64_t g, int64_t begin, int64_t count, const Space& space) const {
    for (int s = 0; s < z.streams; s++)
      pack_rows(p.q[s], b, g, begin, count, z.d, z.d_left, z.flip, space.queries_left + s * ROWS * z.d_left,
                space.queries_stacked + s * units<Unit>(ROWS) * z.d_panels);
    pack_rows(p.grad_out, b, g, begin, count, z.e, z.e_left, 0, space.grad_left, space.grad_stacked);
  }

  // A chunk of rows both as a left operand and, for products that reduce over the rows, stacked.
  void pack_rows(const clearhead_tensor& tensor, int64_t b, int64_t g, int64_t begin, int64_t count, int64_t width,
                 int64_t left_stride, int32_t flip, float* left, float* stacked) const {
    const auto row = [&](int64_t i) {
      return row_of<const Number>(tensor, b, z.head_of(g, begin + i), z.token_of(begin + i));
    };
    for (int64_t i = 0; i < count; i++) pack_left_row<Unit>(row(i), width, flip, left + i * left_stride);
    pack_stacked<Unit>(row, count, width, nullptr, flip, stacked);
  }

  // body(rows, begin, view, keys) for every chunk that sees something of a block.
  template <class Body>
  void for_each_tile(int64_t b, int64_t g, int64_t block, const Space& space, Body body) const {
    const uint8_t* real = p.padding ? p.padding + b * p.padding_batch + block * BLOCK : nullptr;
    const bool clean = pack_keys(b, g, block, real, space.keys);
    for (int64_t chunk = 0; chunk < z.chunks; chunk++) {
      Rows rows;
      const int64_t begin = chunk * ROWS;
      rows.place(p, ids, b, begin, z.rows_of(begin));
      const View view = rows.view(block * BLOCK, z.keys_of(block));
      if (view == View::NONE) continue;
      if (clean || view == View::ALL) {
        body(rows, begin, view, space.keys);
        continue;
      }
      // See Forward::add_block_by_rows.
      uint8_t visible[BLOCK];
      for (int64_t i = 0; i < rows.count; i++) {
        if (!rows.seen(i, block * BLOCK, z.keys_of(block), visible)) continue;
        pack_keys(b, g, block, visible, space.masked_keys);
        body(rows.only(i), begin + i, View::PART, space.masked_keys);
      }
    }
  }

  // Floats of one stream's keys as `pack_keys` leaves them.
  int64_t stream_floats() const { return z.d_units * BLOCK + units<Unit>(BLOCK) * z.d_panels; }

  // Packs the chunk, and fills the tiles of logits from stream `first` on and the tile of dP; returns their columns.
  int64_t weigh_tile(const Rows& rows, int64_t b, int64_t g, int64_t begin, View view, int64_t block, const float* keys,
                     int first, const Space& space) const {
    const int64_t columns = rounded_up(z.used(rows, block), VL);
    pack_queries(b, g, begin, rows.count, space);
    for (int s = first; s < z.streams; s++) {
      float* logits = space.tile + s * ROWS * TILE;
      product<Unit, true>(rows.count, columns, z.d_units, space.queries_left + s * ROWS * z.d_left, z.d_left,
                          keys + (z.key_streams == 2 ? s : 0) * stream_floats(), PANEL, PANEL * z.d_units, logits, TILE,
                          false);
      if (view == View::PART) rows.hide(logits, TILE, block * BLOCK, columns);
    }
    product<Unit, true>(rows.count, columns, z.e_units, space.grad_left, z.e_left, keys + z.key_streams * stream_floats(),
                        PANEL, PANEL * z.e_units, space.tile + z.streams * ROWS * TILE, TILE, false);
    return columns;
  }

  void add_tile(const Rows& rows, int64_t b, int64_t g, int64_t begin, View view, int64_t block, const float* keys,
                float* grad_q, const Space& space) const {
    const int64_t count = z.used(rows, block);
    const int64_t columns = weigh_tile(rows, b, g, begin, view, block, keys, 0, space);
    differentiate(rows.count, columns, b, g, begin, space);
    const int64_t deep = units<Unit>(rows.count);
    // Under policy Pair the products over rows read copies with the rows in pairs.
    const float* turned = Unit::PER_UNIT == 1 ? space.tile : space.turned;
    product<Unit, false>(count, z.e_wide, deep, turned + z.streams * ROWS * TILE, TILE, space.grad_stacked, PANEL,
                         PANEL * deep, space.grad_v, z.e_wide, true);
    for (int s = 0; s < z.streams; s++) {
      const int stream = z.key_streams == 2 ? s : 0;
      product<Unit, false>(count, z.d_wide, deep, turned + s * ROWS * TILE, TILE,
                           space.queries_stacked + s * units<Unit>(ROWS) * z.d_panels, PANEL, PANEL * deep,
                           space.grad_k + stream * BLOCK * z.d_wide, z.d_wide, true);
      product<Unit, true>(rows.count, z.d_wide, units<Unit>(count), space.tile + s * ROWS * TILE, TILE,
                          keys + stream * stream_floats() + z.d_units * BLOCK, PANEL,
                          PANEL * units<Unit>(z.keys_of(block)), grad_q + (s * z.rows + begin) * z.d_wide, z.d_wide, true);
    }
  }

  // The logits of stream s become dS_s, dP becomes P_1 − λ P_2; in `turned` too where products reduce over rows of pairs.
  void differentiate(int64_t count, int64_t columns, int64_t b, int64_t g, int64_t begin, const Space& space) const {
    for (int64_t i = 0; i < count; i += Unit::PER_UNIT) {
      Row row[Unit::PER_UNIT];
      for (int64_t r = 0; r < Unit::PER_UNIT; r++)
        if (i + r < count) row[r] = row_constants(b, g, begin + i + r, space);
      float* at[3];
      for (int s = 0; s <= z.streams; s++) at[s] = space.tile + (s * ROWS + i) * TILE;
      for (int64_t c = 0; c < columns; c += VL) {
        vf grads[2][Unit::PER_UNIT], weights[Unit::PER_UNIT];
        for (int64_t r = 0; r < Unit::PER_UNIT; r++) {
          const int64_t shift = r * TILE + c;
          if (i + r >= count) {
            grads[0][r] = grads[1][r] = weights[r] = all(0.0f);
            continue;
          }
          const vf grad = load(at[z.streams] + shift);
          const vf first = row[r].weight(0, load(at[0] + shift), z.exponent);
          grads[0][r] = of_logit(first, first * (grad - all(row[r].delta[0])));
          weights[r] = first;
          if (z.streams == 2) {
            const vf second = row[r].weight(1, load(at[1] + shift), z.exponent), gated = second * all(row[r].gate);
            weights[r] = first - gated;
            grads[1][r] = of_logit(second, gated * (all(row[r].delta[1]) - grad));
          }
        }
        keep(i, c, grads, weights, at, count, space);
      }
    }
  }

  // The gradient of a logit, where it is not 0 whatever the rest is. A weight of one leaves nothing for the other keys, so
  // the softmax does not move: the difference of two roundings of dP would be all there is. A weight of zero moves
  // nothing: δ or dP may be NaN, which must not reach a key that the row does not see.
  static vf of_logit(vf weight, vf grad) {
    return ((weight == all(0.0f)) | (weight == all(1.0f))) ? all(0.0f) : grad;
  }

  struct Row {
    float reference[2], inverse[2], delta[2], gate;
    vf weight(int s, vf logit, const Exponent& exponent) const {
      const vf x = exponential(logit - all(reference[s]), exponent);
      return x == all(0.0f) ? x : x * all(inverse[s]);  // the inverse of a row's sum may be NaN, too
    }
  };

  Row row_constants(int64_t b, int64_t g, int64_t at, const Space& space) const {
    Row row;
    for (int s = 0; s < z.streams; s++) {
      row.reference[s] = space.reference[s * z.rows + at];
      row.inverse[s] = space.inverse[s * z.rows + at];
      row.delta[s] = space.delta[s * z.rows + at];
    }
    row.gate = z.streams == 2 ? gate_of(b, g, at) : 0.0f;
    return row;
  }

  void keep(int64_t i, int64_t c, const vf grads[2][Unit::PER_UNIT], const vf weights[Unit::PER_UNIT], float* const at[3],
            int64_t count, const Space& space) const {
    if constexpr (Unit::PER_UNIT == 1) {
      for (int s = 0; s < z.streams; s++) store(at[s] + c, grads[s][0]);
      store(at[z.streams] + c, weights[0]);
    } else {
      for (int s = 0; s < z.streams; s++) {
        // Read before written: the halves of a row lie in the first half of its floats.
        store_halves(reinterpret_cast<uint16_t*>(at[s]) + c, grads[s][0]);
        if (i + 1 < count) store_halves(reinterpret_cast<uint16_t*>(at[s] + TILE) + c, grads[s][1]);
        store(space.turned + (s * ROWS + i / 2) * TILE + c, pair_up<Unit>(grads[s][0], grads[s][1]));
      }
      store(space.turned + (z.streams * ROWS + i / 2) * TILE + c, pair_up<Unit>(weights[0], weights[1]));
    }
  }

  void write_keys(int64_t b, int64_t g, int64_t block, const Space& space) const {
    const vf scale = all(p.scale < 0 ? -p.scale : p.scale);
    for (int64_t j = 0; j < z.keys_of(block); j++) {
      const int64_t token = block * BLOCK + j;
      for (int s = 0; s < z.key_streams; s++)
        for (int64_t c = 0; c < z.d; c += VL)
          store_some(row_of<Number>(p.grad_k[s], b, g, token) + c,
                     load(space.grad_k + (s * BLOCK + j) * z.d_wide + c) * scale, z.d - c);
      for (int64_t c = 0; c < z.e; c += VL)
        store_some(row_of<Number>(p.grad_v, b, g, token) + c, load(space.grad_v + j * z.e_wide + c), z.e - c);
    }
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
