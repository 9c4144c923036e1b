// Vectors of float in the width of the instruction set this file is compiled for, through the compiler's own vector
// types; intrinsics only where those have no word for it. Everything is in a namespace named after the set, so that
// several copies live in one library.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define CLEARHEAD_INLINE static inline __attribute__((always_inline))
#define CLEARHEAD_QUAD __attribute__((always_inline))

namespace clearhead::CLEARHEAD_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // lanes of a vector
constexpr int MR = 8;   // rows of a register tile of a matrix product
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 4;
#else
constexpr int VL = 4;
constexpr int MR = 4;
#endif
constexpr int PANEL = 2 * VL;  // columns of a register tile

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VL * 4), aligned(1), may_alias));

CLEARHEAD_INLINE vf load(const void* p) { return *static_cast<const vf_any*>(p); }
CLEARHEAD_INLINE void store(void* p, vf x) { *static_cast<vf_any*>(p) = x; }
CLEARHEAD_INLINE vi load_ints(const void* p) { return *static_cast<const vi_any*>(p); }

CLEARHEAD_INLINE vf all(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

CLEARHEAD_INLINE vi all_ints(int32_t x) {
#if defined(__AVX512F__)
  return (vi)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
  return (vi)_mm256_set1_epi32(x);
#else
  return vi{x, x, x, x};
#endif
}

CLEARHEAD_INLINE vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < VL; i++) lanes[i] = i;
  return lanes;
}

// Lane by lane; the result is the second argument where the first is NaN.
CLEARHEAD_INLINE vf greater(vf a, vf b) { return a > b ? a : b; }

CLEARHEAD_INLINE bool any_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  vi above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

CLEARHEAD_INLINE float sum_of(vf x) {
  float total = 0;
  for (int i = 0; i < VL; i++) total += x[i];
  return total;
}

CLEARHEAD_INLINE float greatest_of(vf x) {
  float best = x[0];
  for (int i = 1; i < VL; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// What e^(scale · x) needs of a scale >= 0: scale · log2(e) in two floats, since the rounding of one alone would be
// multiplied by x, and the x below which the result is 0.
struct Exponent {
  float high, low, least;
  explicit Exponent(float scale) {
    double exact = static_cast<double>(scale) * 1.4426950408889634;
    if (exact < 1e-30) exact = 1e-30;  // −inf · 0 would be NaN
    high = static_cast<float>(exact);
    low = static_cast<float>(exact - static_cast<double>(high));
    least = -200.0f / high;
  }
};

// e^(scale · x) to 1.2e-7 relative, 0 where that is below 2^-126 (or its neighbourhood) and NaN for NaN:
// 2^n · p(f), n the integer nearest to t = x · log2(e) · scale, f = t − n without cancellation, p a minimax polynomial.
CLEARHEAD_INLINE vf exponential(vf x, const Exponent& by) {
#if defined(__AVX512F__)
  x = (vf)_mm512_max_ps((__m512)all(by.least), (__m512)x);  // this order keeps a NaN
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * all(by.high)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < all(by.least) ? all(by.least) : x;
  const vf shifted = x * all(by.high) + all(12582912.0f);  // 1.5 · 2^23: the integer ends up in the low bits
  const vf n = shifted - all(12582912.0f);
#endif
  vf f = x * all(by.high) - n;
  f = x * all(by.low) + f;
  vf p = all(0.0013264727f);
  p = p * f + all(0.0096715127f);
  p = p * f + all(0.0555073374f);
  p = p * f + all(0.2402224208f);
  p = p * f + all(0.6931469776f);
  p = p * f + all(1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vi power = (vi)shifted - all_ints(0x4b400000) + all_ints(127);
  const vf y = p * (vf)(power << 23);
  return power > all_ints(0) ? y : (n == n ? all(0.0f) : n);
#endif
}

// bfloat16, stored as the upper half of a float; rounded to nearest even, NaN kept.
CLEARHEAD_INLINE float widen(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

CLEARHEAD_INLINE uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// VL bfloat16 numbers as floats.
CLEARHEAD_INLINE vf load_halves(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16);
#else
  uint16_t halves[VL];
  memcpy(halves, p, sizeof halves);
  vf x;
  for (int i = 0; i < VL; i++) x[i] = widen(halves[i]);
  return x;
#endif
}

CLEARHEAD_INLINE void store_halves(void* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  uint16_t halves[VL];
  for (int i = 0; i < VL; i++) halves[i] = narrow(x[i]);
  memcpy(p, halves, sizeof halves);
#endif
}

// VL bytes as integers, and integers as floats.
CLEARHEAD_INLINE vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return vi{p[0], p[1], p[2], p[3]};
#endif
}

// VL 16-bit integers.
CLEARHEAD_INLINE vi load_shorts(const int16_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vi{p[0], p[1], p[2], p[3]};
#endif
}

CLEARHEAD_INLINE vf as_floats(vi x) { return __builtin_convertvector(x, vf); }

// The first halves of a and b, number by number in turn; and the second halves.
CLEARHEAD_INLINE vf interleave_low(vf a, vf b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

CLEARHEAD_INLINE vf interleave_high(vf a, vf b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// (a0, b0, a1, b1) and (a2, b2, a3, b3) of every four lanes; the same of pairs of lanes.
#if defined(__AVX512F__)
#define CLEARHEAD_FOURS(i, j, k, l)                                                                                        \
  i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, k + 12, l + 12
#elif defined(__AVX2__)
#define CLEARHEAD_FOURS(i, j, k, l) i, j, k, l, i + 4, j + 4, k + 4, l + 4
#else
#define CLEARHEAD_FOURS(i, j, k, l) i, j, k, l
#endif
CLEARHEAD_INLINE vf add_neighbours(vf a, vf b) {
  return __builtin_shufflevector(a, b, CLEARHEAD_FOURS(0, VL, 1, VL + 1)) +
         __builtin_shufflevector(a, b, CLEARHEAD_FOURS(2, VL + 2, 3, VL + 3));
}
CLEARHEAD_INLINE vf add_pairs(vf a, vf b) {
  return __builtin_shufflevector(a, b, CLEARHEAD_FOURS(0, 1, VL, VL + 1)) +
         __builtin_shufflevector(a, b, CLEARHEAD_FOURS(2, 3, VL + 2, VL + 3));
}
#undef CLEARHEAD_FOURS

// Lane i becomes the sum of all lanes of x[i]. Each step adds the halves of two vectors into one: first within every four
// lanes, where moving costs least, then across them.
CLEARHEAD_INLINE vf sums_across(vf x[VL]) {
  vf four[VL / 4];
#pragma GCC unroll 4
  for (int i = 0; i < VL / 4; i++)
    four[i] = add_pairs(add_neighbours(x[4 * i], x[4 * i + 1]), add_neighbours(x[4 * i + 2], x[4 * i + 3]));
#if defined(__AVX512F__)
  const auto halves = [](vf a, vf b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const vf a = halves(four[0], four[1]), b = halves(four[2], four[3]);
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return four[0];
#endif
}

// VL vectors in, their transpose out: log2(VL) perfect shuffles.
CLEARHEAD_INLINE void transpose(vf rows[VL]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < VL; stage *= 2) {
    vf mixed[VL];
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; i++) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + VL / 2]);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) rows[i] = mixed[i];
  }
}

}  // namespace clearhead::CLEARHEAD_ISA
