// What linear_int8's two ways share: its job, and the last steps of a row's sixteen columns.
#pragma once
#include "quantized.h"

namespace {

struct Job {
  const fg_linear_int8_args *a;
  int64_t rows, padded;  // of x; columns of codes, up to whole steps of any level
  int64_t stride;        // of codes
  const int8_t *codes;   // (rows up to 16s, stride)
  const int8_t *packed;  // codes once more, by pack_rows; or null
  const float *scale;    // (rows,)
  const float *sum;      // (rows up to 16s,): of the codes, below 2^24 and exact
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

#if defined(FG_HAS_AVX512)
// Sixteen rows of codes as tiles of a right operand: (step of 64 columns, 4 columns, row, column of the 4).
inline void pack_rows(const int8_t *codes, int64_t stride, int64_t padded, int8_t *to) {
  for (int64_t k = 0; k < padded; k += 64) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(codes + r * stride + k);
    transpose(x);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_si512(to + k * 16 + r * 64, x[r]);
  }
}
#endif

}  // namespace
