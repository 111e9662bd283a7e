// levels: scalar avx2 avx512 avx512_bf16 amx neon
// act(x G^T + gate_bias) * (x W^T + bias) for many rows of x: the first half of a panel holds rows of G, the other of W.
#include "packed_linear.h"

namespace {

template <class Form>
struct Gated {
  using T = typename Form::T;
  static constexpr int ROWS = Form::ROWS, PANEL = Form::PARTS * W, COLUMNS = PANEL / 2;
  static constexpr int PARTS = COLUMNS < W ? 1 : COLUMNS / W, GATES = ROWS * PARTS;

  FG_INLINE void ahead(const fg_packed_gated_linear_args *a, int64_t at) {
    __builtin_prefetch(static_cast<T *>(a->out) + at, 1);
  }

  // Vector v of a row's gates, or of what they multiply.
  FG_INLINE vf half(const vf *row, int v, bool gate) {
    if (COLUMNS >= W) return row[(gate ? 0 : PARTS) + v];
    alignas(64) float lanes[2 * W] = {};  // both are in one vector
    store(lanes, row[0]);
    return load(lanes + (gate ? 0 : COLUMNS));
  }

  FG_INLINE void put(const fg_packed_gated_linear_args *a, vf (&sums)[ROWS * Form::PARTS], int rows, int64_t at,
                     int64_t column, int64_t n) {
    vf bias[PARTS], gate_bias[PARTS], gates[GATES];
    get_bias(a->bias, a->bias_dtype, column, n, bias);
    get_bias(a->gate_bias, a->gate_bias_dtype, column, n, gate_bias);
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i)
      gates[i] = add(half(sums + i / PARTS * Form::PARTS, i % PARTS, true), gate_bias[i % PARTS]);
    activate_all<T>(gates, a->activation);
    const int64_t down = a->out_features;
    T *out = static_cast<T *>(a->out) + at;
#pragma GCC unroll 32
    for (int i = 0; i < GATES; ++i) {
      const int r = i / PARTS, v = i % PARTS;
      if (r >= rows) return;
      const vf y = mul(gates[i], add(half(sums + r * Form::PARTS, v, false), bias[v]));
      store_n(out + r * down + v * W, y, columns(n, v));
    }
  }
};

}  // namespace

extern "C" int FG_EXPORT(packed_gated_linear)(const fg_packed_gated_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return in_blocks<Floats, Gated<Floats>>(a);
    case FG_BFLOAT16: return product<Gated<Pairs>>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
