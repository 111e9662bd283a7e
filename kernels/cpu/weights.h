// Weights of tokens as whole numbers, and exact sums of them: the arithmetic of kernels/sample_token.py, at every level.
//
// Only IEEE float32 multiply and add, unfused, so that every level and device gives the same bits.
#pragma once
#include "simd.h"

// FG_INLINE of a member function.
#define FG_MEMBER inline __attribute__((always_inline))

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

// The sum of vectors of whole numbers up to 2^40: in integers, or in doubles that are emptied before they would round.
struct Mass {
  int64_t whole = 0;
#if defined(FG_HAS_AVX512)
  __m512i low = _mm512_setzero_si512(), high = low;
  FG_MEMBER void add(vf w) {
    low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256(w)));
    high = _mm512_add_epi64(high, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(w, 1)));
  }
  FG_MEMBER int64_t total() const { return whole + _mm512_reduce_add_epi64(_mm512_add_epi64(low, high)); }
#else
  double lanes[W] = {};
  int64_t filled = 0;
  FG_MEMBER void add(vf w) {
    float part[W];
    store(part, w);
    for (int i = 0; i < W; ++i) lanes[i] += static_cast<double>(part[i]);
    if (++filled == 4096) empty();
  }
  FG_MEMBER void empty() {
    for (int i = 0; i < W; ++i) whole += static_cast<int64_t>(lanes[i]), lanes[i] = 0;
    filled = 0;
  }
  FG_MEMBER int64_t total() {
    empty();
    return whole;
  }
#endif
};

// Packs the lanes whose key lies in (low, high] to `keys`, and their weights to `to`; their number.  In place
// is fine: nothing is written past the lanes that were read.
FG_INLINE int64_t pack(vf key, vf weight, vf low, vf high, float *keys, float *to) {
#if defined(FG_HAS_AVX512)
  const __mmask16 in = _mm512_cmp_ps_mask(key, high, _CMP_LE_OQ) & _mm512_cmp_ps_mask(key, low, _CMP_GT_OQ);
  _mm512_mask_compressstoreu_ps(keys, in, key);
  _mm512_mask_compressstoreu_ps(to, in, weight);
  return __builtin_popcount(in);
#else
  float k[W], w[W], l[W], h[W];
  store(k, key), store(w, weight), store(l, low), store(h, high);
  int64_t n = 0;
  for (int i = 0; i < W; ++i) {
    keys[n] = k[i];
    to[n] = w[i];
    n += k[i] <= h[i] && k[i] > l[i];
  }
  return n;
#endif
}

}  // namespace
