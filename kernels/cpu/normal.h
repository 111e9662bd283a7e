// Normal noise by Philox-4x32-10 and a piecewise polynomial: the bits of kernels/noise_normal.py, at every level.
//
// Only integer operations and IEEE float32 multiply and add, unfused (the build turns contraction off).
#pragma once
#include <cstdint>
#include <cstring>

#include "level.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kNormalCoefficients = 8;
constexpr int kNormalOctaves = 32;
constexpr int kNormalBlocks = 16;                 // Philox blocks made together
constexpr int kNormalRun = 4 * kNormalBlocks;     // the numbers they hold

// What the noise of one sample depends on; `table` is coefficient-major: table[k * 32 + octave].
struct NormalStream {
  uint64_t seed;
  uint32_t step, sample;
  const float *table;
};

// One Philox-4x32-10 block, in place.
FG_INLINE void philox_block(uint64_t seed, uint32_t c[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
  }
}

#if defined(FG_HAS_AVX512)

struct Products {
  __m512i low, high;
};

FG_INLINE Products wide_product(__m512i a, __m512i m) {
  __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  return {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)),
          _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)};
}

FG_INLINE void philox(const NormalStream &s, uint32_t block, __m512i c[4]) {
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u)), m1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  c[0] = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block)), lanes);
  c[1] = _mm512_set1_epi32(static_cast<int>(s.step));
  c[2] = _mm512_set1_epi32(static_cast<int>(s.sample));
  c[3] = _mm512_setzero_si512();
  uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Products p0 = wide_product(c[0], m0), p1 = wide_product(c[2], m1);
    c[0] = _mm512_xor_si512(_mm512_xor_si512(p1.high, c[1]), _mm512_set1_epi32(static_cast<int>(k0)));
    c[2] = _mm512_xor_si512(_mm512_xor_si512(p0.high, c[3]), _mm512_set1_epi32(static_cast<int>(k1)));
    c[1] = p1.low;
    c[3] = p0.low;
  }
}

FG_INLINE __m512 to_normal(__m512i u, const __m512 low[], const __m512 high[]) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i m = _mm512_and_si512(u, _mm512_set1_epi32(0x7FFFFFFF));
  __m512 power = _mm512_cvtepi32_ps(_mm512_andnot_si512(_mm512_srli_epi32(m, 1), m));
  __m512i leading = _mm512_srli_epi32(_mm512_castps_si512(power), 23);
  __m512i octave = _mm512_min_epu32(_mm512_sub_epi32(_mm512_set1_epi32(157), leading), _mm512_set1_epi32(31));
  __m512i x = _mm512_sllv_epi32(_mm512_or_si512(_mm512_slli_epi32(m, 1), one), octave);
  __m512i bits = _mm512_and_si512(_mm512_srli_epi32(x, 8), _mm512_set1_epi32(0x7FFFFF));
  __m512 t = _mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_set1_epi32(0x3F800000)));
  t = _mm512_sub_ps(t, _mm512_set1_ps(1.5f));
  __m512 z = _mm512_permutex2var_ps(low[kNormalCoefficients - 1], octave, high[kNormalCoefficients - 1]);
  for (int k = kNormalCoefficients - 2; k >= 0; --k)
    z = _mm512_add_ps(_mm512_mul_ps(z, t), _mm512_permutex2var_ps(low[k], octave, high[k]));
  return _mm512_castsi512_ps(_mm512_xor_si512(
      _mm512_castps_si512(z), _mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0x80000000u)))));
}

// Writes kNormalRun numbers; `block` is the first element over four.
FG_INLINE void normal_run(const NormalStream &s, uint32_t block, float *out) {
  __m512 low[kNormalCoefficients], high[kNormalCoefficients];
  for (int k = 0; k < kNormalCoefficients; ++k) {
    low[k] = _mm512_loadu_ps(s.table + k * kNormalOctaves);
    high[k] = _mm512_loadu_ps(s.table + k * kNormalOctaves + 16);
  }
  __m512i c[4];
  philox(s, block, c);
  __m512 z[4];
  for (int i = 0; i < 4; ++i) z[i] = to_normal(c[i], low, high);
  // Lane i of block j is z[i][j]: transpose 4x4 words in each quarter, then the quarters.
  __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1])), b = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
  __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1])), e = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
  __m512 r0 = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), r1 = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  __m512 r2 = _mm512_castpd_ps(_mm512_unpacklo_pd(d, e)), r3 = _mm512_castpd_ps(_mm512_unpackhi_pd(d, e));
  __m512 s0 = _mm512_shuffle_f32x4(r0, r1, 0x88), s1 = _mm512_shuffle_f32x4(r2, r3, 0x88);
  __m512 s2 = _mm512_shuffle_f32x4(r0, r1, 0xDD), s3 = _mm512_shuffle_f32x4(r2, r3, 0xDD);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(s0, s1, 0x88));
  _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(s2, s3, 0x88));
  _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(s0, s1, 0xDD));
  _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(s2, s3, 0xDD));
}

