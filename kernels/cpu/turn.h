// Squares of memory turned: between pixels whose channels are innermost and channels whose pixels are.
#pragma once
#include "simd.h"

namespace {

constexpr int64_t kSide = 16;

FG_INLINE int within(int64_t n) { return static_cast<int>(n < 0 ? 0 : n < W ? n : W); }

// to[j][i] = from[i][j]
FG_INLINE void turn(const float (&from)[kSide][kSide], float (&to)[kSide][kSide]) {
#if defined(FG_HAS_AVX512)
  __m512i x[kSide];
  for (int64_t i = 0; i < kSide; ++i) x[i] = _mm512_loadu_si512(from[i]);
  transpose(x);
  for (int64_t i = 0; i < kSide; ++i) _mm512_storeu_si512(to[i], x[i]);
#else
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t j = 0; j < kSide; ++j) to[j][i] = from[i][j];
#endif
}

// out[j * step + i] = part(i, v): f gives W elements v of row i of a square, of which rows x columns are there.
template <class T, class F>
FG_INLINE void turned(int64_t rows, int64_t columns, T *out, int64_t step, const F &part) {
  float square[kSide][kSide], across[kSide][kSide];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t v = 0; v < kSide; v += W) store(square[i] + v, part(i, v, within(columns - v)));
  for (int64_t i = rows; i < kSide; ++i)
    for (int64_t v = 0; v < kSide; ++v) square[i][v] = 0.0f;
  turn(square, across);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t v = 0; v < rows; v += W) store_n(out + j * step + v, load(across[j] + v), within(rows - v));
}

}  // namespace
