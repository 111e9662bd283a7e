// What the quantized linear layers share: x to int8 codes, and what is fused behind the product.
#pragma once
#include "abi.h"
#include "dot.h"
#include "gelu.h"
#include "silu.h"
#include "threads.h"
#include "vectors.h"

namespace {

struct Scaled {
  float scale, sum;  // of the codes; the sum is exact
};

// The largest magnitude of all lanes seen; infinite or NaN where one was.
struct Largest {
#if defined(FG_HAS_AVX512)
  __m512i bits = _mm512_setzero_si512();  // magnitudes are ordered as integers are, NaN behind infinity
  FG_INLINE __m512i magnitude(vf v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  void see(vf v) { bits = _mm512_max_epi32(bits, magnitude(v)); }
  float value() const { return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(bits)))); }
#else
  vf top = set1(0.0f), bad = set1(0.0f);
  void see(vf v) {
    top = max(top, max(v, sub(set1(0.0f), v)));
    bad = fma(v, set1(0.0f), bad);  // NaN from the first infinity or NaN on
  }
  float value() const {
    const float broken = hsum(bad);
    return broken == 0.0f ? hmax(top) : broken;
  }
#endif
  void see(const Largest &other) {
#if defined(FG_HAS_AVX512)
    bits = _mm512_max_epi32(bits, other.bits);
#else
    top = max(top, other.top), bad = add(bad, other.bad);
#endif
  }
};

// That of the first n of x.
template <class T>
inline float largest_of(const T *x, int64_t n) {
  constexpr int WAYS = 4;  // as many as an addition takes cycles
  Largest of[WAYS];
  int64_t i = 0;
  for (; i + WAYS * W <= n; i += WAYS * W)
    for (int j = 0; j < WAYS; ++j) of[j].see(load(x + i + j * W));
  for (; i < n; i += W) of[0].see(load_n(x + i, lanes_left(n - i)));
  for (int j = 1; j < WAYS; ++j) of[0].see(of[j]);
  return of[0].value();
}

#if defined(FG_HAS_AVX512_BF16)
inline float largest_of(const bf16 *x, int64_t n) {  // as integers of 16 bits
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = n - i < 32 ? (1u << (n - i)) - 1u : ~0u;
    top = _mm512_max_epi16(top, _mm512_and_si512(_mm512_maskz_loadu_epi16(some, x + i), magnitude));
  }
  const __m512i high = _mm512_slli_epi32(top, 16), low = _mm512_and_si512(top, _mm512_set1_epi32(-65536));
  const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(high, low));
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The codes of 64 floats by `rate`, in their order.
FG_INLINE __m512i codes_of(vf a, vf b, vf c, vf d, vf rate) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto whole = [&](vf v) { return _mm512_cvtps_epi32(mul(v, rate)); };
  const __m512i low = _mm512_packs_epi32(whole(a), whole(b)), high = _mm512_packs_epi32(whole(c), whole(d));
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

// The codes of n by `rate`; returns their sum.
template <class T>
FG_INLINE float put_codes(const T *x, int64_t n, float rate, int8_t *codes) {
  const vf by = set1(rate);
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const __m512i made = codes_of(load(x + i), load(x + i + W), load(x + i + 2 * W), load(x + i + 3 * W), by);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), made);
    _mm512_storeu_si512(codes + i, made);
  }
  if (i < n) {
    const auto part = [&](int j) { return load_n(x + i + j * W, i + j * W < n ? lanes_left(n - i - j * W) : 0); };
    const __m512i made = codes_of(part(0), part(1), part(2), part(3), by);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), made);
    _mm512_mask_storeu_epi8(codes + i, (1ull << (n - i)) - 1, made);
  }
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}
#else
template <class T>
FG_INLINE float put_codes(const T *x, int64_t n, float rate, int8_t *codes) {
  constexpr int WAYS = 4;
  vf sum[WAYS];
  for (int j = 0; j < WAYS; ++j) sum[j] = set1(0.0f);
  const auto put = [&](int j, vf v, int64_t at, int left) {
    v = round(mul(v, set1(rate)));
    sum[j] = add(sum[j], v);
    to_codes(codes + at, v, left);
  };
  int64_t i = 0;
  for (; i + WAYS * W <= n; i += WAYS * W)
    for (int j = 0; j < WAYS; ++j) put(j, load(x + i + j * W), i + j * W, W);
  for (; i < n; i += W) put(0, load_n(x + i, lanes_left(n - i)), i, lanes_left(n - i));
  return hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}
#endif

// The first n of x to `padded` codes, the rest 0; kernels/linear_int8.py says by which arithmetic.  Never inlined: in
// attention_int8_vnni.h GCC 12 then spills the products' sums, 2.5 times as slow.
template <class T>
__attribute__((noinline)) Scaled quantize(const T *x, int64_t n, int64_t padded, int8_t *codes) {
  const float absmax = largest_of(x, n);
  const bool finite = absmax <= 0x1.fffffep127f, served = finite && absmax >= 0x1p-100f;
  const int64_t from = served ? n : 0;
  if (padded > from) memset(codes + from, 0, static_cast<size_t>(padded - from));
  if (!served) return {finite ? 0.0f : __builtin_nanf(""), 0.0f};
  return {absmax * (1.0f / 127.0f), put_codes(x, n, 127.0f / absmax, codes)};
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

// Some vectors at a time, step by step; silu.h says why.  Eight at once would not leave room for a product's sums.
template <class T, int N>
FG_INLINE void activate_all(vf (&sums)[N], int64_t kind) {
  constexpr int TOGETHER = N < kAtOnce / 2 ? N : kAtOnce / 2;
  static_assert(N % TOGETHER == 0, "the last vectors would be others'");
  if (kind == NONE) return;
#pragma GCC unroll 32
  for (int i = 0; i < N; i += TOGETHER) {
    vf y[TOGETHER];
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; ++j) y[j] = sums[i + j];
    if (kind == GELU)
      gelu<T>(y);
    else if (kind == GELU_TANH)
      gelu_tanh<T>(y);
    else if (kind == SILU)
      silu<T>(y);
    else if (kind == QUICK_GELU)
      quick_gelu<T>(y);
    else
      for (vf &one : y) one = activate<T>(one, kind);
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; ++j) sums[i + j] = y[j];
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
  // The same for N whole vectors.
  template <int N>
  inline __attribute__((always_inline)) void put_all(vf (&y)[N], int64_t i) const {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) y[v] = bias ? add(y[v], load(bias + i + v * W)) : y[v];
    activate_all<T>(y, kind);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(out + i + v * W, residual ? add(y[v], load(residual + i + v * W)) : y[v]);
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
