// Keys and values that lie as codes of 8 or 4 bits: a number is scale · (code + zero), see problem.h.
//
//   logits    q · k_j = Σ_c (q_c s_c) code_jc + Σ_c (q_c s_c) zero_c       s and zero of the block's channels: into the queries
//   values    Σ_j p_j v_jc = Σ_j (p_j s_j) code_jc + Σ_j (p_j s_j) zero_j   s and zero of the token's group: into the weights
//
// Both are products of a few rows of factors (q s; p s) with codes whose reduction runs over quads: four codes of a lane lie
// side by side, for keys four channels of a token, for values four tokens of a channel. So lanes are tokens or channels, sums
// need no additions across a vector, and one instruction multiplies and adds 4 · VL codes. Factors are integers of 16 bits
// there, relative to the largest of a row in the block: what they are rounded by is at most a sixteenth of what the codes
// were. A set without such instructions multiplies floats.
//
// `HeldRows` gives single rows as numbers, for what packs them anyway.
#pragma once
#include "sizes.h"

namespace clearhead::CLEARHEAD_ISA {

constexpr int64_t KEY_BLOCK = CLEARHEAD_KEY_BLOCK, VALUE_GROUP = CLEARHEAD_VALUE_GROUP;

// Four factors, as what multiplies a quad of codes.
#if defined(__AVX512VNNI__)
struct Quad {  // 256 · high + low, four signed bytes each
  int32_t high, low;
};
struct QuadCodes {
  vi all;
  explicit CLEARHEAD_QUAD QuadCodes(vi x) : all(x) {}
};
struct QuadSum {
  vi high = all_ints(0), low = all_ints(0);
  CLEARHEAD_QUAD void add(const QuadCodes& codes, const Quad& by) {
    high = (vi)_mm512_dpbusd_epi32((__m512i)high, (__m512i)codes.all, _mm512_set1_epi32(by.high));
    low = (vi)_mm512_dpbusd_epi32((__m512i)low, (__m512i)codes.all, _mm512_set1_epi32(by.low));
  }
  CLEARHEAD_QUAD vf value() const { return as_floats(high) * clearhead::CLEARHEAD_ISA::all(256.0f) + as_floats(low); }
};
#elif defined(__AVX2__)
struct Quad {  // numbers 0 and 2, numbers 1 and 3, of 16 bits each
  int32_t even, odd;
};
struct QuadCodes {
  vi even, odd;
  explicit CLEARHEAD_QUAD QuadCodes(vi x) : even(x & all_ints(0x00ff00ff)), odd((x >> 8) & all_ints(0x00ff00ff)) {}
};
struct QuadSum {
  vi sum = all_ints(0);
  CLEARHEAD_QUAD static vi product(vi codes, int32_t by) {
#if defined(__AVX512F__)
    return (vi)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(by));
#else
    return (vi)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(by));
#endif
  }
  CLEARHEAD_QUAD void add(const QuadCodes& codes, const Quad& by) {
    sum = sum + product(codes.even, by.even);
    sum = sum + product(codes.odd, by.odd);
  }
  CLEARHEAD_QUAD vf value() const { return as_floats(sum); }
};
#else
struct Quad {
  float number[4];
};
struct QuadCodes {
  vf number[4];
  explicit CLEARHEAD_QUAD QuadCodes(vi x) {
    for (int i = 0; i < 4; i++) number[i] = as_floats((x >> (8 * i)) & all_ints(255));
  }
};
struct QuadSum {
  vf sum = all(0.0f);
  CLEARHEAD_QUAD void add(const QuadCodes& codes, const Quad& by) {
    for (int i = 0; i < 4; i++) sum = codes.number[i] * all(by.number[i]) + sum;
  }
  CLEARHEAD_QUAD vf value() const { return sum; }
};
#endif

// What products with quads are to be multiplied with, and the sum of what rounding took from the factors.
struct QuadStep {
  float step, lost;
};

