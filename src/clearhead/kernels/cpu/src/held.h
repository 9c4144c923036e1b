// Keys and values that lie as codes of 8 or 4 bits: a number is scale · (code + zero), see problem.h.
//
//   logits    q · k_j = Σ_c (q_c s_c) code_jc + Σ_c (q_c s_c) zero_c      s and zero of the block's channels: into the queries
//   values    Σ_j p_j v_jc = Σ_j (p_j s_j) code_jc + Σ_j (p_j s_j) zero_j  s and zero of the token's group: into the weights
//
// so that a code costs a conversion and what a float costs, and is read where it lies. `HeldRows` gives single rows as numbers,
// for what packs them anyway.
#pragma once
#include "sizes.h"

namespace clearhead::CLEARHEAD_ISA {

// How a row of `width` codes lies: `bytes` of them, each with `parts` numbers that are `bytes` apart.
struct CodeRow {
  int64_t width, bytes;
  int parts;
  CodeRow(int64_t width, int64_t bits) : width(width), bytes(bits == 4 ? (width + 1) / 2 : width), parts(bits == 4 ? 2 : 1) {}
};

template <int PARTS>
CLEARHEAD_INLINE void split_codes(vi bytes, vf x[PARTS]) {
  if constexpr (PARTS == 1) {
    x[0] = as_floats(bytes);
  } else {
    x[0] = as_floats(bytes & all_ints(15));
    x[1] = as_floats(bytes >> 4);
  }
}

CLEARHEAD_INLINE vf load_zeros(const int16_t* p, int64_t count) { return as_floats(load_some(p, count)); }

// Rows of keys and values as numbers, from codes or as they lie, with or without a table.
template <class Number>
class HeldRows {
 public:
  explicit HeldRows(const clearhead_problem& problem) : p(problem) {}

  // Whether key `token` needs a buffer.
  bool made(int64_t token) const { return token < p.held || p.table.data; }

  const Number* key(int s, int64_t b, int64_t g, int64_t token, Number* buffer) const {
    if (!made(token)) return row_of<Number>(p.k[s], b, g, token - p.held);
    const int64_t width = p.table.data ? p.key_width / 2 : p.key_width;
    const float* table = p.table.data ? row_of<float>(p.table, b, 0, token) : nullptr;
    const auto put = [&](int64_t c, vf x, int64_t count) {
      if (!table) return store_some(buffer + c, x, count);
      store_some(buffer + c, x * load_some(table + c, count), count);
      store_some(buffer + width + c, x * load_some(table + width + c, count), count);
    };
    if (token >= p.held) {
      const Number* from = row_of<Number>(p.k[s], b, g, token - p.held);
      for (int64_t c = 0; c < width; c += VL) put(c, load_some(from + c, width - c), width - c);
      return buffer;
    }
    const clearhead_codes& held = p.k_codes[s];
    const int64_t block = token / CLEARHEAD_KEY_BLOCK;
    const Half* scale = row_of<Half>(held.scale, b, g, block);
    const int16_t* zero = row_of<int16_t>(held.zero, b, g, block);
    each_of(row_of<uint8_t>(held.codes, b, g, token), width, [&](int64_t c, vf code, int64_t count) {
      put(c, (code + load_zeros(zero + c, count)) * load_some(scale + c, count), count);
    });
    return buffer;
  }

  const Number* value(int64_t b, int64_t g, int64_t token, Number* buffer) const {
    if (token >= p.held) return row_of<Number>(p.v, b, g, token - p.held);
    const clearhead_codes& held = p.v_codes;
    each_of(row_of<uint8_t>(held.codes, b, g, token), p.value_width, [&](int64_t c, vf code, int64_t count) {
      // A vector may reach over the end of a group: what lies behind it is written again.
      for (int64_t at = 0; at < count && at < VL;) {
        const int64_t group = (c + at) / CLEARHEAD_VALUE_GROUP, end = (group + 1) * CLEARHEAD_VALUE_GROUP - c;
        const float zero = static_cast<float>(row_of<int16_t>(held.zero, b, g, group)[token]);
        const float scale = widen(row_of<Half>(held.scale, b, g, group)[token].bits);
        const vf x = (code + all(zero)) * all(scale);
        if (at == 0)
          store_some(buffer + c, x, count);
        else
          for (int64_t i = at; i < count && i < VL; i++) put_one(buffer + c + i, x[i]);
        at = end;
      }
    });
    return buffer;
  }

