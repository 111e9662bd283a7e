// What linear_int8's two ways share: its job, and the last steps of a row's sixteen columns.
#pragma once
#include "quantized.h"

namespace {

struct Job {
  const fg_linear_int8_args *a;
  int64_t rows, padded;  // of x; columns of codes, up to whole steps of any level
  const int8_t *codes;   // (rows up to 16s, padded)
  const int8_t *packed;  // for AMX: codes once more, see linear_int8_amx.h; else null
  const float *scale;    // (rows,)
  const float *sum;      // (rows,): of the codes, below 2^24 and exact
  const float *bias;     // or null
};

FG_INLINE const int8_t *weight_row(const Job &job, int64_t n) {
  return static_cast<const int8_t *>(job.a->weight) + n * job.a->width;
}

// Row m of the output from column `first` on, from its sixteen sums (fewer where the weight ends).
template <class T>
inline void write(const Job &job, int64_t first, int64_t m, const int32_t *sums) {
  const fg_linear_int8_args *a = job.a;
  const int64_t n = a->out_features - first < 16 ? a->out_features - first : 16, at = m * a->out_features + first;
  const float *scale = static_cast<const float *>(a->scale) + first;
  float y[16];
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(sums[i]) * (job.scale[m] * scale[i]);
  finish(y, n, job.bias ? job.bias + first : nullptr, a->activation,
         a->residual ? static_cast<const T *>(a->residual) + at : nullptr, static_cast<T *>(a->out) + at);
}

}  // namespace
