// 4-bit weights by x in floating point: a panel's codes become float32 in registers, by one to four rows of x.
//
// A group is summed without its scale, then scaled into the row's sum; the order is that of the columns.  With
// AVX512_BF16, x in bfloat16 stays so, however many rows there are, and its products are summed two by two; the other
// types' rows, where there are some, share what is unpacked, in the same order.
#pragma once
#include "linear_int4.h"
#if defined(FG_HAS_AVX512_BF16)
#include "linear_int4_block.h"
#endif

namespace {

// Column J of each of a vector's words, less its zero point.
template <int J>
FG_INLINE vf column(vi words, vf zero) {
  return sub(to_float(code_at<8 * (J % 4) + 4 * (J / 4)>(words)), zero);
}

template <int J, int ROWS>
FG_INLINE void gather(vi words, vf zero, const float *x, int64_t stride, vf (&sum)[ROWS]) {
  if constexpr (J < 8) {
    const vf w = column<J>(words, zero);
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(w, set1(x[r * stride + J]), sum[r]);
    gather<J + 1, ROWS>(words, zero, x, stride, sum);
  }
}

// y[row][16] of ROWS rows of x, from row m on; x in float32, rows of job.stride bytes, zero past their ends.
template <int ROWS, class S>
inline void few_float(const Job &job, const float *x, int64_t panel, int64_t m, float *y) {
  const fg_linear_int4_args *a = job.a;
  for (int64_t v = 0; v < 16; v += W) {
    const uint8_t *w = static_cast<const uint8_t *>(a->weight) + panel * job.padded * 8 + v * 4;
    const int64_t at = panel * a->groups * 16 + v;
    const int64_t stride = job.stride / 4;
    const float *row = x + m * stride;
    vf acc[ROWS];
    for (int r = 0; r < ROWS; ++r) acc[r] = set1(0.0f);
    for (int64_t g = 0; g < a->groups; ++g) {
      const vf scale = load(static_cast<const S *>(a->scales) + at + g * 16);
      const vf zero = a->zeros ? load_zeros(static_cast<const uint8_t *>(a->zeros) + at + g * 16) : set1(8.0f);
      vf sum[ROWS];
      for (int r = 0; r < ROWS; ++r) sum[r] = set1(0.0f);
      for (int64_t i = 0; i < a->group; i += 8, w += 64, row += 8) {
        ahead(w);
        gather<0, ROWS>(load_i(reinterpret_cast<const int32_t *>(w)), zero, row, stride, sum);
      }
      for (int r = 0; r < ROWS; ++r) acc[r] = fma(sum[r], scale, acc[r]);
    }
    for (int r = 0; r < ROWS; ++r) store(y + r * 16 + v, acc[r]);
  }
}

template <class T, class S>
int products_float(const Job &job, const float *x) {
  const int64_t panels = (job.a->out_features + 15) / 16, work = job.padded * 128 * job.rows;
  return parallel_for(panels, 1 + (1 << 17) / (work + 1), [&](int64_t panel) {
    float y[4 * 16];
    for (int64_t m = 0, rows; m < job.rows; m += rows) {
      rows = job.rows - m >= 4 ? 4 : 1;
      rows == 4 ? few_float<4, S>(job, x, panel, m, y) : few_float<1, S>(job, x, panel, m, y);
      for (int64_t r = 0; r < rows; ++r) write<T>(job, panel, m + r, y + r * 16);
    }
    return 0;
  });
}

// A row of x as `To`, the type that products are made in; zero up to `padded`.
FG_INLINE void lay_row(const bf16 *x, int64_t width, bf16 *to) { memcpy(to, x, static_cast<size_t>(width) * 2); }
template <class T>
FG_INLINE void lay_row(const T *x, int64_t width, float *to) {
  for (int64_t i = 0; i < width; i += W) {
    const int n = static_cast<int>(width - i < W ? width - i : W);
    store_n(to + i, load_n(x + i, n), n);
  }
}

template <class T, class S>
int float_by(const Job &job, const float *x) {
#if defined(FG_HAS_AVX512_BF16)
  if (job.rows > 4)
    return job.a->zeros ? blocked<FLOATS, T, S, true>(job, x) : blocked<FLOATS, T, S, false>(job, x);
#endif
  return products_float<T, S>(job, x);
}
#if defined(FG_HAS_AVX512_BF16)
template <class T, class S>
int float_by(const Job &job, const bf16 *x) {
  return job.a->zeros ? blocked<HALVES, T, S, true>(job, x) : blocked<HALVES, T, S, false>(job, x);
}
#endif

template <class T, class To>
int linear_float(const fg_linear_int4_args *a) {
  const int64_t rows = a->outer * a->inner, padded = a->groups * a->group;
  const int64_t length = padded + 64 / static_cast<int64_t>(sizeof(To));  // rows fall in different sets of a cache
  Parts parts;
  const int64_t x_at = parts.take(rows * length * static_cast<int64_t>(sizeof(To)));
  const int64_t bias_at = parts.take(a->out_features * 4);
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(parts.bytes + 64)));
  if (!memory) return FG_NO_MEMORY;
  To *laid = reinterpret_cast<To *>(memory + x_at);
  parallel_for(rows, 1 + (1 << 15) / (a->width + 1), [&](int64_t r) {
    To *to = laid + r * length;
    lay_row(static_cast<const T *>(a->x) + r / a->inner * a->x_outer + r % a->inner * a->x_inner, a->width, to);
    memset(to + a->width, 0, static_cast<size_t>(padded - a->width) * sizeof(To));
    return 0;
  });
  const float *bias = wide_bias(a->bias, a->bias_dtype, a->out_features, reinterpret_cast<float *>(memory + bias_at));
  const Job job{a, rows, padded, length * static_cast<int64_t>(sizeof(To)), nullptr, nullptr, nullptr, bias};
  return a->scale_dtype == FG_FLOAT16 ? float_by<T, fp16>(job, laid) : float_by<T, float>(job, laid);
}

}  // namespace
