// The key at which cumulated weights reach a limit, without sorting: exact, whatever order the keys stand in.
#pragma once
#include "simd.h"

// FG_INLINE of a member function.
#define FG_MEMBER inline __attribute__((always_inline))

namespace {

constexpr float kLargest = 3.4028234663852886e38f;

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
#elif defined(FG_LEVEL_AVX2)
  __m256d low = _mm256_setzero_pd(), high = low;
  int64_t filled = 0;
  FG_MEMBER void add(vf w) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(w)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(w, 1)));
    if (++filled == 4096) empty();
  }
  FG_MEMBER void empty() {
    double lanes[W];
    _mm256_storeu_pd(lanes, low), _mm256_storeu_pd(lanes + 4, high);
    for (double lane : lanes) whole += static_cast<int64_t>(lane);
    low = high = _mm256_setzero_pd(), filled = 0;
  }
  FG_MEMBER int64_t total() {
    empty();
    return whole;
  }
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

#if defined(FG_LEVEL_AVX2)
// For each mask of eight lanes a byte a lane: which of them are set, from the first on.
struct Places {
  uint64_t of[256];
  constexpr Places() : of() {
    for (uint64_t mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (uint64_t lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) of[mask] |= lane << 8 * n++;
    }
  }
};
constexpr Places kPlaces;
#endif

// Packs the lanes whose key lies in (low, high] to `keys`, and their weights to `to`; their number.  In place
// is fine: nothing is written past the lanes that were read.
FG_INLINE int64_t pack(vf key, vf weight, vf low, vf high, float *keys, float *to) {
#if defined(FG_HAS_AVX512)
  const __mmask16 in = _mm512_cmp_ps_mask(key, high, _CMP_LE_OQ) & _mm512_cmp_ps_mask(key, low, _CMP_GT_OQ);
  store(keys, _mm512_maskz_compress_ps(in, key));  // to memory at once, packing takes AMD's processors a hundred cycles
  store(to, _mm512_maskz_compress_ps(in, weight));
  return __builtin_popcount(in);
#elif defined(FG_LEVEL_AVX2)
  const __m256 within = _mm256_and_ps(_mm256_cmp_ps(key, high, _CMP_LE_OQ), _mm256_cmp_ps(key, low, _CMP_GT_OQ));
  const int in = _mm256_movemask_ps(within);
  const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kPlaces.of + in)));
  store(keys, _mm256_permutevar8x32_ps(key, from));
  store(to, _mm256_permutevar8x32_ps(weight, from));
  return __builtin_popcount(static_cast<unsigned>(in));
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

// Keys (0 <= key, finite) with their weights (whole numbers up to 2^40), in memory of the caller's: for n of them, n + 2 W
// each.
struct Selection {
  float *keys, *weights;
  int64_t count = 0;

  // Adds the lanes whose key lies in (low, high].
  FG_MEMBER void put(vf key, vf weight, vf low, vf high) {
    count += pack(key, weight, low, high, keys + count, weights + count);
  }

  // The least key up to which the weights reach `limit`, or the greatest of all; the keys are used up.  Halves the range
  // of the keys, after 24 steps that of their bits, until one key is left.
  float boundary(int64_t limit) {
    float low = -1.0f, high = kLargest;
    for (int step = 0; count > 0; ++step) {
      seal();
      bounds(&low, &high);
      if (low == high) break;
      float pivot = low + (high - low) * 0.5f;
      if (step > 24 || !(pivot < high)) pivot = middle_bits(low, high);
      const int64_t below = up_to(pivot), n = count;
      const bool left = below >= limit;
      limit -= left ? 0 : below;
      const vf from = left ? set1(-1.0f) : set1(pivot), to = left ? set1(pivot) : set1(kLargest);
      count = 0;
      for (int64_t i = 0; i < n; i += W) put(load(keys + i), load(weights + i), from, to);
    }
    return high;
  }

  // Fills up the last vector with a key that is there, of no weight.
  void seal() {
    for (int64_t i = count; i < count + W; ++i) keys[i] = keys[0], weights[i] = 0.0f;
  }

  void bounds(float *low, float *high) const {
    vf least = load(keys), most = least;
    for (int64_t i = 0; i < count; i += W) {
      least = min(least, load(keys + i));
      most = max(most, load(keys + i));
    }
    *low = -hmax(sub(set1(0.0f), least));
    *high = hmax(most);
  }

  static float middle_bits(float low, float high) {
    uint32_t a, b;
    memcpy(&a, &low, 4);
    memcpy(&b, &high, 4);
    a += (b - a) / 2;
    memcpy(&low, &a, 4);
    return low;
  }

  int64_t up_to(float pivot) const {
    Mass mass;
    for (int64_t i = 0; i < count; i += W)
      mass.add(select_gt(load(keys + i), set1(pivot), set1(0.0f), load(weights + i)));
    return mass.total();
  }
};

}  // namespace
