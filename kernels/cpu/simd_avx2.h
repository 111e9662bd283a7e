// simd.h with AVX2, FMA and F16C: eight lanes.
#pragma once
#include <immintrin.h>

namespace {

using vf = __m256;
constexpr int W = 8;

FG_INLINE __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FG_INLINE __m128i to_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  __m256i wide = _mm256_blendv_epi8(rounded, nan, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
FG_INLINE __m128i to_fp16(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FG_INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
FG_INLINE vf load(const bf16 *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FG_INLINE vf load(const fp16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
FG_INLINE void store(float *p, vf x) { _mm256_storeu_ps(p, x); }
FG_INLINE void store(bf16 *p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), to_bf16(x)); }
FG_INLINE void store(fp16 *p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), to_fp16(x)); }
FG_INLINE vf load_n(const float *p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
FG_INLINE void store_n(float *p, vf x, int n) {
  if (n >= W) return store(p, x);  // a masked one takes AMD's processors a dozen cycles
  _mm256_maskstore_ps(p, lanes_below(n), x);
}
// AVX2 has no masked moves of 16-bit elements: go through a buffer on the stack.
template <class T>
FG_INLINE vf load_n(const T *p, int n) {
  if (n >= W) return load(p);
  T part[W] = {};
  if (n > 0) memcpy(part, p, sizeof(T) * static_cast<size_t>(n));
  return load(part);
}
template <class T>
FG_INLINE void store_n(T *p, vf x, int n) {
  if (n >= W) return store(p, x);
  T part[W];
  store(part, x);
  if (n > 0) memcpy(p, part, sizeof(T) * static_cast<size_t>(n));
}

FG_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
FG_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
FG_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
FG_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
FG_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
FG_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FG_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
FG_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
FG_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
FG_INLINE vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FG_INLINE vf floor(vf a) { return _mm256_floor_ps(a); }
FG_INLINE vf select_gt(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
FG_INLINE vf swap_pairs(vf a) { return _mm256_permute_ps(a, 0xb1); }
FG_INLINE vf power2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
FG_INLINE vf scale2(vf a, vf n) {  // in two factors, so that neither overflows or is subnormal
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return mul(mul(a, power2(half)), power2(_mm256_sub_epi32(whole, half)));
}
FG_INLINE vf power2_in(vf m) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(m), 23)); }
FG_INLINE void interleave(vf a, vf b, vf &low, vf &high) {
  vf x = _mm256_unpacklo_ps(a, b), y = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(x, y, 0x20);
  high = _mm256_permute2f128_ps(x, y, 0x31);
}
FG_INLINE vf quarters(vf a) {  // 64-bit lanes 0 2 1 3
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}
FG_INLINE void deinterleave(vf low, vf high, vf &even, vf &odd) {
  even = quarters(_mm256_shuffle_ps(low, high, 0x88));
  odd = quarters(_mm256_shuffle_ps(low, high, 0xdd));
}
FG_INLINE void transpose(__m256 (&x)[8]) {  // rows become columns
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
FG_INLINE float hsum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FG_INLINE float hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

}  // namespace
