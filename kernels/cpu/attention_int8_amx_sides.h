// Keys and values of one head as int8 codes for AMX tiles: keys in rows of whole 64 bytes, values channel by channel,
// with a channel of ones behind them, whose product with the weights is their sum.
#pragma once
#include "attention_int8_sides.h"

namespace {

constexpr int64_t MOST_PARTS = MOST_DIM / W;

// Sixteen columns of a row; 0 past the head dimension.
template <class T>
FG_INLINE vf row_part(const T *row, const Sizes &s, int64_t part) {
  const int64_t left = s.dim - part * W;
  return left >= W ? load(row + part * W) : left > 0 ? load_n(row + part * W, static_cast<int>(left)) : set1(0.0f);
}

// Sums of sixteen columns.
struct Total {
  __m512d near, far;
};

// Adds rows [first, last) to the total and writes the lowest and highest of each column.  Halves are added up in
// float32, sixteen at a time, which has room for them.
template <class T>
FG_INLINE void see_keys(const T *k, int64_t row, int64_t first, int64_t last, const Sizes &s, int64_t part, Total &to,
                        float *ends) {
  constexpr int64_t SOME = sizeof(T) == 2 ? 16 : 1;
  vf low = row_part(k + first * row, s, part), high = low;
  for (int64_t r = first; r < last; r += SOME) {
    vf sum = set1(0.0f);
    for (int64_t i = r; i < r + SOME && i < last; ++i) {
      const vf x = row_part(k + i * row, s, part);
      sum = add(sum, x), low = min(low, x), high = max(high, x);
    }
    to.near = _mm512_add_pd(to.near, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
    to.far = _mm512_add_pd(to.far, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
  }
  store(ends, low), store(ends + W, high);
}

// The mean of the keys' channels, zeros up to whole vectors, and the lowest and highest of each block and channel,
// (block, vector of channels, 2, W), a block's where its codes will be.  Returns whether all of it is finite.
template <class T>
inline bool see_all_keys(const T *k, int64_t row, const Sizes &s, const Sides &to, float *mean) {
  const int64_t parts = s.words / 4, bytes = NB * s.words * 4;
  Total of[MOST_PARTS] = {};
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int64_t last = s.keys < b * NB + NB ? s.keys : b * NB + NB;
    for (int64_t part = 0; part < parts; ++part)
      see_keys(k, row, b * NB, last, s, part, of[part], reinterpret_cast<float *>(to.k + b * bytes) + part * 2 * W);
  }
  vf bad = set1(0.0f);
  const __m512d keys = _mm512_set1_pd(static_cast<double>(s.keys));
  for (int64_t part = 0; part < parts; ++part) {
    _mm256_store_ps(mean + part * W, _mm512_cvtpd_ps(_mm512_div_pd(of[part].near, keys)));
    _mm256_store_ps(mean + part * W + 8, _mm512_cvtpd_ps(_mm512_div_pd(of[part].far, keys)));
    bad = fma(load(mean + part * W), set1(0.0f), bad);
  }
  return hsum(bad) == 0.0f;
}

// Of a block's keys less their mean, from what see_all_keys left.
inline Rate rate_of_keys(const float *ends, const float *mean, const Sizes &s) {
  vf top = set1(0.0f);
  for (int64_t part = 0; part < s.words / 4; ++part, ends += 2 * W) {
    const vf by = load(mean + part * W);
    top = max(top, max(sub(load(ends + W), by), sub(by, load(ends))));
  }
  return rate_of(hmax(top), 0.0f);
}

// The same, key by key.
template <class T>
inline Rate rate_of_keys(const T *k, int64_t row, int64_t n, const float *mean, const Sizes &s) {
  Seen seen;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t part = 0; part < s.words / 4; ++part)
      seen.see(sub(row_part(k + r * row, s, part), load(mean + part * W)));
  return rate_of(hmax(seen.top), hsum(seen.bad));
}

// Half of the shift's unit, which rounds a score, and where a step has room behind the codes for its product with 1.
FG_INLINE int half_unit(const Sizes &s) { return 1 << shift_of(s.dim) >> 1; }
FG_INLINE bool has_room(const Sizes &s) { return s.dim < s.words * 4; }

template <class T>
inline void pack_keys(const T *k, int64_t row, const Sizes &s, const Sides &to) {
  alignas(64) float mean[MOST_DIM + W] = {};
  const int64_t wide = s.words * 4;
  const bool finite = see_all_keys(k, row, s, to, mean);
  if (!finite) mean_of(k, row, s, mean);  // it may have been too much for float32 alone
  float broken = 0.0f;
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * NB, n = s.keys - first < NB ? s.keys - first : NB;
    uint8_t *at = to.k + first * wide;
    const Rate found = finite ? rate_of_keys(reinterpret_cast<const float *>(at), mean, s)
                              : rate_of_keys(k + first * row, row, n, mean, s);
    to.k_scale[block] = found.scale;
    broken += 0.0f * found.scale;
    const int64_t served = found.rate > 0.0f ? n : 0;  // what is not finite would be no code
    const vf rate = set1(found.rate);
    for (int64_t r = 0; r < served; ++r)
      for (int64_t d = 0; d < wide; d += 64) {
        auto centred = [&](int64_t part) __attribute__((always_inline)) {
          return sub(row_part(k + (first + r) * row, s, part), load(mean + part * W));
        };
        const int64_t part = d / W;
        _mm512_store_si512(at + r * wide + d,
                           codes_of(centred(part), centred(part + 1), centred(part + 2), centred(part + 3), rate));
      }
    memset(at + served * wide, 0, static_cast<size_t>((NB - served) * wide));
    for (int64_t r = 0; r < n && has_room(s); ++r) at[r * wide + s.dim] = static_cast<uint8_t>(half_unit(s));
  }
  *to.broken = broken;
}

