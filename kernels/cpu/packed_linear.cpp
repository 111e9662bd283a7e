// levels: scalar avx2 avx512 avx512_bf16 neon
// act(x W^T + bias + residual) for many rows of x, by W in panels.
#include "packed_linear.h"

namespace {

struct Plain {
  static constexpr int COLUMNS = kPanel;

  FG_INLINE void ahead(const fg_packed_linear_args *a, int64_t at) {
    __builtin_prefetch(static_cast<bf16 *>(a->out) + at, 1);
    if (a->residual) __builtin_prefetch(static_cast<const bf16 *>(a->residual) + at);
  }

  FG_INLINE void put(const fg_packed_linear_args *a, Sums &sums, int rows, int64_t at, int64_t column, int64_t n) {
    vf bias[kParts];
    get_bias(a->bias, a->bias_dtype, column, n, bias);
    const bf16 *residual = static_cast<const bf16 *>(a->residual);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, at += a->out_features) {
      if (r >= rows) return;
      vf y[kParts];
#pragma GCC unroll 32
      for (int v = 0; v < kParts; ++v) {
        y[v] = add(sums[r][v], bias[v]);
        if (residual) y[v] = add(y[v], load_n(residual + at + v * W, columns(n, v)));
      }
      activate_all(y, a->activation);
#pragma GCC unroll 32
      for (int v = 0; v < kParts; ++v) store_n(static_cast<bf16 *>(a->out) + at + v * W, y[v], columns(n, v));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_linear)(const fg_packed_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  return a->dtype == FG_BFLOAT16 ? product<Plain>(a) : FG_BAD_ARGUMENT;
}
