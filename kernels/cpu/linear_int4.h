// What linear_int4's two ways share: its job, and the roundings of a group's sum.
#pragma once
#include "quantized.h"

namespace {

constexpr int PARTS = 16 / W;  // vectors that hold a panel's sixteen rows

struct Job {
  const fg_linear_int4_args *a;
  int64_t rows, padded;      // of x; columns, up to whole groups
  int64_t stride;            // of codes
  const int8_t *codes;       // (rows up to 16s, stride)
  const float *scale, *sum;  // (groups, rows)
  const float *bias;         // or null
};

// acc + sum * (s * by), where sum is an integer below 2^24.
FG_INLINE vf group_into(vf acc, vf sum, vf s, float by) { return fma(sum, mul(s, set1(by)), acc); }

FG_INLINE vf load_zeros(const uint8_t *p) {
#if defined(FG_HAS_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#else
  float wide[W];
  for (int i = 0; i < W; ++i) wide[i] = static_cast<float>(p[i]);
  return load(wide);
#endif
}

// Weights are read once and in order: far enough ahead that the next page is on its way.
FG_INLINE void ahead(const uint8_t *w) { __builtin_prefetch(w + 4096, 0, 2); }

// Row m of the output where it meets the panel, from its sixteen sums.
template <class T>
FG_INLINE void write(const Job &job, int64_t panel, int64_t m, const float *y) {
  const int64_t left = job.a->out_features - panel * 16;
  const Tail<T> tail = tail_of<T>(job.a, job.bias, m);
  for (int64_t i = 0; i < 16 && i < left; i += W)
    tail.put(load(y + i), panel * 16 + i, static_cast<int>(left - i < W ? left - i : W));
}

}  // namespace
