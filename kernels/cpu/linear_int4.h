// What linear_int4's two ways share: its job, and the roundings of a group's sum.
#pragma once
#include "quantized.h"

namespace {

constexpr int PARTS = 16 / W;  // vectors that hold a panel's sixteen rows

struct Job {
  const fg_linear_int4_args *a;
  int64_t rows, padded;      // of x; columns, up to whole groups
  int64_t stride;            // of x as it is multiplied, in bytes
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

#if defined(FG_HAS_AVX512)
// quantize() of sixteen whole groups: group g's codes in order, its scale and sum at [g * apart].
template <class T>
inline void quantize_groups(const T *x, int64_t group, int8_t *codes, float *scale, float *sum, int64_t apart) {
  alignas(64) float found[3][16];  // rates, scales, sums
  __m512i part[16], all;
  for (int g = 0; g < 16; ++g) {
    part[g] = zero_i();
    for (int64_t i = 0; i < group; i += 16) {
      const __m512i bits = _mm512_castps_si512(load(x + g * group + i));  // magnitudes compare as integers, NaN highest
      part[g] = _mm512_max_epu32(part[g], _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
  }
  transpose(part);
  all = part[0];
  for (int g = 1; g < 16; ++g) all = _mm512_max_epu32(all, part[g]);
  const vf absmax = _mm512_castsi512_ps(all);
  const __mmask16 broken = _mm512_cmpge_epu32_mask(all, _mm512_set1_epi32(0x7f800000));
  const __mmask16 good = ~broken & _mm512_cmp_ps_mask(absmax, set1(0x1p-100f), _CMP_GE_OQ);
  store(found[0], _mm512_maskz_div_ps(good, set1(127.0f), absmax));
  const vf scales = _mm512_maskz_mul_ps(good, absmax, set1(1.0f / 127.0f));
  store(found[1], _mm512_mask_blend_ps(broken, scales, set1(__builtin_nanf(""))));
  for (int g = 0; g < 16; ++g) {
    const vf rate = set1(found[0][g]);
    part[g] = zero_i();
    for (int64_t i = g * group; i < (g + 1) * group; i += 16) {
      const __m512i code = _mm512_cvtps_epi32(mul(load(x + i), rate));
      part[g] = _mm512_add_epi32(part[g], code);
      _mm512_mask_cvtepi32_storeu_epi8(codes + i, 0xffff, code);
    }
  }
  transpose(part);
  all = part[0];
  for (int g = 1; g < 16; ++g) all = _mm512_add_epi32(all, part[g]);
  store(found[2], _mm512_maskz_cvtepi32_ps(good, all));  // what is not finite has codes 0 and sums of no meaning
  for (int g = 0; g < 16; ++g) scale[g * apart] = found[1][g], sum[g * apart] = found[2][g];
}
#endif

// Weights are read once and in order: far enough ahead that the next pages are on their way.
FG_INLINE void ahead(const uint8_t *w, int64_t by = 16384) { __builtin_prefetch(w + by, 0, 2); }

FG_INLINE int64_t panel_of(const Job &job, int64_t panel) {
  const int64_t last = (job.a->out_features + 15) / 16 - 1;
  return panel < last ? panel : last;  // what is beyond is worked out and not written
}

FG_INLINE const uint8_t *weights_at(const Job &job, int64_t panel, int64_t k) {
  return static_cast<const uint8_t *>(job.a->weight) + (panel_of(job, panel) * job.padded + k) * 8;
}

// The zero points of a vector of a group, the first of which is at `at`.
FG_INLINE vf zeros_of(const Job &job, int64_t at) {
  return job.a->zeros ? load_zeros(static_cast<const uint8_t *>(job.a->zeros) + at) : set1(8.0f);
}

// Column J of each of a vector's words, less its zero point.
template <int J>
FG_INLINE vf column(vi words, vf zero) {
  return sub(to_float(code_at<8 * (J % 4) + 4 * (J / 4)>(words)), zero);
}

// Row m of the output where it meets the panel, from its sixteen sums.
template <class T>
FG_INLINE void write(const Job &job, int64_t panel, int64_t m, const float *y) {
  const int64_t left = job.a->out_features - panel * 16;
  const Tail<T> tail = tail_of<T>(job.a, job.bias, m);
  for (int64_t i = 0; i < 16 && i < left; i += W)
    tail.put(load(y + i), panel * 16 + i, static_cast<int>(left - i < W ? left - i : W));
}

}  // namespace
