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

// `n` <= W columns of row m of the output from column `first` on, from their sums.
template <class T>
FG_INLINE void write(const Job &job, int64_t first, int64_t m, vi sums, int n) {
  vf by = mul(set1(job.scale[m]), load_n(static_cast<const float *>(job.a->scale) + first, n));
  tail_of<T>(job.a, job.bias, m).put(mul(to_float(sums), by), first, n);
}

}  // namespace
