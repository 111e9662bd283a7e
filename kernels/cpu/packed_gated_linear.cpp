// levels: scalar avx2 avx512 avx512_bf16 amx neon
// act(x G^T + gate_bias) * (x W^T + bias) for many rows of x: a panel holds sixteen rows of G, then those of W.
#include "packed_linear.h"

namespace {

struct Gated {
  static constexpr int COLUMNS = kPanel / 2, PARTS = kParts / 2, GATES = kRows * PARTS;

  FG_INLINE void ahead(const fg_packed_gated_linear_args *a, int64_t at) {
    __builtin_prefetch(static_cast<bf16 *>(a->out) + at, 1);
  }

  FG_INLINE void put(const fg_packed_gated_linear_args *a, Sums &sums, int rows, int64_t at, int64_t column, int64_t n) {
    vf bias[PARTS], gate_bias[PARTS], gates[GATES];
    get_bias(a->bias, a->bias_dtype, column, n, bias);
    get_bias(a->gate_bias, a->gate_bias_dtype, column, n, gate_bias);
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i) gates[i] = add(sums[i / PARTS * kParts + i % PARTS], gate_bias[i % PARTS]);
    activate_all<bf16>(gates, a->activation);
    const int64_t down = a->out_features;
    bf16 *out = static_cast<bf16 *>(a->out) + at;
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i) {
      const int r = i / PARTS, v = i % PARTS;
      if (r >= rows) return;
      const vf y = mul(gates[i], add(sums[r * kParts + PARTS + v], bias[v]));
      store_n(out + r * down + v * W, y, columns(n, v));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_gated_linear)(const fg_packed_gated_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  return a->dtype == FG_BFLOAT16 ? product<Gated>(a) : FG_BAD_ARGUMENT;
}
