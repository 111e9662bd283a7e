// levels: scalar avx2 avx512 avx512_bf16 amx neon
// act(x W^T + bias + residual) for many rows of x, by W in panels.
#include "packed_linear.h"

namespace {

template <class Form>
struct Plain {
  using T = typename Form::T;
  static constexpr int ROWS = Form::ROWS, PARTS = Form::PARTS, COLUMNS = PARTS * W;

  FG_INLINE void ahead(const fg_packed_linear_args *a, int64_t at) {
    __builtin_prefetch(static_cast<T *>(a->out) + at, 1);
    if (a->residual) __builtin_prefetch(static_cast<const T *>(a->residual) + at);
  }

  FG_INLINE void put(const fg_packed_linear_args *a, vf (&sums)[ROWS * PARTS], int rows, int64_t at, int64_t column,
                     int64_t n) {
    vf bias[PARTS];
    get_bias(a->bias, a->bias_dtype, column, n, bias);
    const int64_t down = a->out_features;
    const T *residual = static_cast<const T *>(a->residual) + at;
    T *out = static_cast<T *>(a->out) + at;
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PARTS; ++i) sums[i] = add(sums[i], bias[i % PARTS]);
    if (a->residual)
#pragma GCC unroll 32
      for (int i = 0; i < ROWS * PARTS; ++i) {
        const int r = i / PARTS, v = i % PARTS;
        if (r >= rows) break;
        sums[i] = add(sums[i], load_n(residual + r * down + v * W, columns(n, v)));
      }
    activate_all<T>(sums, a->activation);
#if defined(FG_HAS_AVX512_BF16)
    if (sizeof(T) == 2 && n == COLUMNS) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        if (r < rows) _mm512_storeu_si512(out + r * down, (__m512i)_mm512_cvtne2ps_pbh(sums[2 * r + 1], sums[2 * r]));
      return;
    }
#endif
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PARTS; ++i) {
      if (i / PARTS >= rows) return;
      store_n(out + i / PARTS * down + i % PARTS * W, sums[i], columns(n, i % PARTS));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_linear)(const fg_packed_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return in_blocks<Floats, Plain<Floats>>(a);
    case FG_BFLOAT16: return product<Plain<Pairs>>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