// `count` factors as quads, and zeros up to whole vectors, which both x and `to` have room for.
static QuadStep to_quads(const float* x, int64_t count, Quad* to) {
#if defined(__AVX2__)
  vf most = all(0.0f);
  for (int64_t c = 0; c < count; c += VL) {
    const vf y = load(x + c), minus = all(0.0f) - y;
    most = greater(greater(y, minus), most);
  }
  const float largest = greatest_of(most);
  // 127 · 256, so that both bytes have room. What is not finite comes back through `lost`.
  const float step = largest / 32512.0f;
  const vf inverse = all(largest > 1e-30f ? 32512.0f / largest : 0.0f);
  vf lost = all(0.0f);
  for (int64_t c = 0; c < count; c += VL) {
    const vf y = load(x + c);
#if defined(__AVX512F__)
    const vi n = (vi)_mm512_cvtps_epi32((__m512)(y * inverse));
#else
    const vi n = (vi)_mm256_cvtps_epi32((__m256)(y * inverse));
#endif
    lost = lost + (y - as_floats(n) * all(step));
    char* at = reinterpret_cast<char*>(to) + 2 * c;
#if defined(__AVX512VNNI__)
    const vi up = (n + all_ints(128)) >> 8;
    const __m128i high = _mm512_cvtepi32_epi8((__m512i)up), low = _mm512_cvtepi32_epi8((__m512i)(n - (up << 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_unpacklo_epi32(high, low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 16), _mm_unpackhi_epi32(high, low));
#else
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtepi32_epi16((__m512i)n);
    const __m128i parts[2] = {_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)};
#else
    const __m128i parts[1] = {
        _mm_packs_epi32(_mm256_castsi256_si128((__m256i)n), _mm256_extracti128_si256((__m256i)n, 1))};
#endif
    for (int i = 0; i < VL / 8; i++)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 16 * i),
                       _mm_shufflehi_epi16(_mm_shufflelo_epi16(parts[i], 0xd8), 0xd8));
#endif
  }
  return {step, sum_of(lost)};
#else
  for (int64_t u = 0; u < count; u += 4) to[u / 4] = {{x[u], x[u + 1], x[u + 2], x[u + 3]}};
  return {1.0f, 0.0f};
#endif
}

// VL quads of codes, the first `lanes` of them where there are fewer.
CLEARHEAD_INLINE vi load_quads(const uint8_t* p, int64_t lanes) {
  if (lanes >= VL) return load_ints(p);
  alignas(64) uint8_t some[4 * VL] = {};
  memcpy(some, p, static_cast<size_t>(4 * lanes));
  return load_ints(some);
}

