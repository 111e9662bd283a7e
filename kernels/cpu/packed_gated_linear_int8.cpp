// levels: scalar avx2 avx512 avx512_bf16 amx neon
// act(x G^T + gate_bias) * (x W^T + bias) for many rows of x: an int8 panel holds sixteen rows of G, then those of W.
#include "packed_int8.h"

namespace {

template <class T>
struct Gated {
  using Element = T;
  using Args = fg_packed_gated_linear_int8_args;
  static constexpr int COLUMNS = kPanel / 2, PARTS = kParts / 2 ? kParts / 2 : 1, GATES = kRows * PARTS;

  FG_INLINE void ahead(const Args *a, int64_t at) { __builtin_prefetch(static_cast<T *>(a->out) + at, 1); }

  FG_INLINE void put(const Args *a, Sums &sums, const float *scale, int rows, int64_t at, int64_t column, int64_t n) {
    vf by[PARTS], gate_by[PARTS], bias[PARTS], gate_bias[PARTS], gates[GATES];
    get_scale(a->scale, column, n, by);
    get_scale(a->gate_scale, column, n, gate_by);
    get_bias(a->bias, a->bias_dtype, column, n, bias);
    get_bias(a->gate_bias, a->gate_bias_dtype, column, n, gate_bias);
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i) {
      const int r = i / PARTS < rows ? i / PARTS : 0, v = i % PARTS;
      gates[i] = add(mul(sums[i / PARTS * kParts + v], mul(set1(scale[r]), gate_by[v])), gate_bias[v]);

    }
    activate_all<T>(gates, a->activation);
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i) {
      const int r = i / PARTS, v = i % PARTS;
      if (r >= rows) return;
      const vf value = add(mul(sums[r * kParts + PARTS + v], mul(set1(scale[r]), by[v])), bias[v]);
      store_n(static_cast<T *>(a->out) + at + r * a->out_features + v * W, mul(gates[i], value), columns(n, v));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_gated_linear_int8)(const fg_packed_gated_linear_int8_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return product<Gated<float>>(a);
    case FG_BFLOAT16: return product<Gated<bf16>>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