// The codes of sixteen channels of four keys, `there` of which there are: a word for each channel.
template <class T>
FG_INLINE __m512i value_words(const T *v, int64_t row, const Sizes &s, int64_t there, int64_t part, vf rate) {
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  auto code = [&](int64_t j) __attribute__((always_inline)) {
    return j < there ? _mm512_cvtps_epi32(mul(row_part(v + j * row, s, part), rate)) : _mm512_setzero_si512();
  };
  const __m512i low = _mm512_packs_epi32(code(0), code(1)), high = _mm512_packs_epi32(code(2), code(3));
  return _mm512_shuffle_epi8(_mm512_packs_epi16(low, high), turn);
}

// 127 over the largest magnitudes, as bits, and what a code stands for: 0 and NaN where not finite, 0 and 0 where tiny.
struct Rates {
  vf rate, scale;
};
FG_INLINE Rates rates_of(__m512i bits) {
  const vf top = _mm512_castsi512_ps(bits);
  const __mmask16 finite = _mm512_cmp_ps_mask(top, set1(0x1.fffffep127f), _CMP_LE_OQ);
  const __mmask16 served = finite & _mm512_cmp_ps_mask(top, set1(0x1p-100f), _CMP_GE_OQ);
  const vf found = _mm512_maskz_mul_ps(served, top, set1(1.0f / 127.0f));
  const vf scale = _mm512_mask_blend_ps(finite, set1(__builtin_nanf("")), found);
  return {_mm512_maskz_div_ps(served, set1(127.0f), top), scale};
}

// Magnitudes are ordered as integers are, NaN behind infinity.
FG_INLINE __m512i larger(__m512i bits, vf x) {
  return _mm512_max_epi32(bits, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

// Some keys at a time, which the first cache holds, all of their channels.
template <class T>
inline void pack_values(const T *v, int64_t row, const Sizes &s, const Sides &to) {
  const int64_t parts = s.wide / W;
  __m512i bits[MOST_PARTS + 1] = {};
  for (int64_t key = 0; key < s.keys; key += NB)
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t r = key; r < key + NB && r < s.keys; ++r)
        bits[part] = larger(bits[part], row_part(v + r * row, s, part));
  vf rate[MOST_PARTS + 1];
  for (int64_t part = 0; part < parts; ++part) {
    const Rates found = rates_of(bits[part]);
    rate[part] = found.rate;
    store(to.v_scale + part * W, found.scale);
  }
  for (int64_t key = 0; key < s.keys; key += 64)
    for (int64_t part = 0; part < parts; ++part) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int64_t g = 0; g < 16; ++g)
        x[g] = value_words(v + (key + 4 * g) * row, row, s, s.keys - key - 4 * g, part, rate[part]);
      transpose(x);
      int8_t *at = to.v + (key / NB * s.wide + part * W) * NB + key % NB;
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) _mm512_store_si512(at + c * NB, x[c]);
    }
  for (int64_t key = 0; key < s.keys; ++key) to.v[(key / NB * s.wide + s.dim) * NB + key % NB] = 1;
}

}  // namespace
