// levels: scalar avx2 avx512 avx512_bf16 amx neon
// act(x W^T + bias) + residual for many rows of x, by W in panels of int8; as linear_int8, to the bit.
#include "packed_int8.h"

namespace {

template <class T>
struct Plain {
  using Element = T;
  using Args = fg_packed_linear_int8_args;
  static constexpr int COLUMNS = kPanel;

  FG_INLINE void ahead(const Args *a, int64_t at) {
    __builtin_prefetch(static_cast<T *>(a->out) + at, 1);
    if (a->residual) __builtin_prefetch(static_cast<const T *>(a->residual) + at);
  }

  FG_INLINE void put(const Args *a, Sums &sums, const float *scale, int rows, int64_t at, int64_t column, int64_t n) {
    vf by[kParts], bias[kParts];
    get_scale(a->scale, column, n, by);
    get_bias(a->bias, a->bias_dtype, column, n, bias);
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kParts; ++i) {
      const int r = i / kParts < rows ? i / kParts : 0, v = i % kParts;
      sums[i] = add(mul(sums[i], mul(set1(scale[r]), by[v])), bias[v]);
    }
    activate_all<T>(sums, a->activation);
    const int64_t down = a->out_features;
    if (a->residual)
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kParts; ++i) {
        const int r = i / kParts, v = i % kParts;
        if (r >= rows) break;
        const T *residual = static_cast<const T *>(a->residual) + at + r * down + v * W;
        sums[i] = add(sums[i], load_n(residual, columns(n, v)));
      }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      if (r < rows) put_row(static_cast<T *>(a->out) + at + r * down, sums + r * kParts, kParts, n);
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_linear_int8)(const fg_packed_linear_int8_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return product<Plain<float>>(a);
    case FG_BFLOAT16: return product<Plain<bf16>>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
