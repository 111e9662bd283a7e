// What the quantized linear layers share: x to int8 codes, and what is fused behind the product.
#pragma once
#include "abi.h"
#include "dot.h"
#include "gelu.h"
#include "silu.h"
#include "threads.h"

namespace {

struct Scaled {
  float scale, sum;  // of the codes; the sum is exact
};

// The first n of x to `padded` codes, the rest 0; kernels/linear_int8.py says by which arithmetic.
template <class T>
inline Scaled quantize(const T *x, int64_t n, int64_t padded, int8_t *codes) {
  vf top = set1(0.0f), bad = top, sum = top;
  for (int64_t i = 0; i < n; i += W) {
    vf v = n - i < W ? load_n(x + i, static_cast<int>(n - i)) : load(x + i);
    top = max(top, max(v, sub(set1(0.0f), v)));
    bad = fma(v, set1(0.0f), bad);  // NaN from the first infinity or NaN on
  }
  const float absmax = hmax(top), broken = hsum(bad);
  if (broken != 0.0f || !(absmax >= 0x1p-100f)) {
    memset(codes, 0, static_cast<size_t>(padded));
    return {broken, 0.0f};
  }
  const vf rate = set1(127.0f / absmax);
  for (int64_t i = 0; i < n; i += W) {
    int left = static_cast<int>(n - i < W ? n - i : W);
    vf v = round(mul(load_n(x + i, left), rate));
    sum = add(sum, v);
    to_codes(codes + i, v, left);
  }
  memset(codes + n, 0, static_cast<size_t>(padded - n));
  return {absmax * (1.0f / 127.0f), hsum(sum)};
}

enum : int64_t { NONE, RELU, GELU, GELU_TANH, SILU };

template <class T>
FG_INLINE vf activate(vf y, int64_t kind) {
  switch (kind) {
    case RELU: return select_gt(set1(0.0f), y, set1(0.0f), y);  // NaN stays
    case GELU: return gelu(y);
    case GELU_TANH: return gelu_tanh(y);
    case SILU: return silu<T>(y);
    default: return y;
  }
}

// act(y + bias) + residual for n neighbouring columns of a row, to `out`; bias and residual may be null.
template <class T>
inline void finish(const float *y, int64_t n, const float *bias, int64_t kind, const T *residual, T *out) {
  for (int64_t i = 0; i < n; i += W) {
    int left = static_cast<int>(n - i < W ? n - i : W);
    vf v = load_n(y + i, left);
    if (bias) v = add(v, load_n(bias + i, left));
    v = activate<T>(v, kind);
    if (residual) v = add(v, load_n(residual + i, left));
    store_n(out + i, v, left);
  }
}

// The bias in float32, in `to` where it has to be converted; null where there is none.
inline const float *wide_bias(const void *bias, int64_t dtype, int64_t n, float *to) {
  if (!bias || dtype == FG_FLOAT32) return static_cast<const float *>(bias);
  for (int64_t i = 0; i < n; i += W) {
    int left = static_cast<int>(n - i < W ? n - i : W);
    store_n(to + i,
            dtype == FG_BFLOAT16 ? load_n(static_cast<const bf16 *>(bias) + i, left)
                                 : load_n(static_cast<const fp16 *>(bias) + i, left),
            left);
  }
  return to;
}

// Parts of one block of memory, each starting on a cache line.
struct Parts {
  int64_t bytes = 0;
  int64_t take(int64_t size) {
    int64_t start = bytes;
    bytes += (size + 63) / 64 * 64;
    return start;
  }
};

}  // namespace