// R rows of factors times COLUMNS · VL lanes of codes; with PARTS = 2 the upper halves of the bytes meet the second half of the
// factors. `ahead`: bytes on to the same place of the next block, which is asked for.
// A function of its own: inside another the pointers would not stay in registers.
template <int R, int COLUMNS, int PARTS>
static __attribute__((noinline)) void times_quads(const Quad* const* factors, int64_t quads, const uint8_t* codes, int64_t stride,
                                  int64_t lanes, int64_t ahead, vf out[R][COLUMNS]) {
  QuadSum sums[R][COLUMNS];
  const Quad* by[R];
  for (int r = 0; r < R; r++) by[r] = factors[r];
  for (int64_t u = 0; u < quads; u++) {
    const uint8_t* row = codes + u * stride;
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
      if (VL * 4 >= 64 || c % 2 == 0) __builtin_prefetch(row + ahead + c * VL * 4, 0, 2);
      const vi bytes = COLUMNS == 1 ? load_quads(row, lanes) : load_ints(row + c * VL * 4);
      if constexpr (PARTS == 1) {
        const QuadCodes x(bytes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r][c].add(x, by[r][u]);
      } else {
        const QuadCodes lower(bytes & all_ints(0x0f0f0f0f)), upper((bytes >> 4) & all_ints(0x0f0f0f0f));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          sums[r][c].add(lower, by[r][u]);
          sums[r][c].add(upper, by[r][quads + u]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) out[r][c] = sums[r][c].value();
}

// How a reduction over `width` codes lies: `quads` quads of bytes, each byte of `parts` codes.
struct CodeRows {
  int64_t width, quads;
  int parts;
  CodeRows(int64_t width, int64_t bits)
      : width(width), quads((width + (bits == 4 ? 8 : 4) - 1) / (bits == 4 ? 8 : 4)), parts(bits == 4 ? 2 : 1) {}
  int64_t factors() const { return 4 * quads * parts; }
  // Of code c: the quad that it lies in, and its bits there.
  int64_t quad(int64_t c) const { return c / 4 % (quads > 0 ? quads : 1); }
  int part(int64_t c) const { return c / 4 >= quads; }
};

// Rows of keys and values as numbers, from codes or as they lie, with or without a table.
template <class Number>
class HeldRows {
 public:
  explicit HeldRows(const clearhead_problem& problem) : p(problem) {}

  const Number* key(int s, int64_t b, int64_t g, int64_t token, Number* buffer) const {
    if (token >= p.held && !p.table.data) return row_of<Number>(p.k[s], b, g, token - p.held);
    if (!p.table.data) {
      numbers_of_key(s, b, g, token, p.key_width, buffer);
      return buffer;
    }
    const int64_t width = p.key_width / 2;
    Number own[CLEARHEAD_WIDEST / 2];
    const Number* from = own;
    if (token < p.held)
      numbers_of_key(s, b, g, token, width, own);
    else
      from = row_of<Number>(p.k[s], b, g, token - p.held);
    const float* table = row_of<float>(p.table, b, 0, token);
    for (int64_t c = 0; c < width; c += VL)
      for (int64_t half = 0; half < 2; half++)
        store_some(buffer + half * width + c,
                   load_some(from + c, width - c) * load_some(table + half * width + c, width - c), width - c);
    return buffer;
  }

  const Number* value(int64_t b, int64_t g, int64_t token, Number* buffer) const {
    if (token >= p.held) return row_of<Number>(p.v, b, g, token - p.held);
    const CodeRows lies(KEY_BLOCK, p.bits);
    const int64_t at = token % KEY_BLOCK, width = p.value_width;
    const uint8_t* codes = row_of<uint8_t>(p.v_codes.codes, b, g, token / KEY_BLOCK) + lies.quad(at) * width * 4 + at % 4;
    const int shift = 4 * lies.part(at), mask = p.bits == 4 ? 15 : 255;
    for (int64_t begin = 0; begin < width; begin += VALUE_GROUP) {
      const int64_t group = begin / VALUE_GROUP, end = begin + VALUE_GROUP < width ? begin + VALUE_GROUP : width;
      const float zero = static_cast<float>(row_of<int16_t>(p.v_codes.zero, b, g, group)[token]);
      const float scale = widen(row_of<Half>(p.v_codes.scale, b, g, group)[token].bits);
      for (int64_t c = begin; c < end; c += VL) {
        uint8_t some[VL] = {};
        for (int64_t i = 0; i < VL && c + i < end; i++)
          some[i] = static_cast<uint8_t>((codes[4 * (c + i)] >> shift) & mask);
        store_some(buffer + c, (as_floats(load_bytes(some)) + all(zero)) * all(scale), end - c);
      }
    }
    return buffer;
  }

  // The first `width` numbers of a key's codes, without a table.
  template <class To>
  void numbers_of_key(int s, int64_t b, int64_t g, int64_t token, int64_t width, To* to) const {
    const CodeRows lies(width, p.bits);
    const int64_t block = token / KEY_BLOCK, at = token % KEY_BLOCK;
    const uint8_t* codes = row_of<uint8_t>(p.k_codes[s].codes, b, g, block) + at * 4;
    const Half* scale = row_of<Half>(p.k_codes[s].scale, b, g, block);
    const int16_t* zero = row_of<int16_t>(p.k_codes[s].zero, b, g, block);
    const int mask = p.bits == 4 ? 15 : 255;
    for (int64_t c = 0; c < width; c += VL) {
      uint8_t some[VL] = {};
      for (int64_t i = 0; i < VL && c + i < width; i++)
        some[i] = static_cast<uint8_t>(
            (codes[lies.quad(c + i) * KEY_BLOCK * 4 + i % 4] >> (4 * lies.part(c + i))) & mask);
      const vf x = as_floats(load_bytes(some)) + as_floats(load_some(zero + c, width - c));
      store_some(to + c, x * load_some(scale + c, width - c), width - c);
    }
  }

 private:
  const clearhead_problem& p;
};

// A few rows against blocks of codes.
class HeldDecode {
 public:
  HeldDecode(const clearhead_problem& problem) : p(problem), keys(p.key_width, p.bits), values(KEY_BLOCK, p.bits) {}

  int64_t row_quads() const { return keys.quads * keys.parts; }

  // A query row, times the scales of a block, as quads; the step of the quads, and what the zeros add.
  template <class Number>
  void scale_row(const Number* q, float sign, int s, int64_t b, int64_t g, int64_t block, Quad* to, float* step,
                 float* shift) const {
    const Half* scale = row_of<Half>(p.k_codes[s].scale, b, g, block);
    const int16_t* zero = row_of<int16_t>(p.k_codes[s].zero, b, g, block);
    alignas(64) float scaled[CLEARHEAD_WIDEST + 2 * VL];
    for (int64_t c = rounded_up(keys.width, VL); c < keys.factors(); c += VL) store(scaled + c, all(0.0f));
    vf sum = all(0.0f);
    for (int64_t c = 0; c < keys.width; c += VL) {
      const int64_t count = keys.width - c;
      const vf x = load_some(q + c, count) * load_some(scale + c, count) * all(sign);
      store(scaled + c, x);
      sum = sum + x * as_floats(load_some(zero + c, count));
    }
    finish(to_quads(scaled, keys.factors(), to), sum_of(sum), step, shift);
  }

  // Logits of a block for `rows` rows whose quads lie one after the other.
  void logits(int64_t rows, const Quad* query, const float* step, const float* shift, const uint8_t* codes, float* to,
              int64_t stride) const {
    const auto tile = [&](auto r, auto parts, int64_t first) {
      constexpr int R = decltype(r)::value, COLUMNS = R == 4 ? 2 : 4;
      const Quad* factors[R];
      for (int i = 0; i < R; i++) factors[i] = query + row(first, i, rows) * row_quads();
      for (int64_t c = 0; c < KEY_BLOCK; c += COLUMNS * VL) {
        vf sums[R][COLUMNS];
        times_quads<R, COLUMNS, decltype(parts)::value>(factors, keys.quads, codes + c * 4, KEY_BLOCK * 4, COLUMNS * VL,
                                                        first ? 0 : keys.quads * KEY_BLOCK * 4, sums);
        for (int i = 0; i < R; i++) {
          const int64_t at = row(first, i, rows);
          for (int n = 0; n < COLUMNS; n++)
            store(to + at * stride + c + n * VL, sums[i][n] * all(step[at]) + all(shift[at]));
        }
      }
    };
    by_rows(rows, keys.parts, tile);
  }

  // Adds what a block of values, weighed by the tile's rows, makes to `out`.
  void add_values(int64_t rows, const float* tile, int64_t b, int64_t g, int64_t block, float* out,
                  int64_t out_stride) const {
    Quad weights[FEW_ROWS * KEY_BLOCK / 4];
    float step[FEW_ROWS], shift[FEW_ROWS];
    const uint8_t* codes = row_of<uint8_t>(p.v_codes.codes, b, g, block);
    const int64_t width = p.value_width, stride = width * 4, ahead = values.quads * stride;
    for (int64_t begin = 0; begin < width; begin += VALUE_GROUP) {
      const int64_t end = begin + VALUE_GROUP < width ? begin + VALUE_GROUP : width;
      for (int64_t i = 0; i < rows; i++)
        weigh(tile + i * TILE, b, g, block, begin / VALUE_GROUP, weights + i * KEY_BLOCK / 4, step + i, shift + i);
      const auto add = [&](auto r, auto parts, int64_t first) {
        constexpr int R = decltype(r)::value, PARTS = decltype(parts)::value, COLUMNS = R == 4 ? 2 : 4;
        const Quad* factors[R];
        for (int i = 0; i < R; i++) factors[i] = weights + row(first, i, rows) * KEY_BLOCK / 4;
        const auto put = [&](auto columns, int64_t c) {
          constexpr int N = decltype(columns)::value;
          vf sums[R][N], old[R][N];
          times_quads<R, N, PARTS>(factors, values.quads, codes + c * 4, stride, end - c, first ? 0 : ahead, sums);
          // All are read before one is written: two rows may be one and the same. Rows of `out` are whole vectors.
          for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++) old[i][n] = load_some(out + row(first, i, rows) * out_stride + c + n * VL, end - c - n * VL);
          for (int i = 0; i < R; i++) {
            const int64_t at = row(first, i, rows);
            for (int n = 0; n < N; n++)
              store_some(out + at * out_stride + c + n * VL, old[i][n] + sums[i][n] * all(step[at]) + all(shift[at]),
                         end - c - n * VL);
          }
        };
        int64_t c = begin;
        for (; c + COLUMNS * VL <= end; c += COLUMNS * VL) put(Constant<COLUMNS>(), c);
        for (; c < end; c += VL) put(Constant<1>(), c);
      };
      by_rows(rows, values.parts, add);
    }
  }

 private:
  const clearhead_problem& p;
  const CodeRows keys, values;

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  // What rounding took from the factors meets codes that are, on average, half of the largest.
  void finish(QuadStep made, float zeros, float* step, float* shift) const {
    *step = made.step;
    *shift = zeros + made.lost * (p.bits == 4 ? 7.5f : 127.5f);
  }

  // Where there are fewer rows than a tile has, the last one is done again: the same numbers end up in the same place.
  static int64_t row(int64_t first, int i, int64_t rows) { return first + i < rows ? first + i : rows - 1; }

  template <class Body>
  static void by_rows(int64_t rows, int parts, const Body& body) {
    for (int64_t first = 0; first < rows; first += 4) {
      const int64_t some = rows - first;
      const auto with = [&](auto p) {
        if (some == 1)
          body(Constant<1>(), p, first);
        else if (some == 2)
          body(Constant<2>(), p, first);
        else
          body(Constant<4>(), p, first);
      };
      if (parts == 1)
        with(Constant<1>());
      else
        with(Constant<2>());
    }
  }

  // A row of weights times the scales of one group of channels as quads; their step, and what the zeros add to each channel.
  void weigh(const float* tile, int64_t b, int64_t g, int64_t block, int64_t group, Quad* to, float* step,
             float* shift) const {
    const Half* scale = row_of<Half>(p.v_codes.scale, b, g, group) + block * KEY_BLOCK;
    const int16_t* zero = row_of<int16_t>(p.v_codes.zero, b, g, group) + block * KEY_BLOCK;
    alignas(64) float weights[KEY_BLOCK];
    vf sum = all(0.0f);
    for (int64_t c = 0; c < KEY_BLOCK; c += VL) {
      const vf weight = load(tile + c) * load_halves(scale + c);
      store(weights + c, weight);
      sum = sum + weight * as_floats(load_shorts(zero + c));
    }
    finish(to_quads(weights, KEY_BLOCK, to), sum_of(sum), step, shift);
  }
};

}  // namespace clearhead::CLEARHEAD_ISA
