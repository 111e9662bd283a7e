// levels: scalar avx2 avx512 avx512_bf16 amx neon
// y = act(x W^T + bias) + residual with W in int8, by the arithmetic of kernels/linear_int8.py.
//
// x is quantized once; sums are exact integers, so that tiles of any size give the same bits.  Dot products run along
// the rows of the weight as they lie, a few rows of each operand at a time (many rows: on AMX tiles, linear_int8_amx.h,
// or with VNNI, linear_int8_vnni.h).
#include "linear_int8.h"
#if defined(FG_LEVEL_AMX)
#include "linear_int8_amx.h"
#elif defined(FG_HAS_AVX512_BF16)
#include "linear_int8_vnni.h"
#endif

namespace {

constexpr int64_t kItem = 1 << 20;  // bytes of the weight that one work item streams, at least 16 rows
constexpr int64_t kRows = 64;       // rows of x that one work item takes
constexpr int kDown = W == 8 ? 2 : 4, kMost = 4;  // rows of the weight, of x at a time: what registers hold
constexpr int64_t kFew = 8;         // rows of x up to which tiles do not pay

// sums[row of x][16] gets DOWN columns, those of rows w[0..DOWN) of the weight.
template <int ROWS>
inline void dots(const Job &job, const int8_t *const (&w)[kDown], int64_t m, int32_t *sums) {
  const int64_t k = job.a->width;
  const int8_t *x = job.codes + m * job.stride;
  vi acc[kDown][ROWS];
  for (int i = 0; i < kDown; ++i)
    for (int r = 0; r < ROWS; ++r) acc[i][r] = zero_i();
  int64_t at = 0;
  for (; at + CHUNK <= k; at += CHUNK) {
    bytes left[kDown];
#pragma GCC unroll 4
    for (int i = 0; i < kDown; ++i) {
      __builtin_prefetch(w[i] + at + kDown * k, 0, 2);  // of the rows that come next
      left[i] = load_w(w[i] + at);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      bytes right = load_x(x + r * job.stride + at);
#pragma GCC unroll 4
      for (int i = 0; i < kDown; ++i) acc[i][r] = dot(acc[i][r], left[i], right);
    }
  }
  if (at < k)
    for (int i = 0; i < kDown; ++i)
      for (int r = 0; r < ROWS; ++r)
        acc[i][r] = dot(acc[i][r], load_w_n(w[i] + at, static_cast<int>(k - at)), load_x(x + r * job.stride + at));
  for (int i = 0; i < kDown; ++i)
    for (int r = 0; r < ROWS; ++r) sums[r * 16 + i] = hsum_i(acc[i][r], static_cast<int32_t>(job.sum[m + r]));
}

// Rows [first, last) of x by sixteen rows of the weight from `n` on.
template <class T>
void few(const Job &job, int64_t n, int64_t first, int64_t last) {
  const int64_t end = job.a->out_features - n < 16 ? job.a->out_features - n : 16;
  int32_t sums[kMost * 16];
  for (int64_t m = first, rows; m < last; m += rows) {
    rows = last - m >= 4 ? 4 : last - m >= 2 ? 2 : 1;
    for (int64_t i = 0; i < end; i += kDown) {
      const int8_t *w[kDown];
      for (int j = 0; j < kDown; ++j) w[j] = weight_row(job, n + (i + j < end ? i + j : end - 1));
      switch (rows) {
        case 1: dots<1>(job, w, m, sums + i); break;
        case 2: dots<2>(job, w, m, sums + i); break;
        default: dots<4>(job, w, m, sums + i);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < end; i += W)
        write<T>(job, n + i, m + r, load_i(sums + r * 16 + i), static_cast<int>(end - i < W ? end - i : W));
  }
}

template <class T, class F>
int products(const Job &job, const F &quantized) {
#if defined(FG_LEVEL_AMX)
  if (job.packed) return tiled<T>(job);
#elif defined(FG_HAS_AVX512_BF16)
  if (job.packed) return some<T>(job);
  if (job.rows > kSome) return tiled<T>(job, quantized);
#endif
  (void)quantized;
  const int64_t panels = (job.a->out_features + 15) / 16, wanted = 4 * fg_threads();
  int64_t step = kItem / (job.a->width * 16 + 1);
  if (panels / wanted < step) step = panels / wanted;
  step = step < 1 ? 1 : step;
  const int64_t blocks = (panels + step - 1) / step, chunks = (job.rows + kRows - 1) / kRows;
  const int64_t work = step * job.a->width * 16 * (job.rows < kRows ? job.rows : kRows);
  return parallel_for(blocks * chunks, 1 + (1 << 18) / (work + 1), [&](int64_t item) {
    const int64_t first = item / blocks * kRows, last = first + kRows < job.rows ? first + kRows : job.rows;
    const int64_t from = item % blocks * step, to = from + step < panels ? from + step : panels;
    for (int64_t panel = from; panel < to; ++panel) few<T>(job, panel * 16, first, last);
    return 0;
  });
}

template <class T>
int linear(const fg_linear_int8_args *a) {
  const int64_t rows = a->outer * a->inner, padded = (a->width + 63) / 64 * 64, tall = (rows + 15) / 16 * 16;
  const int64_t stride = padded + 64;  // rows of codes fall in different sets of a cache
  bool pack = false;
#if defined(FG_LEVEL_AMX)
  pack = rows > kFew;
#elif defined(FG_HAS_AVX512_BF16)
  pack = rows > kFew && rows <= kSome;
#endif
  Parts parts;
  const int64_t codes_at = parts.take(tall * stride), packed_at = parts.take(pack ? tall * padded : 0);
  const int64_t scale_at = parts.take(rows * 4), sum_at = parts.take(tall * 4);
  const int64_t bias_at = parts.take(a->out_features * 4);
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(parts.bytes + 64)));
  if (!memory) return FG_NO_MEMORY;
  int8_t *codes = reinterpret_cast<int8_t *>(memory + codes_at);
  int8_t *packed = reinterpret_cast<int8_t *>(memory + packed_at);
  float *scale = reinterpret_cast<float *>(memory + scale_at), *sum = reinterpret_cast<float *>(memory + sum_at);
  auto quantized = [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T *x = static_cast<const T *>(a->x) + r / a->inner * a->x_outer + r % a->inner * a->x_inner;
      Scaled found = quantize(x, a->width, padded, codes + r * stride);
      scale[r] = found.scale;
      sum[r] = found.sum;
    }
  };
  bool later = false;
#if defined(FG_HAS_AVX512_BF16) && !defined(FG_LEVEL_AMX)
  later = rows > kSome && Cut(rows, a->out_features).runs == 1;
#endif
  const int64_t tiles = later ? 0 : tall / 16;
  parallel_for(tiles, 1 + (1 << 15) / (a->width * 16 + 1), [&](int64_t tile) {
    quantized(tile * 16, tile * 16 + 16 < rows ? tile * 16 + 16 : rows);
#if defined(FG_HAS_AVX512_BF16)
    if (pack) pack_rows(codes + tile * 16 * stride, stride, padded, packed + tile * 16 * padded);
#endif
    return 0;
  });
  return products<T>({a, rows, padded, stride, codes, pack ? packed : nullptr, scale, sum,
                      wide_bias(a->bias, a->bias_dtype, a->out_features, reinterpret_cast<float *>(memory + bias_at))},
                     quantized);
}

}  // namespace

extern "C" int FG_EXPORT(linear_int8)(const fg_linear_int8_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return linear<float>(a);
    case FG_BFLOAT16: return linear<bf16>(a);
    case FG_FLOAT16: return linear<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
