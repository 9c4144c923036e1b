// The forward pass of many rows that may leave blocks of keys out; which ones, sparse.h says.
//
// For a chunk of rows: logits and weights of the blocks that are always kept, those that hide something from a row, the
// first one a row sees (what softmax attention does not need often goes there) and those around the rows themselves; an
// estimate of all others; logits and weights of those it keeps. Under BOUND, which is far from most blocks' mass, each row's
// mass in each block is known then, and its limit is spent once more, on products with V. For that, and for two streams,
// weights are held as in `run_holding`: about 37 kB a block and stream.
#pragma once
#include "forward.h"
#include "sparse.h"

namespace clearhead::CLEARHEAD_ISA {

template <class Unit, class Number>
class SparseForward : public Forward<Unit, Number> {
  using Base = Forward<Unit, Number>;
  using Base::p, Base::ids, Base::z;

 public:
  using typename Base::State;
  using Base::block_floats;
  SparseForward(const clearhead_problem& problem, const Ids& ids) : Base(problem, ids), summaries(problem, z) {}

  bool sparse() const { return p.left_out > 0 && z.chunks > 1; }
  int64_t summary_floats() const { return sparse() ? summaries.floats() : 0; }
  void summarise(int64_t b, int64_t g, int64_t block, float* to) const { summaries.add(b, g, block, to); }
  int64_t sparse_floats() const {
    if (!sparse()) return 0;
    return Choice<Unit>::floats(z, summaries.wide) + weights_floats() + ROWS * (left_stride() + 1 + summaries.wide);
  }

  // Writes the rows from `begin` on; false, with nothing done, where a block needs to be taken row by row. Adds to `counts` what
  // `clearhead_problem::blocks` gets.
  bool run_sparse(int64_t b, int64_t g, int64_t begin, const float* packed, const uint8_t* finite, const float* known,
                  float* scratch, float* state_at, float* room, int64_t* counts) const {
    Rows rows;
    rows.place(p, ids, b, begin, z.rows_of(begin));
    const Range blocks = {rows.first / z.block, (rows.last + z.block - 1) / z.block};
    Choice<Unit> choice(z, summaries.wide, p.left_out, room);
    const int64_t seen = sort_out(rows, begin, blocks, finite, choice);
    if (seen < 0) return false;
    room += Choice<Unit>::floats(z, summaries.wide);
    const Weights held(room, z);  // room for it only where it is used
    State state(state_at, z);
    this->clear(state);
    this->pack_left(rows, b, g, begin, scratch);
    add_all(Fate::KEPT, rows, blocks, packed, scratch, state, held, choice);
    estimate(rows.count, b, g, begin, blocks.end, known, state, room + weights_floats(), choice);
    const int64_t guessed = choice.leave_out(rows.count, blocks.begin, blocks.end);
    add_all(Fate::ASKED, rows, blocks, packed, scratch, state, held, choice);
    int64_t measured = 0;
    if (p.estimate == BOUND) {
      measure(rows.count, blocks, state, held, choice);
      measured = choice.leave_out(rows.count, blocks.begin, blocks.end);
      if (measured) sum_what_is_kept(rows.count, blocks, state, held, choice);
    }
    if (holds())
      add_values(rows, b, g, begin, blocks, packed, state, held, choice);
    else
      this->finish(b, g, begin, state);
    const int64_t now[3] = {seen, seen - guessed, seen - guessed - measured};
    for (int i = 0; i < 3; i++) counts[i] += now[i];
    return true;
  }

  // What a chunk that cannot be run so counts for.
  void count_all(int64_t b, int64_t begin, int64_t* counts) const {
    Rows rows;
    rows.place(p, ids, b, begin, z.rows_of(begin));
    for (int64_t block = 0; block < z.blocks; block++)
      if (rows.view(block * z.block, z.keys_of(block)) != View::NONE)
        for (int i = 0; i < 3; i++) counts[i]++;
  }

 private:
  const Summaries<Unit, Number> summaries;

  struct Range {
    int64_t begin, end;
  };

  // Of every block and stream: weights (ROWS x TILE), the references they are relative to, and each row's sum.
  struct Weights {
    float *weights, *references, *sums;
    const int64_t streams;
    static int64_t floats(const Sizes<Unit>& z) { return z.blocks * z.streams * ROWS * (TILE + 2); }
    Weights(float* at, const Sizes<Unit>& z)
        : weights(at), references(at + z.blocks * z.streams * ROWS * TILE),
          sums(references + z.blocks * z.streams * ROWS), streams(z.streams) {}
    float* weights_of(int64_t block) const { return weights + block * streams * ROWS * TILE; }
    float* references_of(int64_t block) const { return references + block * streams * ROWS; }
    float* sums_of(int64_t block) const { return sums + block * streams * ROWS; }
  };

  bool holds() const { return p.estimate == BOUND || z.streams == 2; }
  int64_t weights_floats() const { return holds() ? Weights::floats(z) : 0; }
  int64_t left_stride() const { return rounded_up(summaries.depth, VL) + VL; }

