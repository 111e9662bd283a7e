// levels: scalar avx2 avx512 avx512_bf16 amx neon
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
    const int64_t down = a->out_features;
    const bf16 *residual = static_cast<const bf16 *>(a->residual) + at;
    bf16 *out = static_cast<bf16 *>(a->out) + at;
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kParts; ++i) sums[i] = add(sums[i], bias[i % kParts]);
    if (a->residual)
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kParts; ++i) {
        const int r = i / kParts, v = i % kParts;
        if (r >= rows) break;
        sums[i] = add(sums[i], load_n(residual + r * down + v * W, columns(n, v)));
      }
    activate_all<bf16>(sums, a->activation);
#if defined(FG_HAS_AVX512_BF16)
    if (n == COLUMNS) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        if (r < rows) _mm512_storeu_si512(out + r * down, (__m512i)_mm512_cvtne2ps_pbh(sums[2 * r + 1], sums[2 * r]));
      return;
    }
#endif
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kParts; ++i) {
      if (i / kParts >= rows) return;
      store_n(out + i / kParts * down + i % kParts * W, sums[i], columns(n, i % kParts));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_linear)(const fg_packed_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  return a->dtype == FG_BFLOAT16 ? product<Plain>(a) : FG_BAD_ARGUMENT;
}
