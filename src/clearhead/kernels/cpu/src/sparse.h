// Which blocks of keys a chunk of rows may leave out: at most the share `left_out` of each row's softmax mass, in each stream.
//
// A block β of n keys that all rows see has, for a row q, at most n · e^(scale · u) of mass,
//
//   u = min(Σ_c max(q_c max_β k_c, q_c min_β k_c),  q · μ_β + |q| max_β |k − μ_β|)         estimate BOUND
//
// and at least n · e^(scale · q · μ_β), as e^x is convex. So the mass of the blocks that are left out over the mass of
// what was computed and those least ones of the rest bounds the share from above. Estimate MOMENTS takes for both
// n · e^(scale · (q · μ_β + scale / 2 · Σ_c q_c² σ²_βc)), keys spread normally and channel by channel: near, and no bound.
//
// Blocks go in the order of the largest share that any row has in them, as long as every row of both streams stays within
// its limit. Multiply-adds a row and block: 3D or 2D a stream, against BLOCK · (D + E). Everything is in floats.
#pragma once
#include "sizes.h"

namespace clearhead::CLEARHEAD_ISA {

enum Estimate : int32_t { BOUND = 0, MOMENTS = 1 };

// No mass is estimated so high: what might be is kept.
constexpr float MOST_MASS = 1e30f;

// What is known of blocks without their keys: columns of a right operand of `product`, one a block, and a radius each.
template <class Unit, class Number>
class Summaries {
  const clearhead_problem& p;
  const Sizes<Unit>& z;

 public:
  const int64_t depth, wide;  // rows of the operand, and its columns

  Summaries(const clearhead_problem& p, const Sizes<Unit>& z)
      : p(p), z(z), depth(z.d * (p.estimate == BOUND ? 3 : 2)), wide(rounded_up(z.blocks, PANEL)) {}

  int64_t floats() const { return p.left_out > 0 ? z.key_streams * (depth + 1) * wide : 0; }
  const float* columns(const float* at, int s) const { return at + s * (depth + 1) * wide; }
  const float* radii(const float* at, int s) const { return columns(at, s) + depth * wide; }

  void add(int64_t b, int64_t g, int64_t block, float* at) const {
    for (int s = 0; s < z.key_streams; s++) {
      float* to = at + s * (depth + 1) * wide;
      float* column = to + block / PANEL * PANEL * depth + block % PANEL;
      to[depth * wide + block] = p.estimate == BOUND ? envelope(s, b, g, block, column) : moments(s, b, g, block, column);
    }
  }

  // The row that meets a column: (max(q, 0), min(q, 0), q) or (q, q²). Returns |q|.
  float left(const Number* row, float* to) const {
    double norm = 0;
    for (int64_t c = 0; c < z.d; c++) {
      const float plain = number(row[c]), x = p.scale < 0 ? -plain : plain;
      if (p.estimate == BOUND) {
        to[c] = x > 0 ? x : 0;
        to[z.d + c] = x > 0 ? 0 : x;
        to[2 * z.d + c] = x;
      } else {
        to[c] = x;
        to[z.d + c] = x * x;
      }
      norm += static_cast<double>(x) * x;
    }
    return static_cast<float>(__builtin_sqrt(norm));
  }

  // The shares that rows are estimated to have in the first `count` blocks, as far as they are asked about: 0 elsewhere, and
  // infinite where it cannot be told. `reference` and `sums` are of what was computed so far; norms of the rows, and what
  // `left` made of them, `stride` apart. `means` has the room of the shares.
  void estimate(const float* at, int s, int64_t rows, int64_t count, const float* left, int64_t stride, const float* norms,
                const float* reference, const float* sums, const float* asked, float* shares, float* means) const {
    const float *right = columns(at, s), *radius = radii(at, s);
    const bool bound = p.estimate == BOUND;
    product<Single, true>(rows, count, 2 * z.d, left, stride, right, PANEL, PANEL * depth, shares, wide, false);
    if (bound)
      product<Single, true>(rows, count, z.d, left + 2 * z.d, stride, right + 2 * z.d * PANEL, PANEL, PANEL * depth,
                            means, wide, false);
    const vf never = all(0.0f), ceiling = all(MOST_MASS);
    for (int64_t i = 0; i < rows; i++) {
      float* row = shares + i * wide;
      const float* mean = means + i * wide;
      const vf from = all(reference[i]), norm = all(norms[i]);
      vf least = never;
      for (int64_t c = 0; c < count; c += VL) {
        const vf keys = load(asked + c);
        vf most = load(row + c), low = most;
        if (bound) {
          low = load(mean + c);
          const vf ball = norm * load(radius + c) + low;
          most = ball < most ? ball : most;
        }
        const vf mass = keys * exponential(most - from, z.exponent);
        // Also where it is no number: what cannot be told is kept.
        store(row + c, keys > never ? (mass < ceiling ? mass : all(__builtin_inff())) : never);
        if (bound) low = keys * exponential(low - from, z.exponent);
        else low = mass;
        least = least + (keys > never ? (low < ceiling ? low : ceiling) : never);
      }
      const vf inverse = all(1.0f / (sum_of(load(sums + i * VL)) + sum_of(least)));
      for (int64_t c = 0; c < count; c += VL) store(row + c, load(row + c) * inverse);
    }
  }

 private:
  static float number(float x) { return x; }
  static float number(Half x) { return widen(x.bits); }

  const Number* key(int s, int64_t b, int64_t g, int64_t block, int64_t j) const {
    return row_of<Number>(p.k[s], b, g, block * z.block + j);
  }