  // Which blocks are kept and which are asked about; how many both are, or −1.
  int64_t sort_out(const Rows& rows, int64_t begin, Range blocks, const uint8_t* finite, Choice<Unit>& choice) const {
    int64_t seen = 0;
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
      const View view = rows.view(block * z.block, z.keys_of(block));
      if (view == View::NONE) continue;
      if (view == View::PART && !finite[block]) return -1;
      if (seen++ == 0 || view == View::PART || !finite[block])
        choice.keep(block);
      else
        choice.ask(block);
    }
    for (int64_t i = 0; i < rows.count; i++) {
      const int64_t own = (begin + i) % p.queries + p.offset;
      if (own >= 0 && own < z.keys && choice.of(own / z.block) == Fate::ASKED) choice.keep(own / z.block);
    }
    return seen;
  }

  // The blocks of this fate: held, or with their values at once.
  void add_all(Fate fate, const Rows& rows, Range blocks, const float* packed, float* scratch, const State& state,
               const Weights& held, const Choice<Unit>& choice) const {
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
      if (choice.of(block) != fate) continue;
      const View view = rows.view(block * z.block, z.keys_of(block));
      const float* operands = packed + block * block_floats();
      if (holds()) {
        hold(rows, block, view, operands, scratch, state, held);
      } else {
        Nothing nothing;
        this->add_block(rows, 0, view, block, scratch, operands, scratch + ROWS * z.d_left, state, nothing);
      }
    }
  }

  void hold(const Rows& rows, int64_t block, View view, const float* operands, const float* left, const State& state,
            const Weights& held) const {
    const int64_t columns = rounded_up(z.used(rows, block), VL);
    for (int s = 0; s < z.streams; s++) {
      float* tile = held.weights_of(block) + s * ROWS * TILE;
      const float* keys = operands + (z.key_streams == 2 ? s : 0) * z.d_units * z.block;
      product<Unit, true>(rows.count, columns, z.d_units, left + s * ROWS * z.d_left, z.d_left, keys, PANEL,
                          PANEL * z.d_units, tile, TILE, false);
      if (view == View::PART) rows.hide(tile, TILE, block * z.block, columns);
      this->template weigh<false>(rows.count, columns, tile, state.reference + s * ROWS, state.sums + s * ROWS * VL,
                                  state.out + s * ROWS * z.e_wide);
      for (int64_t i = 0; p.estimate == BOUND && i < rows.count; i++) {
        vf sum = load(tile + i * TILE);
        for (int64_t c = VL; c < columns; c += VL) sum = sum + load(tile + i * TILE + c);
        held.sums_of(block)[s * ROWS + i] = sum_of(sum);
      }
      memcpy(held.references_of(block) + s * ROWS, state.reference + s * ROWS, ROWS * sizeof(float));
    }
  }

  void estimate(int64_t rows, int64_t b, int64_t g, int64_t begin, int64_t end, const float* known, const State& state,
                float* room, const Choice<Unit>& choice) const {
    float *norms = room + ROWS * left_stride(), *means = norms + ROWS;
    for (int s = 0; s < z.streams; s++) {
      for (int64_t i = 0; i < rows; i++)
        norms[i] = summaries.left(this->query_row(s, b, g, begin + i), room + i * left_stride());
      summaries.estimate(known, z.key_streams == 2 ? s : 0, rows, rounded_up(end, VL), room, left_stride(), norms,
                         state.reference + s * ROWS, state.sums + s * ROWS * VL, choice.keys_asked(), choice.share(s, 0), means);
    }
  }

  float mass(const Weights& held, const State& state, int64_t block, int64_t row) const {
    const float then = held.references_of(block)[row], now = state.reference[row], sum = held.sums_of(block)[row];
    return then == now ? sum : sum * this->weight(then, now)[0];
  }

  // The shares of the blocks that were asked about, now that their logits are known.
  void measure(int64_t rows, Range blocks, const State& state, const Weights& held, const Choice<Unit>& choice) const {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < rows; i++) {
        const int64_t row = s * ROWS + i;
        const float all_of_it = sum_of(load(state.sums + row * VL));
        for (int64_t block = blocks.begin; block < blocks.end; block++)
          if (choice.of(block) == Fate::ASKED) choice.share(s, i)[block] = mass(held, state, block, row) / all_of_it;
      }
  }

  // Sums without the blocks that were left out, so that the weights that remain add up to one.
  void sum_what_is_kept(int64_t rows, Range blocks, const State& state, const Weights& held,
                        const Choice<Unit>& choice) const {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < rows; i++) {
        vf sum = all(0.0f);
        for (int64_t block = blocks.begin; block < blocks.end; block++)
          if (choice.used(block)) sum[0] += mass(held, state, block, s * ROWS + i);
        store(state.sums + (s * ROWS + i) * VL, sum);
      }
  }

  void add_values(const Rows& rows, int64_t b, int64_t g, int64_t begin, Range blocks, const float* packed,
                  const State& state, const Weights& held, const Choice<Unit>& choice) const {
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
      if (!choice.used(block)) continue;
      const int64_t count = z.used(rows, block);
      float* weights = held.weights_of(block);
      this->mix(rows.count, rounded_up(count, VL), b, g, begin, held.references_of(block), state, weights);
      product<Unit, true>(rows.count, z.e_wide, units<Unit>(count), weights, TILE,
                          packed + block * block_floats() + z.key_streams * z.d_units * z.block, PANEL,
                          PANEL * units<Unit>(z.keys_of(block)), state.out, z.e_wide, true);
    }
    this->write(rows.count, b, g, begin, state.out);
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
