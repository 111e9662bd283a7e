// What a panel of 32 outputs is, for products whose weights lie in such: the columns that are left of it, its bias.
#pragma once
#include "abi.h"
#include "simd.h"

namespace {

constexpr int kPanel = 32, kParts = kPanel / W;  // rows of the weight that lie together, and vectors of their sums

// How many of the W columns from part v on there are, of n.
FG_INLINE int columns(int64_t n, int v) {
  const int64_t left = n - v * W;
  return static_cast<int>(left < 0 ? 0 : left < W ? left : W);
}

// The bias of n columns from `at` on, zero where there is none.
template <int PARTS>
FG_INLINE void get_bias(const void *bias, int64_t dtype, int64_t at, int64_t n, vf (&to)[PARTS]) {
#pragma GCC unroll 32
  for (int v = 0; v < PARTS; ++v) {
    const int some = columns(n, v);
    to[v] = !bias                 ? set1(0.0f)
            : dtype == FG_FLOAT32 ? load_n(static_cast<const float *>(bias) + at + v * W, some)
            : dtype == FG_FLOAT16 ? load_n(static_cast<const fp16 *>(bias) + at + v * W, some)
                                  : load_n(static_cast<const bf16 *>(bias) + at + v * W, some);
  }
}

}  // namespace
