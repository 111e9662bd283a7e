// Keys and values of one head as int8 codes, by the arithmetic of kernels/attention_int8.py, for all of its queries.
//
// Keys: rows of words of four codes, 128 added, the operand that vpdpbusd wants unsigned.  Values, of each
// block: (eight channels, four keys, channel of the eight, key of the four), signed.  What stands past the keys is a code of 0.
// attention_int8_amx_sides.h packs both for tiles.
#pragma once
#include "quantized.h"

namespace {

constexpr int NB = 128;        // keys of a block: BLOCK of the reference
constexpr int MOST_DIM = 256;  // of a head
constexpr float FINE = 32.0f;  // steps of an octave

// Sizes of a head's codes.
struct Sizes {
  int64_t keys, blocks, dim, words, wide;  // words of a key's codes; channels up to whole eights
#if defined(FG_LEVEL_AMX)
  Sizes(int64_t keys, int64_t dim)  // words of whole steps of a tile; channels and one of ones up to whole tiles
      : keys(keys), blocks((keys + NB - 1) / NB), dim(dim), words((dim + 63) / 64 * 16), wide(dim / 16 * 16 + 16) {}
#else
  Sizes(int64_t keys, int64_t dim)
      : keys(keys), blocks((keys + NB - 1) / NB), dim(dim), words((dim + 3) / 4), wide((dim + 7) / 8 * 8) {}
#endif
};

// How far scores are shifted to fit 16 bits.
FG_INLINE int shift_of(int64_t dim) {
  int shift = 0;
  while (127 * 127 * dim >> shift > 32766) ++shift;
  return shift;
}

struct Sides {
  uint8_t *k;      // (blocks NB, 4 words)
  int8_t *v;       // (blocks, wide / 8, NB / 4, 8, 4); for tiles (blocks, wide, NB)
  float *k_scale;  // (blocks,)
  float *v_scale;  // (wide,)
  float *broken;   // (1,): 0, or NaN where a key is not finite
};

// `heads` of them in one piece of memory.
struct SidesAt {
  int64_t k, v, k_scale, v_scale, broken, one;
  explicit SidesAt(const Sizes &s) {
    Parts parts;
    k = parts.take(s.blocks * NB * s.words * 4);
    v = parts.take(s.blocks * NB * s.wide);
    k_scale = parts.take(s.blocks * 4);
    v_scale = parts.take(s.wide * 4);
    broken = parts.take(4);
    one = parts.bytes;
  }
  Sides of(char *memory, int64_t head) const {
    char *at = memory + head * one;
    return {reinterpret_cast<uint8_t *>(at + k), reinterpret_cast<int8_t *>(at + v),
            reinterpret_cast<float *>(at + k_scale), reinterpret_cast<float *>(at + v_scale),
            reinterpret_cast<float *>(at + broken)};
  }
};

// 127 over the largest magnitude, and what a code stands for; 0 and NaN where it is not finite, 0 and 0 where tiny.
struct Rate {
  float rate, scale;
};
FG_INLINE Rate rate_of(float absmax, float bad) {
  if (bad != 0.0f || !(absmax >= 0x1p-100f)) return {0.0f, bad};
  return {127.0f / absmax, absmax * (1.0f / 127.0f)};
}

// The largest magnitude of lanes seen, and 0, or NaN where one is not finite.
struct Seen {
  vf top = set1(0.0f), bad = set1(0.0f);
  inline __attribute__((always_inline)) void see(vf x) {
    top = max(top, max(x, sub(set1(0.0f), x)));
    bad = fma(x, set1(0.0f), bad);
  }
};

FG_INLINE int64_t value_at(const Sizes &s, int64_t key, int64_t channel) {
  return key / NB * NB * s.wide + channel / 8 * NB * 8 + key % NB / 4 * 32 + channel % 8 * 4 + key % 4;
}

FG_INLINE int lanes_at(const Sizes &s, int64_t d) { return static_cast<int>(s.dim - d < W ? s.dim - d : W); }

// The mean of the keys' channels: sums in double, in the order of the keys.
template <class T>
inline void mean_of(const T *k, int64_t row, const Sizes &s, float *mean) {
  for (int64_t d = 0; d < s.dim; d += W) {
    const int n = lanes_at(s, d);
#if defined(FG_HAS_AVX512)
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t r = 0; r < s.keys; ++r) {
      const vf x = load_n(k + r * row + d, n);
      low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
      high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    }
    const __m512d keys = _mm512_set1_pd(static_cast<double>(s.keys));
    _mm256_storeu_ps(mean + d, _mm512_cvtpd_ps(_mm512_div_pd(low, keys)));
    _mm256_storeu_ps(mean + d + 8, _mm512_cvtpd_ps(_mm512_div_pd(high, keys)));
#else
    double sum[W] = {};
    float x[W];
    for (int64_t r = 0; r < s.keys; ++r) {
      store(x, load_n(k + r * row + d, n));
      for (int i = 0; i < W; ++i) sum[i] += static_cast<double>(x[i]);
    }
    for (int i = 0; i < W; ++i) mean[d + i] = static_cast<float>(sum[i] / static_cast<double>(s.keys));
#endif
  }
}