 private:
  const clearhead_problem& p;

  static void put_one(float* to, float x) { *to = x; }
  static void put_one(Half* to, float x) { to->bits = narrow(x); }

  // body(first number, VL codes, numbers of the row from there on) over a row.
  template <class Body>
  void each_of(const uint8_t* row, int64_t width, const Body& body) const {
    const CodeRow lies(width, p.bits);
    for (int64_t u = 0; u < lies.bytes; u += VL) {
      const int64_t count = lies.bytes - u;
      vf x[2];
      if (lies.parts == 1) {
        split_codes<1>(load_some(row + u, count), x);
        body(u, x[0], count);
      } else {
        split_codes<2>(load_some(row + u, count), x);
        body(u, x[0], count);
        const int64_t second = width - lies.bytes - u;
        if (second > 0) body(lies.bytes + u, x[1], second);
      }
    }
  }
};

// What a few rows meet codes with. ROWS rows at most share what is loaded.
template <bool FACTORED>
class HeldDecode {
 public:
  static constexpr int MOST = 4;

  HeldDecode(const clearhead_problem& problem, int64_t value_width)
      : p(problem), keys(FACTORED ? p.key_width / 2 : p.key_width, p.bits), values(value_width, p.bits),
        part(rounded_up(keys.bytes, VL)), left(part * keys.parts * (FACTORED ? 2 : 1) + VL) {}

  int64_t left_stride() const { return left; }          // of a scaled query row
  int64_t zeros_floats() const { return part * keys.parts; }

  // A query row (the two halves one after the other under a table) times the scales of a block; returns what zeros add.
  template <class Number>
  float scale_row(const Number* q, float sign, int s, int64_t b, int64_t g, int64_t block, float* to) const {
    const Half* scale = row_of<Half>(p.k_codes[s].scale, b, g, block);
    const int16_t* zero = row_of<int16_t>(p.k_codes[s].zero, b, g, block);
    vf shift = all(0.0f);
    for (int half = 0; half < (FACTORED ? 2 : 1); half++)
      for (int i = 0; i < keys.parts; i++)
        for (int64_t u = 0; u < part; u += VL) {
          const int64_t c = i * keys.bytes + u, bound = i ? keys.width - c : keys.bytes - u;
          const int64_t count = bound < 0 ? 0 : bound;
          const vf x = load_some(q + half * keys.width + c, count) * load_some(scale + c, count) * all(sign);
          store(to + (half * keys.parts + i) * part + u, x);
          if (!FACTORED) shift = shift + x * load_zeros(zero + c, count);
        }
    return sum_of(shift);
  }

  // The zeros of a block, in the order of its queries: a table does not let them be taken out of the sum.
  void zeros_of(int s, int64_t b, int64_t g, int64_t block, float* to) const {
    const int16_t* zero = row_of<int16_t>(p.k_codes[s].zero, b, g, block);
    for (int i = 0; i < keys.parts; i++)
      for (int64_t u = 0; u < part; u += VL) {
        const int64_t c = i * keys.bytes + u, bound = i ? keys.width - c : keys.bytes - u;
        store(to + i * part + u, load_zeros(zero + c, bound < 0 ? 0 : bound));
      }
  }

  // Logits of `count` keys for `rows` rows, the scaled queries `query`, to rows `stride` apart.
  void logits(int64_t rows, const float* query, const float* shift, const float* zeros, const uint8_t* codes,
              int64_t token, const float* table, int64_t table_token, int64_t count, float* to, int64_t stride) const {
    for (int64_t i = 0; i < rows; i += MOST) {
      const int64_t some = rows - i;
      const float* q = query + i * left;
      float* at = to + i * stride;
      if (keys.parts == 1)
        logits_for<1>(some, q, shift + i, zeros, codes, token, table, table_token, count, at, stride);
      else
        logits_for<2>(some, q, shift + i, zeros, codes, token, table, table_token, count, at, stride);
    }
  }

