// One vector of floats at the level of this translation unit, and what kernels do with it.
//
//   vf, W                     a vector of W float32 lanes (1 at scalar, 4 neon, 8 avx2, 16 avx512 and above)
//   load(p), store(p, x)      W elements, any alignment; p points to float, bf16 or fp16 (converted)
//   load_n(p, n), store_n     the first n elements, 0 <= n <= W: memory past them is untouched, lanes past them are 0
//   set1 add sub mul div fma max min sqrt round floor     lane by lane; fma(a, b, c) is a b + c, rounded once except at
//                                                         scalar
//   select_gt(a, b, x, y)     a > b ? x : y
//   swap_pairs(a)             lanes 0 and 1 change places, 2 and 3 ...; not at scalar
//   scale2(a, n)              a 2^n for integral n in [-252, 254], exact save for overflow and underflow
//   power2_in(m)              2^n where the last nine bits of m are n + 127; not at avx512
//   interleave(a, b, low, high)   a0 b0 a1 b1 ... in low, then high;  deinterleave(low, high, even, odd) undoes it
//   hsum hmax                 over the lanes, always in the same order
//   exp(x), exp2(x)           within 2 units in the last place; exp(-inf) = 0; NaN stays NaN
//
// Converting to bf16 and fp16 rounds to nearest, ties to even; NaN stays NaN.  max and min return the second operand
// where either is NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "level.h"

namespace {
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
}  // namespace

#if defined(FG_HAS_AVX512)
#include "simd_avx512.h"
#elif defined(FG_LEVEL_AVX2)
#include "simd_avx2.h"
#elif defined(FG_LEVEL_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#include "simd_math.h"
