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
  constexpr int WAYS = 4;  // as many sums as an addition takes cycles; their order is of no account
  vf top[WAYS], bad[WAYS], sum[WAYS];
  for (int j = 0; j < WAYS; ++j) top[j] = bad[j] = sum[j] = set1(0.0f);
  auto look = [&](int j, vf v) {
    top[j] = max(top[j], max(v, sub(set1(0.0f), v)));
    bad[j] = fma(v, set1(0.0f), bad[j]);  // NaN from the first infinity or NaN on
  };
  int64_t i = 0;
  for (; i + WAYS * W <= n; i += WAYS * W)
    for (int j = 0; j < WAYS; ++j) look(j, load(x + i + j * W));
  for (; i < n; i += W) look(0, load_n(x + i, static_cast<int>(n - i < W ? n - i : W)));
  const float absmax = hmax(max(max(top[0], top[1]), max(top[2], top[3])));
  const float broken = hsum(add(add(bad[0], bad[1]), add(bad[2], bad[3])));
  if (broken != 0.0f || !(absmax >= 0x1p-100f)) {
    memset(codes, 0, static_cast<size_t>(padded));
    return {broken, 0.0f};
  }
  const vf rate = set1(127.0f / absmax);
  auto code = [&](int j, vf v, int64_t at, int left) {
    v = round(mul(v, rate));
    sum[j] = add(sum[j], v);
    to_codes(codes + at, v, left);
  };
  for (i = 0; i + WAYS * W <= n; i += WAYS * W)
    for (int j = 0; j < WAYS; ++j) code(j, load(x + i + j * W), i + j * W, W);
  for (; i < n; i += W) {
    const int left = static_cast<int>(n - i < W ? n - i : W);
    code(0, load_n(x + i, left), i, left);
  }
  if (padded > n) memset(codes + n, 0, static_cast<size_t>(padded - n));
  return {absmax * (1.0f / 127.0f), hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])))};
}

enum : int64_t { NONE, RELU, GELU, GELU_TANH, SILU, QUICK_GELU };

template <class T>
FG_INLINE vf activate(vf y, int64_t kind) {
  switch (kind) {
    case RELU: return select_gt(set1(0.0f), y, set1(0.0f), y);  // NaN stays
    case GELU: return gelu<T>(y);
    case GELU_TANH: return gelu_tanh<T>(y);
    case SILU: return silu<T>(y);
    case QUICK_GELU: return quick_gelu<T>(y);
    default: return y;
  }
}

// What is fused behind one row of a product, at one of its columns; bias and residual may be null.
template <class T>
struct Tail {
  const float *bias;
  const T *residual;
  T *out;
  int64_t kind;

  // act(y + bias) + residual for n <= W columns from column i on.
  inline __attribute__((always_inline)) void put(vf y, int64_t i, int n) const {
    if (n == W) {
      if (bias) y = add(y, load(bias + i));
      y = activate<T>(y, kind);
      if (residual) y = add(y, load(residual + i));
      store(out + i, y);
    } else {
      if (bias) y = add(y, load_n(bias + i, n));
      y = activate<T>(y, kind);
      if (residual) y = add(y, load_n(residual + i, n));
      store_n(out + i, y, n);
    }
  }
};

// Row m of an op's output; `bias` in float32 or null.
template <class T, class A>
FG_INLINE Tail<T> tail_of(const A *a, const float *bias, int64_t m) {
  const int64_t at = m * a->out_features;
  return {bias, a->residual ? static_cast<const T *>(a->residual) + at : nullptr, static_cast<T *>(a->out) + at,
          a->activation};
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

// Lines of memory to ask for, one at a time between products: all at once they would fill the queues that loads wait
// in.  Line n is number n % LINES of a piece, pieces `apart` bytes; to ask past a weight's end does no harm.
template <int LINES>
struct Ahead {
  const void *base;
  int64_t apart, n, end;

  inline __attribute__((always_inline)) void ask() {
    if (n < end) {
      __builtin_prefetch(static_cast<const char *>(base) + n / LINES * apart + n % LINES * 64, 0, 2);
      ++n;
    }
  }
  inline __attribute__((always_inline)) void rest() {
    while (n < end) ask();
  }
};

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
