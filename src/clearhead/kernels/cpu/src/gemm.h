// Matrix products of blocks that lie packed in the caches: C (M x N) = or += A (M x K) B (K x N).
//
// A number of the reduction is one 32-bit unit: a float (policy Single), or two neighbouring bfloat16 numbers whose
// products are summed into a float (policy Pair, one instruction where the processor has it).
//
// A: unit (m, k) at A[m·am + k·ak], read one at a time and broadcast, so both orders are as fast.
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

// The register tile: ROWS x COLUMNS·VL of C in accumulators, K steps of one row of B and ROWS broadcasts each.
template <class Unit, int ROWS, int COLUMNS, bool ROW_MAJOR>
CLEARHEAD_INLINE void register_tile(int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                                    int64_t ldc, bool accumulate) {
  vf sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int n = 0; n < COLUMNS; n++) sums[m][n] = accumulate ? load(C + m * ldc + n * VL) : all(0.0f);
  for (int64_t k = 0; k < K; k++) {
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
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int n = 0; n < COLUMNS; n++) store(C + m * ldc + n * VL, sums[m][n]);
}

template <class Unit, int COLUMNS, bool ROW_MAJOR, int ROWS>
static void last_rows(int64_t rows, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                      int64_t ldc, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      register_tile<Unit, ROWS, COLUMNS, ROW_MAJOR>(K, A, stride, B, ldb, C, ldc, accumulate);
    else
      last_rows<Unit, COLUMNS, ROW_MAJOR, ROWS - 1>(rows, K, A, stride, B, ldb, C, ldc, accumulate);
  }
}

template <class Unit, int COLUMNS, bool ROW_MAJOR>
static void panel_product(int64_t M, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb, float* C,
                          int64_t ldc, bool accumulate) {
  const int64_t step = ROW_MAJOR ? stride : 1;
  int64_t m = 0;
  for (; m + MR <= M; m += MR)
    register_tile<Unit, MR, COLUMNS, ROW_MAJOR>(K, A + m * step, stride, B, ldb, C + m * ldc, ldc, accumulate);
  last_rows<Unit, COLUMNS, ROW_MAJOR, MR - 1>(M - m, K, A + m * step, stride, B, ldb, C + m * ldc, ldc, accumulate);
}

// ROW_MAJOR: A's rows are `stride` apart and its reduction is contiguous. Otherwise A is stored transposed: unit (m, k)
// at A[m + k·stride].
template <class Unit, bool ROW_MAJOR>
static void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t stride, const float* B, int64_t ldb,
                    int64_t panel_stride, float* C, int64_t ldc, bool accumulate) {
  int64_t n = 0;
  for (; n + PANEL <= N; n += PANEL, B += panel_stride)
    panel_product<Unit, 2, ROW_MAJOR>(M, K, A, stride, B, ldb, C + n, ldc, accumulate);
  if (n < N) panel_product<Unit, 1, ROW_MAJOR>(M, K, A, stride, B, ldb, C + n, ldc, accumulate);
}

}  // namespace clearhead::CLEARHEAD_ISA
