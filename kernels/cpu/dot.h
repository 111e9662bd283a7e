// Products of 8-bit integers, summed exactly in int32, at the level of this translation unit.
//
//   vi                       a vector of W int32 lanes
//   zero_i, load_i, to_float  0; W of them from memory; the lanes as floats (exact below 2^24)
//   code_at<SHIFT>(a)         four bits of each lane
//   to_codes(p, v, n)        the first n lanes of v, integral and in [-127, 127], to int8
//
// Four bits by eight (the packed layout of linear_int4.py; lane r is a row of the weight):
//   Nibbles, unpack(p)       W words of eight codes
//   dot8(sum, w, x)          lane r += the eight codes of row r by x[0..8), int8
//
// Eight bits by eight, along a row:
//   CHUNK, bytes             how many int8 one step takes, and such a vector
//   load_w, load_w_n, load_x CHUNK of a weight's row, its first n (the rest anything finite), CHUNK of x
//   dot(sum, w, x)           adds the CHUNK products to sum's lanes, in lanes of the level's choice
//   hsum_i(sum, total)       the sum of the lanes; `total` is that of all of x (an offset of the weight is taken back)
#pragma once
#include "simd.h"

namespace {

#if defined(FG_HAS_AVX512)

using vi = __m512i;
using bytes = __m512i;
struct Nibbles {
  __m512i low, high;
};
FG_INLINE vi zero_i() { return _mm512_setzero_si512(); }
FG_INLINE vi load_i(const int32_t *p) { return _mm512_loadu_si512(p); }
FG_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
template <int SHIFT>
FG_INLINE vi code_at(vi a) {
  return _mm512_and_si512(_mm512_srli_epi32(a, SHIFT), _mm512_set1_epi32(15));
}
FG_INLINE void to_codes(int8_t *p, vf v, int n) {
  if (n == W) return _mm512_mask_cvtepi32_storeu_epi8(p, 0xffff, _mm512_cvtps_epi32(v));
  _mm_mask_storeu_epi8(p, lanes_below(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
FG_INLINE Nibbles unpack(const uint8_t *p) {
  __m512i w = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(w, mask), _mm512_and_si512(_mm512_srli_epi16(w, 4), mask)};
}
FG_INLINE __m512i four(const int8_t *x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}
#if defined(FG_HAS_AVX512_BF16)  // that level has VNNI too
FG_INLINE vi dot8(vi sum, Nibbles w, const int8_t *x) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w.low, four(x)), w.high, four(x + 4));
}
constexpr int CHUNK = 64;
// The instruction wants one operand unsigned: 128 is added to the weight's.
FG_INLINE bytes load_w(const int8_t *p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
FG_INLINE bytes load_w_n(const int8_t *p, int n) {
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p) ^ _mm512_set1_epi8(-128);
}
FG_INLINE bytes load_x(const int8_t *p) { return _mm512_loadu_si512(p); }
FG_INLINE vi dot(vi sum, bytes w, bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
FG_INLINE int32_t hsum_i(vi sum, int32_t total) {
  return static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)) - (static_cast<uint32_t>(total) << 7));
}
#else
// Two products of 15 by 127 fit the 16 bits between the two instructions, and so do two such pairs.
FG_INLINE vi dot8(vi sum, Nibbles w, const int8_t *x) {
  __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(w.low, four(x)), _mm512_maddubs_epi16(w.high, four(x + 4)));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
