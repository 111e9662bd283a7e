// simd.h with AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once
#include <immintrin.h>

namespace {

using vf = __m512;
constexpr int W = 16;

FG_INLINE __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
// Of 32 lanes of 16 bits, for any n.
FG_INLINE __mmask32 halves_below(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u; }
#if defined(FG_HAS_AVX512_BF16)
// The instruction also turns subnormals, below 1.2e-38, into 0.
FG_INLINE __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
FG_INLINE __m256i to_bf16(__m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i high = _mm512_srli_epi32(bits, 16);
  __m512i bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
#endif
FG_INLINE vf widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
FG_INLINE __m256i to_fp16(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FG_INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
FG_INLINE vf load(const bf16 *p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
FG_INLINE vf load(const fp16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
FG_INLINE void store(float *p, vf x) { _mm512_storeu_ps(p, x); }
FG_INLINE void store(bf16 *p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_bf16(x)); }
FG_INLINE void store(fp16 *p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_fp16(x)); }
FG_INLINE vf load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
FG_INLINE vf load_n(const bf16 *p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p)); }
FG_INLINE vf load_n(const fp16 *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p)); }
FG_INLINE void store_n(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), x); }
FG_INLINE void store_n(bf16 *p, vf x, int n) { _mm256_mask_storeu_epi16(p, lanes_below(n), to_bf16(x)); }
FG_INLINE void store_n(fp16 *p, vf x, int n) { _mm256_mask_storeu_epi16(p, lanes_below(n), to_fp16(x)); }

FG_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
FG_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
FG_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
FG_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
FG_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
FG_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FG_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
FG_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
FG_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
FG_INLINE vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FG_INLINE vf floor(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FG_INLINE vf select_gt(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
FG_INLINE vf swap_pairs(vf a) { return _mm512_permute_ps(a, 0xb1); }
FG_INLINE vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
FG_INLINE void interleave(vf a, vf b, vf &low, vf &high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}
FG_INLINE void deinterleave(vf low, vf high, vf &even, vf &odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(low, first, high);
  odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}
FG_INLINE float hsum(vf a) {
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FG_INLINE float hmax(vf a) {
  __m256 y = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Rows become columns, 32-bit elements.
FG_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

}  // namespace