  // Largest, smallest and mean numbers; the distance of the farthest key from the mean.
  float envelope(int s, int64_t b, int64_t g, int64_t block, float* column) const {
    const int64_t count = z.keys_of(block);
    alignas(64) float mean[CLEARHEAD_WIDEST];
    for (int64_t c = 0; c < z.d; c += VL) {
      const int64_t left = z.d - c;
      vf most = load_some(key(s, b, g, block, 0) + c, left), least = most, sum = most;
      for (int64_t j = 1; j < count; j++) {
        const vf x = load_some(key(s, b, g, block, j) + c, left);
        most = x > most ? x : most;
        least = x < least ? x : least;
        sum = sum + x;
      }
      sum = sum * all(1.0f / static_cast<float>(count));
      store(mean + c, sum);
      for (int64_t i = 0; i < VL && i < left; i++) {
        column[(c + i) * PANEL] = most[i];
        column[(z.d + c + i) * PANEL] = least[i];
        column[(2 * z.d + c + i) * PANEL] = sum[i];
      }
    }
    float farthest = 0;
    for (int64_t j = 0; j < count; j++) {
      vf square = all(0.0f);
      for (int64_t c = 0; c < z.d; c += VL) {
        const vf away = load_some(key(s, b, g, block, j) + c, z.d - c) - load(mean + c);
        square = away * away + square;
      }
      const float distance = sum_of(square);
      farthest = distance > farthest ? distance : farthest;
    }
    return __builtin_sqrtf(farthest) * 1.0001f;
  }

  // Mean and scale / 2 times the variance. Numbers are taken from the first key, which a common mean would drown.
  float moments(int s, int64_t b, int64_t g, int64_t block, float* column) const {
    const int64_t count = z.keys_of(block);
    const vf share = all(1.0f / static_cast<float>(count)), half = all((p.scale < 0 ? -p.scale : p.scale) / 2);
    for (int64_t c = 0; c < z.d; c += VL) {
      const int64_t left = z.d - c;
      const vf origin = load_some(key(s, b, g, block, 0) + c, left);
      vf sum = all(0.0f), squares = sum;
      for (int64_t j = 1; j < count; j++) {
        const vf x = load_some(key(s, b, g, block, j) + c, left) - origin;
        sum = sum + x;
        squares = x * x + squares;
      }
      sum = sum * share;
      const vf variance = (squares * share - sum * sum) * half, mean = origin + sum;
      for (int64_t i = 0; i < VL && i < left; i++) {
        column[(c + i) * PANEL] = mean[i];
        column[(z.d + c + i) * PANEL] = variance[i] > 0 ? variance[i] : 0;
      }
    }
    return 0;
  }
};

// The choice for one chunk of rows. A block is hidden, kept whatever it holds, to be asked about, or left out.
enum class Fate : uint8_t { HIDDEN, KEPT, ASKED, LEFT_OUT };

template <class Unit>
class Choice {
 public:
  // Per stream and row: shares of blocks, shares left out so far. Per block: keys that are asked about, its worst share, its
  // place in their order, its fate.
  static int64_t floats(const Sizes<Unit>& z, int64_t wide) { return z.streams * ROWS * (wide + 1) + 4 * wide; }
  Choice(const Sizes<Unit>& z, int64_t wide, float most, float* at)
      : shares(at), z(z), wide(wide), most(most), taken(at + z.streams * ROWS * wide), asked(taken + z.streams * ROWS),
        worst(asked + wide), order(reinterpret_cast<int32_t*>(worst + wide)),
        fate(reinterpret_cast<Fate*>(order + wide)) {
    for (int64_t i = 0; i < z.streams * ROWS; i++) taken[i] = 0;
    for (int64_t i = 0; i < wide; i++) asked[i] = 0;
    for (int64_t i = 0; i < z.blocks; i++) fate[i] = Fate::HIDDEN;
  }
  Fate of(int64_t block) const { return fate[block]; }
  bool used(int64_t block) const { return fate[block] == Fate::KEPT || fate[block] == Fate::ASKED; }
  void keep(int64_t block) {
    fate[block] = Fate::KEPT;
    asked[block] = 0;
  }
  void ask(int64_t block) {
    fate[block] = Fate::ASKED;
    asked[block] = static_cast<float>(z.keys_of(block));
  }
  const float* keys_asked() const { return asked; }
  float* share(int s, int64_t row) const { return shares + (s * ROWS + row) * wide; }

  // `shares` hold what each row loses with each block that is asked about: leaves out what fits; how many that were.
  int64_t leave_out(int64_t rows, int64_t first, int64_t end) {
    int64_t count = 0, gone = 0;
    for (int64_t block = first; block < end; block++) {
      if (fate[block] != Fate::ASKED) continue;
      bool known = true;
      worst[block] = 0;
      for (int s = 0; s < z.streams; s++)
        for (int64_t i = 0; i < rows; i++) {
          const float lost = share(s, i)[block];
          known &= lost <= most;  // not for NaN
          worst[block] = lost > worst[block] ? lost : worst[block];
        }
      if (!known) continue;
      int64_t at = count++;
      for (; at > 0 && worst[order[at - 1]] > worst[block]; at--) order[at] = order[at - 1];
      order[at] = static_cast<int32_t>(block);
    }
    for (int64_t n = 0; n < count; n++) gone += try_one(rows, order[n]);
    return gone;
  }

 private:
  float* shares;
  const Sizes<Unit>& z;
  const int64_t wide;
  const float most;
  float *taken, *asked, *worst;
  int32_t* order;
  Fate* fate;

  bool try_one(int64_t rows, int64_t block) {
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < rows; i++)
        if (taken[s * ROWS + i] + share(s, i)[block] > most) return false;
    for (int s = 0; s < z.streams; s++)
      for (int64_t i = 0; i < rows; i++) taken[s * ROWS + i] += share(s, i)[block];
    fate[block] = Fate::LEFT_OUT;
    return true;
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