  // Adds what `count` values from `begin` on, weighed by the tile's rows, make to `out`.
  void add_values(int64_t rows, const float* tile, int64_t b, int64_t g, int64_t begin, int64_t count, float* out,
                  int64_t out_stride) const {
    alignas(64) float weights[2][FEW_ROWS * TILE];
    float shift[2][FEW_ROWS];
    const uint8_t* codes = row_of<uint8_t>(p.v_codes.codes, b, g, begin);
    int64_t known[2] = {-1, -1};
    for (int64_t u = 0; u < values.bytes;) {
      // Bytes whose numbers, both of them, stay in one group.
      int64_t end = (u / CLEARHEAD_VALUE_GROUP + 1) * CLEARHEAD_VALUE_GROUP;
      if (values.parts == 2) {
        const int64_t next = ((values.bytes + u) / CLEARHEAD_VALUE_GROUP + 1) * CLEARHEAD_VALUE_GROUP - values.bytes;
        end = next < end ? next : end;
      }
      end = end < values.bytes ? end : values.bytes;
      for (int i = 0; i < values.parts; i++) {
        const int64_t channel = i * values.bytes + u;
        const int64_t group = (channel < values.width ? channel : values.width - 1) / CLEARHEAD_VALUE_GROUP;
        if (group == known[i]) continue;
        weigh(rows, tile, b, g, begin, count, group, weights[i], shift[i]);
        known[i] = group;
      }
      for (int64_t i = 0; i < rows; i += MOST)
        values_for(rows - i, weights[0] + i * TILE, weights[1] + i * TILE, shift[0] + i, shift[1] + i, codes, count, u,
                   end, out + i * out_stride, out_stride);
      u = end;
    }
  }

 private:
  const clearhead_problem& p;
  const CodeRow keys, values;
  const int64_t part, left;

  template <int PARTS, class... Rest>
  void logits_for(int64_t rows, const Rest&... rest) const {
    if (rows == 1)
      logits_of<1, PARTS>(rows, rest...);
    else if (rows == 2)
      logits_of<2, PARTS>(rows, rest...);
    else
      logits_of<MOST, PARTS>(rows, rest...);
  }