#else

#if defined(__AVX2__)

FG_INLINE void words_to_normal(const uint32_t words[], const float *table, float *out) {
  for (int i = 0; i < kNormalRun; i += 8) {
    __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words + i));
    __m256i m = _mm256_and_si256(u, _mm256_set1_epi32(0x7FFFFFFF));
    __m256 power = _mm256_cvtepi32_ps(_mm256_andnot_si256(_mm256_srli_epi32(m, 1), m));
    __m256i leading = _mm256_srli_epi32(_mm256_castps_si256(power), 23);
    __m256i octave = _mm256_min_epu32(_mm256_sub_epi32(_mm256_set1_epi32(157), leading), _mm256_set1_epi32(31));
    __m256i x = _mm256_sllv_epi32(_mm256_or_si256(_mm256_slli_epi32(m, 1), _mm256_set1_epi32(1)), octave);
    __m256i bits = _mm256_and_si256(_mm256_srli_epi32(x, 8), _mm256_set1_epi32(0x7FFFFF));
    __m256 t = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x3F800000)));
    t = _mm256_sub_ps(t, _mm256_set1_ps(1.5f));
    __m256 z = _mm256_i32gather_ps(table + (kNormalCoefficients - 1) * kNormalOctaves, octave, 4);
    for (int k = kNormalCoefficients - 2; k >= 0; --k)
      z = _mm256_add_ps(_mm256_mul_ps(z, t), _mm256_i32gather_ps(table + k * kNormalOctaves, octave, 4));
    __m256i sign = _mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    _mm256_storeu_ps(out + i, _mm256_xor_ps(z, _mm256_castsi256_ps(sign)));
  }
}

#else

FG_INLINE void words_to_normal(const uint32_t words[], const float *table, float *out) {
  for (int i = 0; i < kNormalRun; ++i) {
    uint32_t m = words[i] & 0x7FFFFFFFu;
    float power = static_cast<float>(static_cast<int32_t>(m & ~(m >> 1)));
    uint32_t bits;
    std::memcpy(&bits, &power, 4);
    uint32_t octave = 157u - (bits >> 23);
    octave = octave < 31u ? octave : 31u;
    bits = ((((m << 1) | 1u) << octave) >> 8 & 0x7FFFFFu) | 0x3F800000u;
    float t;
    std::memcpy(&t, &bits, 4);
    t -= 1.5f;
    float z = table[(kNormalCoefficients - 1) * kNormalOctaves + octave];
    for (int k = kNormalCoefficients - 2; k >= 0; --k) z = z * t + table[k * kNormalOctaves + octave];
    std::memcpy(&bits, &z, 4);
    bits ^= words[i] & 0x80000000u;
    std::memcpy(out + i, &bits, 4);
  }
}

#endif

// The same in plain loops, which compilers vectorise.
FG_INLINE void normal_run(const NormalStream &s, uint32_t block, float *out) {
  constexpr int n = kNormalBlocks;
  uint32_t c0[n], c1[n], c2[n], c3[n], words[kNormalRun];
  for (int j = 0; j < n; ++j) c0[j] = block + static_cast<uint32_t>(j), c1[j] = s.step, c2[j] = s.sample, c3[j] = 0;
  uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int j = 0; j < n; ++j) {
      uint64_t p0 = static_cast<uint64_t>(c0[j]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2[j]) * 0xCD9E8D57u;
      c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ k0;
      c1[j] = static_cast<uint32_t>(p1);
      c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ k1;
      c3[j] = static_cast<uint32_t>(p0);
    }
  for (int j = 0; j < n; ++j)
    words[4 * j] = c0[j], words[4 * j + 1] = c1[j], words[4 * j + 2] = c2[j], words[4 * j + 3] = c3[j];
  words_to_normal(words, s.table, out);
}

#endif

// Elements [first, first + count) of the sample's noise; `first` is a multiple of kNormalRun.
FG_INLINE void normal_fill(const NormalStream &s, int64_t first, int64_t count, float *out) {
  int64_t i = 0;
  for (; i + kNormalRun <= count; i += kNormalRun) normal_run(s, static_cast<uint32_t>((first + i) / 4), out + i);
  if (i < count) {
    float run[kNormalRun];
    normal_run(s, static_cast<uint32_t>((first + i) / 4), run);
    std::memcpy(out + i, run, static_cast<size_t>(count - i) * sizeof(float));
  }
}

}  // namespace
