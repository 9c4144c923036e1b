// Matrix products of blocks that lie packed in the caches: C (M x N) = or += A (M x K) B (K x N).
//
// A number of the reduction is one 32-bit unit: a float (policy Single), or two neighbouring bfloat16 numbers whose
// products are summed into a float (policy Pair, one instruction where the processor has it).
//
// A: units read one at a time and broadcast, so that it may be stored either way round.
// B: panels of PANEL columns; panel p starts at B + p·panel_stride, its rows ldb apart. The last one may be VL wide.
// C: floats, rows ldc apart. N is a multiple of VL.
#pragma once
#include "simd.h"

namespace clearhead::CLEARHEAD_ISA {

struct Single {
  static constexpr int PER_UNIT = 1;
  CLEARHEAD_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int PER_UNIT = 2;
  CLEARHEAD_INLINE vf multiply_add(vf a, vf b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// What a product asks the memory for while it computes: nothing, or one cache line a step of the reduction.
struct Nothing {
  CLEARHEAD_INLINE void next() {}
};

class Lines {
 public:
  // `rows` rows of `bytes` bytes each, `stride` bytes apart, beyond which nothing is asked for.
  void add(const void* from, int64_t rows, int64_t stride, int64_t bytes) {
    if (count_ < 3) parts_[count_++] = {static_cast<const char*>(from), rows, stride, bytes};
  }
  __attribute__((always_inline)) void next() {
    if (part_ == count_) return;
    Part& part = parts_[part_];
    __builtin_prefetch(part.at + column_, 0, 2);
    column_ += 64;
    if (column_ < part.bytes) return;
    column_ = 0;
    part.at += part.stride;
    if (--part.rows == 0) part_++;
  }

 private:
  struct Part {
    const char* at;
    int64_t rows, stride, bytes;
  };
  Part parts_[3];
  int64_t column_ = 0;
  int count_ = 0, part_ = 0;
};

// The register tile: ROWS x COLUMNS·VL of C in accumulators, K steps of one row of B and ROWS broadcasts each.
template <class Unit, int ROWS, int COLUMNS, bool ROW_MAJOR, class Ahead>
CLEARHEAD_INLINE void register_tile(int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                                    int64_t ldc, bool accumulate, Ahead& ahead) {
  vf sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int n = 0; n < COLUMNS; n++) sums[m][n] = all(0.0f);
  for (int64_t k = 0; k < K; k++) {
    ahead.next();
    vf b[COLUMNS];
#pragma GCC unroll 2
    for (int n = 0; n < COLUMNS; n++) b[n] = load(B + k * ldb + n * VL);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      vf a = all(ROW_MAJOR ? A[m * stride + k] : A[m + k * stride]);
#pragma GCC unroll 2
      for (int n = 0; n < COLUMNS; n++) sums[m][n] = Unit::multiply_add(a, b[n], sums[m][n]);
    }
  }
  // C is added once at the end: one long chain of roundings becomes two short ones.
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int n = 0; n < COLUMNS; n++) {
      float* to = C + m * ldc + n * VL;
      store(to, accumulate ? load(to) + sums[m][n] : sums[m][n]);
    }
}

template <class Unit, int COLUMNS, bool ROW_MAJOR, int ROWS, class Ahead>
static void last_rows(int64_t rows, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                      int64_t ldc, bool accumulate, Ahead& ahead) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      register_tile<Unit, ROWS, COLUMNS, ROW_MAJOR>(K, A, stride, B, ldb, C, ldc, accumulate, ahead);
    else
      last_rows<Unit, COLUMNS, ROW_MAJOR, ROWS - 1>(rows, K, A, stride, B, ldb, C, ldc, accumulate, ahead);
  }
}

template <class Unit, int COLUMNS, bool ROW_MAJOR, class Ahead>
static void panel_product(int64_t M, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                          int64_t ldc, bool accumulate, Ahead& ahead) {
  const int64_t step = ROW_MAJOR ? stride : 1;
  int64_t m = 0;
  for (; m + MR <= M; m += MR)
    register_tile<Unit, MR, COLUMNS, ROW_MAJOR>(K, A + m * step, stride, B, ldb, C + m * ldc, ldc, accumulate, ahead);
  last_rows<Unit, COLUMNS, ROW_MAJOR, MR - 1>(M - m, K, A + m * step, stride, B, ldb, C + m * ldc, ldc, accumulate, ahead);
}

// Rounding grows with the length of a chain of additions: a reduction of more than LONGEST units is cut into chains of
// CHAIN, which C adds up.
constexpr int64_t CHAIN = 64;
constexpr int64_t LONGEST = 128;

// ROW_MAJOR: A's rows are `stride` apart and its reduction is contiguous. Otherwise A is stored transposed: unit (m, k)
// at A[m + k·stride].
template <class Unit, bool ROW_MAJOR, class Ahead>
static void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb,
                    int64_t panel_stride, float* C, int64_t ldc, bool accumulate, Ahead& ahead) {
  const int64_t chain = K > LONGEST ? CHAIN : K;
  for (int64_t n = 0; n < N; n += PANEL, B += panel_stride) {
    int64_t k = 0;
    do {
      const int64_t deep = K - k < chain ? K - k : chain;
      const float* left = A + (ROW_MAJOR ? k : k * stride);
      const bool add = accumulate || k > 0;
      if (n + PANEL <= N)
        panel_product<Unit, 2, ROW_MAJOR>(M, deep, left, stride, B + k * ldb, ldb, C + n, ldc, add, ahead);
      else
        panel_product<Unit, 1, ROW_MAJOR>(M, deep, left, stride, B + k * ldb, ldb, C + n, ldc, add, ahead);
      k += chain;
    } while (k < K);
  }
}

template <class Unit, bool ROW_MAJOR>
static void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb,
                    int64_t panel_stride, float* C, int64_t ldc, bool accumulate) {
  Nothing nothing;
  product<Unit, ROW_MAJOR>(M, N, K, A, stride, B, ldb, panel_stride, C, ldc, accumulate, nothing);
}

}  // namespace clearhead::CLEARHEAD_ISA