  // Where there are fewer rows than R, the last one is done again: the same numbers end up in the same place.
  template <int R, int PARTS>
  void logits_of(int64_t rows, const float* query, const float* shift, const float* zeros, const uint8_t* codes,
                 int64_t token, const float* table, int64_t table_token, int64_t count, float* to,
                 int64_t stride) const {
    constexpr int K = VL / R, HALVES = FACTORED ? 2 : 1;
    const float* q[R];
    float* logits[R];
    float add[R];
    for (int r = 0; r < R; r++) {
      const int64_t row = r < rows ? r : rows - 1;
      q[r] = query + row * left;
      logits[r] = to + row * stride;
      add[r] = FACTORED ? 0.0f : shift[row];
    }
    for (int64_t j = 0; j < count; j += K) {
      const uint8_t* key[K];
      const float* place[K];
      for (int k = 0; k < K; k++) {
        key[k] = codes + (j + k) * token;
        place[k] = FACTORED ? table + (j + k) * table_token : nullptr;
        for (int64_t c = 0; c < keys.bytes; c += 64) __builtin_prefetch(key[k] + AHEAD * token + c, 0, 2);
      }
      vf sums[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) sums[i] = all(0.0f);
      for (int64_t u = 0; u < part; u += VL) {
        const int64_t some = keys.bytes - u;
        vf left_of[PARTS * HALVES * R];
#pragma GCC unroll 16
        for (int i = 0; i < PARTS * HALVES; i++)
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) left_of[i * R + r] = load(q[r] + i * part + u);
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
          vf x[PARTS];
          split_codes<PARTS>(load_some(key[k] + u, some), x);
#pragma GCC unroll 2
          for (int i = 0; i < PARTS; i++) {
            if constexpr (FACTORED) {
              x[i] = x[i] + load(zeros + i * part + u);
              const int64_t c = i * keys.bytes + u, bound = keys.width - c;
              const int64_t real = i ? (bound < 0 ? 0 : bound) : some;
              const vf first = x[i] * load_some(place[k] + c, real);
              const vf second = x[i] * load_some(place[k] + keys.width + c, real);
#pragma GCC unroll 4
              for (int r = 0; r < R; r++)
                sums[r * K + k] = left_of[i * R + r] * first +
                                  (left_of[(PARTS + i) * R + r] * second + sums[r * K + k]);
            } else {
#pragma GCC unroll 4
              for (int r = 0; r < R; r++) sums[r * K + k] = left_of[i * R + r] * x[i] + sums[r * K + k];
            }
          }
        }
      }
      alignas(64) float done[VL];
      store(done, sums_across(sums));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) logits[r][j + k] = done[r * K + k] + add[r];
    }
  }

  // The tile's weights times the scales of one group of channels, and what the zeros add to each of its channels.
  void weigh(int64_t rows, const float* tile, int64_t b, int64_t g, int64_t begin, int64_t count, int64_t group,
             float* weights, float* shift) const {
    const Half* scale = row_of<Half>(p.v_codes.scale, b, g, group) + begin;
    const int16_t* zero = row_of<int16_t>(p.v_codes.zero, b, g, group) + begin;
    for (int64_t i = 0; i < rows; i++) {
      vf sum = all(0.0f);
      for (int64_t c = 0; c < count; c += VL) {
        const vf weight = load(tile + i * TILE + c) * load_halves(scale + c);
        store(weights + i * TILE + c, weight);
        sum = sum + weight * as_floats(load_shorts(zero + c));
      }
      shift[i] = sum_of(sum);
    }
  }

  void values_for(int64_t rows, const float* first, const float* second, const float* first_shift,
                  const float* second_shift, const uint8_t* codes, int64_t count, int64_t u, int64_t end, float* out,
                  int64_t stride) const {
    const auto with = [&](auto r, auto parts) {
      constexpr int R = decltype(r)::value, PARTS = decltype(parts)::value, COLUMNS = 4 / PARTS;
      const float* weights[2][R];
      float shift[2][R];
      float* to[R];
      for (int i = 0; i < R; i++) {
        const int64_t row = i < rows ? i : rows - 1;
        weights[0][i] = first + row * TILE;
        weights[1][i] = second + row * TILE;
        shift[0][i] = first_shift[row];
        shift[1][i] = second_shift[row];
        to[i] = out + row * stride;
      }
      int64_t c = u;
      for (; c + COLUMNS * VL <= end; c += COLUMNS * VL)
        tile_of<R, COLUMNS, PARTS>(weights, shift, codes + c, count, COLUMNS * VL, to, c);
      for (; c < end; c += VL) tile_of<R, 1, PARTS>(weights, shift, codes + c, count, end - c, to, c);
    };
    const auto by_rows = [&](auto parts) {
      if (rows == 1)
        with(Constant<1>(), parts);
      else if (rows == 2)
        with(Constant<2>(), parts);
      else
        with(Constant<MOST>(), parts);
    };
    if (values.parts == 1)
      by_rows(Constant<1>());
    else
      by_rows(Constant<2>());
  }

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  template <int R, int COLUMNS, int PARTS>
  void tile_of(const float* const (*weights)[R], const float (*shift)[R], const uint8_t* codes, int64_t count,
               int64_t width, float* const* to, int64_t at) const {
    vf sums[PARTS][R][COLUMNS];
#pragma GCC unroll 2
    for (int i = 0; i < PARTS; i++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) sums[i][r][c] = all(shift[i][r]);
    for (int64_t j = 0; j < count; j++) {
      const uint8_t* row = codes + j * p.v_codes.codes.token;
      __builtin_prefetch(row + AHEAD * p.v_codes.codes.token, 0, 2);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) {
        vf x[PARTS];
        split_codes<PARTS>(COLUMNS == 1 ? load_some(row + c * VL, width) : load_bytes(row + c * VL), x);
#pragma GCC unroll 2
        for (int i = 0; i < PARTS; i++)
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) sums[i][r][c] = all(weights[i][r][j]) * x[i] + sums[i][r][c];
      }
    }
    // All are read before one is written: two rows may be one and the same.
    vf old[PARTS][R][COLUMNS];
    for (int i = 0; i < PARTS; i++)
      for (int r = 0; r < R; r++)
        for (int c = 0; c < COLUMNS; c++) old[i][r][c] = load_some(place(to[r], i, at) + c * VL, room(i, at + c * VL, width));
    for (int i = 0; i < PARTS; i++)
      for (int r = 0; r < R; r++)
        for (int c = 0; c < COLUMNS; c++)
          store_some(place(to[r], i, at) + c * VL, old[i][r][c] + sums[i][r][c], room(i, at + c * VL, width));
  }

  float* place(float* row, int i, int64_t at) const { return row + i * values.bytes + at; }
  // Numbers from byte `at` on that part i has, at most those of this tile.
  int64_t room(int i, int64_t at, int64_t width) const {
    const int64_t left_over = values.width - i * values.bytes - at;
    return left_over < 0 ? 0 : (width < left_over ? width : left_over);
  }

  static constexpr int64_t AHEAD = 64;  // keys
};

}  // namespace clearhead::CLEARHEAD_ISA