// 255 * 64 * 2^(-i / 32)
alignas(64) constexpr int16_t kFalling[32] = {
    16320, 15970, 15628, 15293, 14966, 14645, 14331, 14024, 13723, 13429, 13142, 12860, 12584, 12315, 12051, 11793,
    11540, 11293, 11051, 10814, 10582, 10355, 10134, 9916,  9704,  9496,  9293,  9093,  8899,  8708,  8521,  8339,
};

#if !defined(FG_LEVEL_AMX)
template <class T>
inline void pack_keys(const T *k, int64_t row, const Sizes &s, const Sides &to) {
  float mean[MOST_DIM + W];
  mean_of(k, row, s, mean);
  float broken = 0.0f;
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * NB, last = s.keys - first < NB ? s.keys : first + NB, bytes = NB * s.words * 4;
    auto centred = [&](int64_t r, int64_t d, int n) __attribute__((always_inline)) {
      return sub(load_n(k + r * row + d, n), load_n(mean + d, n));
    };
    Seen seen;
    for (int64_t r = first; r < last; ++r)
      for (int64_t d = 0; d < s.dim; d += W) seen.see(centred(r, d, lanes_at(s, d)));
    const Rate found = rate_of(hmax(seen.top), hsum(seen.bad));
    to.k_scale[block] = found.scale;
    broken += 0.0f * found.scale;
    uint8_t *at = to.k + block * bytes;
    memset(at, 0, static_cast<size_t>(bytes));
    if (found.rate > 0.0f)  // what is not finite would be no code
      for (int64_t r = first; r < last; ++r)
        for (int64_t d = 0; d < s.dim; d += W)
          to_codes(reinterpret_cast<int8_t *>(at) + (r - first) * s.words * 4 + d,
                   round(mul(centred(r, d, lanes_at(s, d)), set1(found.rate))), lanes_at(s, d));
    for (int64_t i = 0; i < bytes; ++i) at[i] ^= 128;
  }
  *to.broken = broken;
}

// The codes of channels [d, d + n) of four keys, `there` of which there are, to their places.
template <class T>
FG_INLINE void put_values(const T *v, int64_t row, const Sizes &s, int64_t key, int there, int64_t d, vf rate, int8_t *to) {
  const int n = lanes_at(s, d);
  auto rounded = [&](int j) __attribute__((always_inline)) {  // what is not finite has a rate of 0
    const vf x = j < there ? load_n(v + j * row + d, n) : set1(0.0f);
    return round(mul(select_gt(rate, set1(0.0f), x, set1(0.0f)), rate));
  };
#if defined(FG_HAS_AVX512)
  __m512i four = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i code = _mm512_and_si512(_mm512_cvtps_epi32(rounded(j)), _mm512_set1_epi32(255));
    four = _mm512_or_si512(four, _mm512_slli_epi32(code, 8 * static_cast<unsigned>(j)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + value_at(s, key, d)), _mm512_castsi512_si256(four));
  if (d + 8 < s.wide)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + value_at(s, key, d + 8)), _mm512_extracti64x4_epi64(four, 1));
#else
  for (int j = 0; j < 4; ++j) {
    int8_t codes[W] = {};
    to_codes(codes, rounded(j), n);
    for (int i = 0; i < n; ++i) to[value_at(s, key + j, d + i)] = codes[i];
  }
#endif
}

template <class T>
inline void pack_values(const T *v, int64_t row, const Sizes &s, const Sides &to) {
  memset(to.v, 0, static_cast<size_t>(s.blocks * NB * s.wide));
  for (int64_t d = 0; d < s.dim; d += W) {
    Seen seen;
    for (int64_t r = 0; r < s.keys; ++r) seen.see(load_n(v + r * row + d, lanes_at(s, d)));
    float top[W], bad[W], rates[W] = {};
    store(top, seen.top);
    store(bad, seen.bad);
    for (int i = 0; i < lanes_at(s, d); ++i) {
      const Rate found = rate_of(top[i], bad[i]);
      rates[i] = found.rate;
      to.v_scale[d + i] = found.scale;
    }
    for (int64_t r = 0; r < s.keys; r += 4)
      put_values(v + r * row, row, s, r, static_cast<int>(s.keys - r < 4 ? s.keys - r : 4), d, load(rates), to.v);
  }
}

#endif

}  // namespace
