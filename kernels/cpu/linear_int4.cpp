// levels: scalar avx2 avx512 avx512_bf16 amx neon
// y = act(x W^T + bias) + residual with W in 4 bits: layout and arithmetic are those of kernels/linear_int4.py.
//
// x is quantized once; a panel of sixteen rows of W is then one stream of memory, taken against one to eight rows of x
// at a time (many rows: on AMX tiles, linear_int4_amx.h).  A group's integer sums are exact, and every path adds the
// groups in order with the same roundings: a row's result does not depend on how many others there are.
#include "linear_int4_float.h"
#if defined(FG_LEVEL_AMX)
#include "linear_int4_amx.h"
#endif

namespace {

constexpr int64_t kItem = 1 << 20;  // bytes of weights that one work item streams, at least one panel
constexpr int64_t kRows = 64;       // rows of x that one work item takes

#if defined(FG_HAS_AVX512)
constexpr int64_t kMost = 8;  // rows of x at a time: as many as registers hold
#else
constexpr int64_t kMost = 4;
#endif

// y[row][16] of ROWS rows of x, from row m on.
template <int ROWS, class S, bool ZEROS>
inline void few(const Job &job, int64_t panel, int64_t m, float *y) {
  const fg_linear_int4_args *a = job.a;
  const uint8_t *w = static_cast<const uint8_t *>(a->weight) + panel * job.padded * 8;
  const S *scale = static_cast<const S *>(a->scales) + panel * a->groups * 16;
  const uint8_t *zero = ZEROS ? static_cast<const uint8_t *>(a->zeros) + panel * a->groups * 16 : nullptr;
  const int8_t *x = job.codes + m * job.stride;
  const float *by = job.scale + m, *total = job.sum + m;
  vf acc[ROWS][PARTS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < PARTS; ++v) acc[r][v] = set1(0.0f);
  for (int64_t g = 0; g < a->groups; ++g) {
    vi sum[ROWS][PARTS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < PARTS; ++v) sum[r][v] = zero_i();
    for (int64_t i = 0; i < a->group; i += 8, w += 64) {
      ahead(w);
#pragma GCC unroll 16
      for (int v = 0; v < PARTS; ++v) {
        Nibbles codes = unpack(w + 4 * W * v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum[r][v] = dot8(sum[r][v], codes, x + r * job.stride + g * a->group + i);
      }
    }
    for (int v = 0; v < PARTS; ++v) {
      vf s = load(scale + g * 16 + W * v), z = ZEROS ? load_zeros(zero + g * 16 + W * v) : set1(8.0f);
      for (int r = 0; r < ROWS; ++r) {  // the zero point's part is an exact integer, too
        vf rest = sub(to_float(sum[r][v]), mul(z, set1(total[g * job.rows + r])));
        acc[r][v] = group_into(acc[r][v], rest, s, by[g * job.rows + r]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < PARTS; ++v) store(y + r * 16 + v * W, acc[r][v]);
}

template <class S, bool ZEROS>
void any_few(const Job &job, int64_t panel, int64_t m, int64_t rows, float *y) {
  switch (rows) {
    case 1: return few<1, S, ZEROS>(job, panel, m, y);
    case 2: return few<2, S, ZEROS>(job, panel, m, y);
    case 4: return few<4, S, ZEROS>(job, panel, m, y);
    default: return few<kMost, S, ZEROS>(job, panel, m, y);
  }
}

// Rows [first, last) of x by one panel.
template <class T, class S, bool ZEROS>
void panel_by(const Job &job, int64_t panel, int64_t first, int64_t last) {
  float y[kMost * 16];
  for (int64_t m = first, rows; m < last; m += rows) {
    rows = kMost;
    while (rows > last - m) rows /= 2;
    any_few<S, ZEROS>(job, panel, m, rows, y);
    for (int64_t r = 0; r < rows; ++r) write<T>(job, panel, m + r, y + r * 16);
  }
}

template <class T, class S, bool ZEROS>
int products(const Job &job) {
  const fg_linear_int4_args *a = job.a;
  const int64_t panels = (a->out_features + 15) / 16;
#if defined(FG_LEVEL_AMX)
  if (job.rows > kMost) return tiled<T, S, ZEROS>(job);
#elif defined(FG_HAS_AVX512_BF16)
  if (job.rows > kShared && a->group > 32) return blocked<BYTES, T, S, ZEROS>(job, job.codes);
#endif
  int64_t step = kItem / (job.padded * 8 + 1), wanted = 4 * fg_threads();
  if (panels / wanted < step) step = panels / wanted;
  step = step < 1 ? 1 : step;
  const int64_t blocks = (panels + step - 1) / step, chunks = (job.rows + kRows - 1) / kRows;
  const int64_t work = step * job.padded * 8 * (job.rows < kRows ? job.rows : kRows);
  return parallel_for(blocks * chunks, 1 + (1 << 17) / (work + 1), [&](int64_t item) {
    const int64_t first = item / blocks * kRows, last = first + kRows < job.rows ? first + kRows : job.rows;
    const int64_t from = item % blocks * step, to = from + step < panels ? from + step : panels;
    for (int64_t panel = from; panel < to; ++panel) panel_by<T, S, ZEROS>(job, panel, first, last);
    return 0;
  });
}

template <class T>
int linear(const fg_linear_int4_args *a) {
  const int64_t rows = a->outer * a->inner, groups = a->groups, padded = groups * a->group;
  const int64_t stride = padded + 64;  // rows of codes fall in different sets of a cache
  const int64_t tall = (rows + 15) / 16 * 16;  // AMX reads whole tiles of rows
  Parts parts;
  const int64_t codes_at = parts.take(tall * stride), scale_at = parts.take(rows * groups * 4);
  const int64_t sum_at = parts.take(rows * groups * 4), bias_at = parts.take(a->out_features * 4);
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(parts.bytes + 64)));
  if (!memory) return FG_NO_MEMORY;
  int8_t *codes = reinterpret_cast<int8_t *>(memory + codes_at);
  float *scale = reinterpret_cast<float *>(memory + scale_at), *sum = reinterpret_cast<float *>(memory + sum_at);
  parallel_for(rows, 1 + (1 << 15) / (a->width + 1), [&](int64_t r) {
    const T *x = static_cast<const T *>(a->x) + r / a->inner * a->x_outer + r % a->inner * a->x_inner;
    int64_t g = 0;
#if defined(FG_HAS_AVX512)
    for (; (g + 16) * a->group <= a->width; g += 16)
      quantize_groups(x + g * a->group, a->group, codes + r * stride + g * a->group, scale + g * rows + r,
                      sum + g * rows + r, rows);
#endif
    for (; g < groups; ++g) {
      int64_t left = a->width - g * a->group;
      Scaled found = quantize(x + g * a->group, left < a->group ? left : a->group, a->group,
                              codes + r * stride + g * a->group);
      scale[g * rows + r] = found.scale;
      sum[g * rows + r] = found.sum;
    }
    return 0;
  });
  const Job job{a, rows, padded, stride, codes, scale, sum,
                wide_bias(a->bias, a->bias_dtype, a->out_features, reinterpret_cast<float *>(memory + bias_at))};
  if (a->scale_dtype == FG_FLOAT16) return a->zeros ? products<T, fp16, true>(job) : products<T, fp16, false>(job);
  return a->zeros ? products<T, float, true>(job) : products<T, float, false>(job);
}

}  // namespace

extern "C" int FG_EXPORT(linear_int4)(const fg_linear_int4_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return a->quantize ? linear<float>(a) : linear_float<float, float>(a);
#if defined(FG_HAS_AVX512_BF16)
    case FG_BFLOAT16: return a->quantize ? linear<bf16>(a) : linear_float<bf16, bf16>(a);
#else
    case FG_BFLOAT16: return a->quantize ? linear<bf16>(a) : linear_float<bf16, float>(a);
#endif
    case FG_FLOAT16: return a->quantize ? linear<fp16>(a) : linear_float<fp16, float>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
