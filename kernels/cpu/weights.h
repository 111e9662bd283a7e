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

// trunc(2^40 e^-d) for d >= 0, infinity included.
FG_INLINE vf weights(vf d) {
  d = min(d, set1(kFarthest));
  const vf n = round(mul(d, set1(-1.44269504088896341f)));
  const vf r = add(sub(mul(n, set1(-0.693359375f)), d), mul(n, set1(2.12194440054690583e-4f)));
  vf p = set1(1.0f / 5040.0f);
  p = add(mul(p, r), set1(1.0f / 720.0f));
  p = add(mul(p, r), set1(1.0f / 120.0f));
  p = add(mul(p, r), set1(1.0f / 24.0f));
  p = add(mul(p, r), set1(1.0f / 6.0f));
  p = add(mul(p, r), set1(0.5f));
  p = add(mul(p, r), set1(1.0f));
  p = add(mul(p, r), set1(1.0f));
  return trunc(scale2(p, add(n, set1(static_cast<float>(kWeightBits)))));
}

}  // namespace
