// 4-bit weights by x in floating point.
//
// A group is summed without its scale, then scaled into the row's sum; the order is that of the columns, however many
// rows of x there are.  Up to four rows take codes as they become float32 in registers, more share a block of them.  With
// AVX512_BF16, x in bfloat16 stays so, and its products are summed two by two.
#pragma once
#include "linear_int4.h"
#if defined(FG_HAS_AVX512_BF16)
#include "linear_int4_block.h"
#else
#include "linear_int4_strip.h"
#endif

namespace {

constexpr int SIDE = PARTS < 4 ? PARTS : 4;  // vectors of a panel that are summed at a time

template <int J, int N, int ROWS>
FG_INLINE void gather(const vi (&words)[N], const vf (&zero)[N], const float *x, int64_t stride, vf (&sum)[ROWS][N]) {
  if constexpr (J < 8) {
    vf w[N];
    for (int v = 0; v < N; ++v) w[v] = column<J>(words[v], zero[v]);
    for (int r = 0; r < ROWS; ++r) {
      const vf one = set1(x[r * stride + J]);
      for (int v = 0; v < N; ++v) sum[r][v] = fma(w[v], one, sum[r][v]);
    }
    gather<J + 1, N, ROWS>(words, zero, x, stride, sum);
  }
}

// y[row][panel][16] of x by PANELS panels; x in float32, rows of job.stride bytes, zero past their ends.
template <int ROWS, int PANELS, class S>
inline void few_float(const Job &job, const float *x, int64_t panel, float (*y)[PANELS][16]) {
  const fg_linear_int4_args *a = job.a;
  const int64_t stride = job.stride / 4;
  constexpr int N = PANELS * SIDE;
  for (int side = 0; side < 16; side += SIDE * W) {
    const uint8_t *w[N];
    int64_t at[N];
    for (int v = 0; v < N; ++v) {
      const int64_t p = panel_of(job, panel + v / SIDE), lane = side + v % SIDE * W;
      w[v] = weights_at(job, p, 0) + lane * 4;
      at[v] = p * a->groups * 16 + lane;
    }
    const float *row = x;
    vf acc[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < N; ++v) acc[r][v] = set1(0.0f);
    for (int64_t g = 0; g < a->groups; ++g) {
      vf zero[N], sum[ROWS][N];
      for (int v = 0; v < N; ++v) zero[v] = zeros_of(job, at[v] + g * 16);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < N; ++v) sum[r][v] = set1(0.0f);
      for (int64_t i = 0; i < a->group; i += 8, row += 8) {
        vi words[N];
        for (int v = 0; v < N; ++v, w[v - 1] += 64) {
          if (v % SIDE == 0) ahead(w[v]);
          words[v] = load_i(reinterpret_cast<const int32_t *>(w[v]));
        }
        gather<0, N, ROWS>(words, zero, row, stride, sum);
      }
      for (int v = 0; v < N; ++v) {
        const vf scale = load(static_cast<const S *>(a->scales) + at[v] + g * 16);
        for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(sum[r][v], scale, acc[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < N; ++v) store(y[r][v / SIDE] + side + v % SIDE * W, acc[r][v]);
  }
}

// The output's columns of PANELS panels.
template <int ROWS, int PANELS, class T, class S>
inline int rows_float(const Job &job, const float *x, int64_t panel) {
  float y[ROWS][PANELS][16];
  few_float<ROWS, PANELS, S>(job, x, panel, y);
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS && (panel + p) * 16 < job.a->out_features; ++p) write<T>(job, panel + p, r, y[r][p]);
  return 0;
}

template <class T, class S>
int products_float(const Job &job, const float *x) {
  constexpr int PANELS = 4 / SIDE;  // four chains of sums hide what an addition waits for
  const int64_t items = (job.a->out_features + 16 * PANELS - 1) / (16 * PANELS);
  const int64_t work = job.padded * 128 * PANELS * job.rows;
  return parallel_for(items, 1 + (1 << 17) / (work + 1), [&](int64_t item) {
    const int64_t first = item * PANELS;
    if (job.rows == 1) return rows_float<1, PANELS, T, S>(job, x, first);
    for (int64_t panel = first; panel < first + PANELS && panel * 16 < job.a->out_features; ++panel) {
      switch (job.rows) {
        case 2: rows_float<2, 1, T, S>(job, x, panel); break;
        case 3: rows_float<3, 1, T, S>(job, x, panel); break;
        default: rows_float<4, 1, T, S>(job, x, panel);
      }
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
  if (job.rows <= 4) return products_float<T, S>(job, x);
#if defined(FG_HAS_AVX512_BF16)
  return job.a->zeros ? blocked<FLOATS, T, S, true>(job, x) : blocked<FLOATS, T, S, false>(job, x);
#else
  return in_strips<T, S>(job, x);
#endif
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