constexpr int CHUNK = 32;
FG_INLINE bytes load_w(const int8_t *p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
FG_INLINE bytes load_w_n(const int8_t *p, int n) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(n >= 32 ? ~0u : (1u << n) - 1u, p));
}
FG_INLINE bytes load_x(const int8_t *p) { return load_w(p); }
FG_INLINE vi dot(vi sum, bytes w, bytes x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
FG_INLINE int32_t hsum_i(vi sum, int32_t) { return _mm512_reduce_add_epi32(sum); }
#endif

#elif defined(FG_LEVEL_AVX2)

using vi = __m256i;
using bytes = __m256i;
struct Nibbles {
  __m256i low, high;
};
FG_INLINE vi zero_i() { return _mm256_setzero_si256(); }
FG_INLINE vi load_i(const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
FG_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
template <int SHIFT>
FG_INLINE vi code_at(vi a) {
  return _mm256_and_si256(_mm256_srli_epi32(a, SHIFT), _mm256_set1_epi32(15));
}
FG_INLINE void to_codes(int8_t *p, vf v, int n) {
  __m256i wide = _mm256_cvtps_epi32(v);
  __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  int64_t eight = _mm_cvtsi128_si64(_mm_packs_epi16(half, half));
  memcpy(p, &eight, static_cast<size_t>(n));
}
FG_INLINE Nibbles unpack(const uint8_t *p) {
  __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w, mask), _mm256_and_si256(_mm256_srli_epi16(w, 4), mask)};
}
FG_INLINE __m256i four(const int8_t *x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}
// As at AVX-512 without VNNI.
FG_INLINE vi dot8(vi sum, Nibbles w, const int8_t *x) {
  __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, four(x)), _mm256_maddubs_epi16(w.high, four(x + 4)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr int CHUNK = 16;
FG_INLINE bytes load_w(const int8_t *p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
FG_INLINE bytes load_w_n(const int8_t *p, int n) {
  int8_t part[CHUNK] = {};
  memcpy(part, p, static_cast<size_t>(n));
  return load_w(part);
}
FG_INLINE bytes load_x(const int8_t *p) { return load_w(p); }
FG_INLINE vi dot(vi sum, bytes w, bytes x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
FG_INLINE int32_t hsum_i(vi sum, int32_t) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

#elif defined(FG_LEVEL_NEON)

using vi = int32x4_t;
using bytes = int8x16_t;
struct Nibbles {
  int8x16_t low, high;
};
FG_INLINE vi zero_i() { return vdupq_n_s32(0); }
FG_INLINE vi load_i(const int32_t *p) { return vld1q_s32(p); }
FG_INLINE vf to_float(vi a) { return vcvtq_f32_s32(a); }
template <int SHIFT>
FG_INLINE vi code_at(vi a) {
  return vandq_s32(vshlq_s32(a, vdupq_n_s32(-SHIFT)), vdupq_n_s32(15));
}
FG_INLINE void to_codes(int8_t *p, vf v, int n) {
  int16x4_t half = vqmovn_s32(vcvtnq_s32_f32(v));
  int8x8_t eight = vqmovn_s16(vcombine_s16(half, half));
  int32_t word = vget_lane_s32(vreinterpret_s32_s8(eight), 0);
  memcpy(p, &word, static_cast<size_t>(n));
}
FG_INLINE Nibbles unpack(const uint8_t *p) {
  uint8x16_t w = vld1q_u8(p);
  return {vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(w, 4))};
}
FG_INLINE int8x8_t four(const int8_t *x) {
  int32_t word;
  memcpy(&word, x, 4);
  return vreinterpret_s8_s32(vdup_n_s32(word));
}
// Widening products: Advanced SIMD without the dot-product extension.  Two of 15 by 127 fit 16 bits, and so do four.
FG_INLINE vi dot8(vi sum, Nibbles w, const int8_t *x) {
  int8x8_t a = four(x), b = four(x + 4);
  int16x8_t near = vmlal_s8(vmull_s8(vget_low_s8(w.low), a), vget_low_s8(w.high), b);
  int16x8_t far = vmlal_s8(vmull_s8(vget_high_s8(w.low), a), vget_high_s8(w.high), b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(near), vpaddlq_s16(far)));
}
constexpr int CHUNK = 16;
FG_INLINE bytes load_w(const int8_t *p) { return vld1q_s8(p); }
FG_INLINE bytes load_w_n(const int8_t *p, int n) {
  int8_t part[CHUNK] = {};
  memcpy(part, p, static_cast<size_t>(n));
  return vld1q_s8(part);
}
FG_INLINE bytes load_x(const int8_t *p) { return vld1q_s8(p); }
FG_INLINE vi dot(vi sum, bytes w, bytes x) {  // x is -127 at the least: two products fit 16 bits
  int16x8_t pairs = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_high_s8(w), vget_high_s8(x));
  return vpadalq_s16(sum, pairs);
}
FG_INLINE int32_t hsum_i(vi sum, int32_t) { return vaddvq_s32(sum); }

#else

using vi = int32_t;
using bytes = int32_t;
struct Nibbles {
  uint8_t codes[8];
};
FG_INLINE vi zero_i() { return 0; }
FG_INLINE vi load_i(const int32_t *p) { return *p; }
FG_INLINE vf to_float(vi a) { return static_cast<float>(a); }
template <int SHIFT>
FG_INLINE vi code_at(vi a) {
  return a >> SHIFT & 15;
}
FG_INLINE void to_codes(int8_t *p, vf v, int n) {
  if (n > 0) *p = static_cast<int8_t>(static_cast<int>(v));
}
FG_INLINE Nibbles unpack(const uint8_t *p) {
  Nibbles w;
  for (int j = 0; j < 4; ++j) w.codes[j] = p[j] & 15, w.codes[4 + j] = p[j] >> 4;
  return w;
}
FG_INLINE vi dot8(vi sum, Nibbles w, const int8_t *x) {
  for (int j = 0; j < 8; ++j) sum += w.codes[j] * x[j];
  return sum;
}
constexpr int CHUNK = 1;
FG_INLINE bytes load_w(const int8_t *p) { return *p; }
FG_INLINE bytes load_w_n(const int8_t *p, int n) { return n > 0 ? *p : 0; }
FG_INLINE bytes load_x(const int8_t *p) { return *p; }
FG_INLINE vi dot(vi sum, bytes w, bytes x) { return sum + w * x; }
FG_INLINE int32_t hsum_i(vi sum, int32_t) { return sum; }

#endif

}  // namespace
