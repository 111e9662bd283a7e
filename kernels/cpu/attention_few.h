// Attention of a few queries, as in decoding: nothing is packed, vectors run along the head dimension, and every key and
// value is read once a query.
#pragma once
#include "attention_tile.h"
#include "threads.h"

namespace {

constexpr int64_t FEW = 4;       // queries up to which this is the faster way
constexpr int FEW_BLOCK = 512;   // keys whose scores are held at a time

// q . k for R keys at once.
template <int R, class T>
FG_INLINE void dots(const float *q, const T *k, int64_t stride, int dim, float *to) {
  vf sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  int d = 0;
  for (; d + W <= dim; d += W) {
    vf x = load(q + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = fma(x, load(k + r * stride + d), sum[r]);
  }
  if (d < dim) {
    vf x = load(q + d);
    for (int r = 0; r < R; ++r) sum[r] = fma(x, load_n(k + r * stride + d, dim - d), sum[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) to[r] = hsum(sum[r]);
}

// o = alpha o + sum over r of p[r] v[r], for n keys, W dims (the first `lanes` of them) at a time.
template <class T>
FG_INLINE void blend(const float *p, const T *v, int64_t stride, int n, int dim, float alpha, float *o) {
  for (int d = 0; d < dim; d += W) {
    int lanes = dim - d < W ? dim - d : W;
    vf sum[4] = {mul(load(o + d), set1(alpha)), set1(0.0f), set1(0.0f), set1(0.0f)};
    int r = 0;
    if (lanes == W) {
      for (; r + 4 <= n; r += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = fma(set1(p[r + j]), load(v + (r + j) * stride + d), sum[j]);
    }
    for (; r < n; ++r) sum[0] = fma(set1(p[r]), load_n(v + r * stride + d, lanes), sum[0]);
    store(o + d, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
}

// One query.
template <class T>
void one_query(const Head &h, int64_t row) {
  const fg_attention_args *a = h.a;
  int dim = static_cast<int>(a->dim);
  const T *k = reinterpret_cast<const T *>(h.k), *v = reinterpret_cast<const T *>(h.v);
  const T *from = reinterpret_cast<const T *>(h.q) + row * a->q_row;
  alignas(64) float q[256 + W] = {}, o[256 + W] = {}, s[FEW_BLOCK + W];
  for (int d = 0; d < dim; d += W) store(q + d, load_n(from + d, dim - d < W ? dim - d : W));
  float rate = static_cast<float>(a->scale) * LOG2E, most = -infinity(), total = 0.0f;
  int64_t keys = a->causal && row + 1 < h.keys ? row + 1 : h.keys;
  int64_t mask = h.batch * a->mask_batch + h.head * a->mask_head + row * a->mask_row;
  for (int64_t k0 = 0; k0 < keys; k0 += FEW_BLOCK) {
    int n = static_cast<int>(keys - k0 < FEW_BLOCK ? keys - k0 : FEW_BLOCK), r = 0;
    for (; r + 4 <= n; r += 4) dots<4>(q, k + (k0 + r) * a->k_row, a->k_row, dim, s + r);
    for (; r < n; ++r) dots<1>(q, k + (k0 + r) * a->k_row, a->k_row, dim, s + r);
    for (r = n; r < n + W; ++r) s[r] = 0.0f;
    vf highest = set1(-infinity());
    for (r = 0; r < n; r += W) {
      vf x = mul(load(s + r), set1(rate));
      if (a->mask) {
        float added[W];
        for (int j = 0; j < W; ++j) added[j] = r + j < n ? LOG2E * mask_at(a, mask + (k0 + r + j) * a->mask_key) : 0.0f;
        x = add(x, load(added));
      }
      store(s + r, x);
      if (r + W > n)
        for (int j = n - r; j < W; ++j) s[r + j] = -infinity();
      highest = max(load(s + r), highest);
    }
    float now = hmax(highest);
    now = now > most ? now : most;
    float shift = now < LOWEST ? 0.0f : now;  // all closed so far: any finite shift gives exp2(-inf)
    alignas(64) float alpha[W];
    store(alpha, exp2_falling<5>(set1(now > most ? most - shift : 0.0f)));
    float factor = now > most ? alpha[0] : 1.0f;
    vf sum = set1(0.0f);
    for (r = 0; r < n; r += W) {
      vf p = exp2_falling<5>(sub(load(s + r), set1(shift)));
      store(s + r, p);
      sum = add(sum, p);
    }
    total = total * factor + hsum(sum);
    most = now;
    blend(s, v + k0 * a->v_row, a->v_row, n, dim, factor, o);
  }
  float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T *out = reinterpret_cast<T *>(h.out) + row * a->out_row;
  for (int d = 0; d < dim; d += W) store_n(out + d, mul(load(o + d), set1(inverse)), dim - d < W ? dim - d : W);
}

}  // namespace
