// levels: scalar avx2 avx512 avx512_bf16 neon
// Layer normalization of rows: a row stays in the first-level cache between its passes.
#include "abi.h"
#include "moments.h"
#include "threads.h"

namespace {

constexpr int64_t kItem = 1 << 15;  // bytes of x that one work item takes, at least one row

template <class T>
FG_INLINE void row(const T *x, T *out, int64_t width, const float *weight, const float *bias, double eps) {
  const Moments moments = moments_of(x, width);
  const float mean = static_cast<float>(moments.mean);
  const float deviation = 1.0f / __builtin_sqrtf(static_cast<float>(moments.m2 / static_cast<double>(width) + eps));
  const vf m = set1(mean), k = set1(deviation);
  const vf rest = set1(static_cast<float>(static_cast<double>(mean) - moments.mean) * deviation);
  int64_t i = 0;
  for (; i + W <= width; i += W)
    store(out + i, fma(fma(sub(load(x + i), m), k, rest), load(weight + i), load(bias + i)));
  if (i < width) {
    int n = static_cast<int>(width - i);
    store_n(out + i, fma(fma(sub(load_n(x + i, n), m), k, rest), load_n(weight + i, n), load_n(bias + i, n)), n);
  }
}

template <class T>
int rows(const fg_layer_norm_args *a) {
  const int64_t total = a->outer * a->inner, width = a->width;
  const bool ready = a->weight && a->bias && a->weight_dtype == FG_FLOAT32 && a->bias_dtype == FG_FLOAT32;
  const float *weight = static_cast<const float *>(a->weight), *bias = static_cast<const float *>(a->bias);
  if (!ready) {
    float *wide = static_cast<float *>(fg_scratch(static_cast<size_t>(2 * width) * sizeof(float)));
    if (!wide) return FG_NO_MEMORY;
    for (int64_t i = 0; i < width; ++i) {
      wide[i] = parameter(a->weight, a->weight_dtype, i, 1.0f);
      wide[width + i] = parameter(a->bias, a->bias_dtype, i, 0.0f);
    }
    weight = wide;
    bias = wide + width;
  }
  int64_t step = kItem / (width * static_cast<int64_t>(sizeof(T)));
  step = step < 1 ? 1 : step;
  return parallel_for((total + step - 1) / step, 1, [&](int64_t item) {
    const int64_t last = (item + 1) * step < total ? (item + 1) * step : total;
    for (int64_t r = item * step; r < last; ++r) {
      const T *x = static_cast<const T *>(a->x) + r / a->inner * a->x_outer + r % a->inner * a->x_inner;
      row(x, static_cast<T *>(a->out) + r * width, width, weight, bias, a->eps);
    }
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(layer_norm)(const fg_layer_norm_args *args) {
  if (!args->outer || !args->inner || !args->width) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32:
      return rows<float>(args);
    case FG_BFLOAT16:
      return rows<bf16>(args);
    case FG_FLOAT16:
      return rows<fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
