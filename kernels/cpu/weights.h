// Weights of tokens as whole numbers: the arithmetic of kernels/sample_token.py, at every level.
//
// Only IEEE float32 multiply and add, unfused, so that every level and device gives the same bits.
#pragma once
#include "simd.h"

namespace {

constexpr int kWeightBits = 40;  // the likeliest token weighs 2^40
constexpr float kFarthest = 30.0f;
constexpr float kWhole = 1099511627776.0f;

#if defined(FG_HAS_AVX512)
FG_INLINE vf trunc(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
#elif defined(FG_LEVEL_AVX2)
FG_INLINE vf trunc(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
#elif defined(FG_LEVEL_NEON)
FG_INLINE vf trunc(vf a) { return vrndq_f32(a); }
#else
FG_INLINE vf trunc(vf a) { return a < 8388608.0f ? static_cast<float>(static_cast<int32_t>(a)) : a; }
#endif

// d = trunc(2^40 e^-d) for d >= 0, infinity included.  Several vectors step by step: one alone is a chain of thirty
// operations, too long for the processor to look past.
template <int N>
FG_INLINE void weigh(vf (&d)[N]) {
  constexpr float kTerms[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  vf n[N], r[N], p[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) d[v] = min(d[v], set1(kFarthest));
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) n[v] = round(mul(d[v], set1(-1.44269504088896341f)));
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v)
    r[v] = add(sub(mul(n[v], set1(-0.693359375f)), d[v]), mul(n[v], set1(2.12194440054690583e-4f)));
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) p[v] = set1(1.0f / 5040.0f);
#pragma GCC unroll 8
  for (float term : kTerms)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) p[v] = add(mul(p[v], r[v]), set1(term));
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) d[v] = trunc(scale2(p[v], add(n[v], set1(static_cast<float>(kWeightBits)))));
}

}  // namespace
