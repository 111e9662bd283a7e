// The products of a few queries in bfloat16 with float32 sums (AVX512-BF16): a key's pairs of elements against those of
// a query, and the values of a pair of keys against its weights, rounded to bfloat16 as attention_bf16.h has them.
//
// A pair is always the keys 2 i and 2 i + 1 of a piece, whatever blocks of a paged cache they lie in.
#pragma once

namespace {

struct Bf16Few {
  using element = bf16;
  using query_t = bf16;
  using vector = __m512bh;
  static constexpr int STEP = 32;

  FG_INLINE __mmask32 halves_below(int n) { return n >= 32 ? ~0u : (1u << n) - 1u; }
  FG_INLINE vector query(const bf16 *q) { return (__m512bh)_mm512_loadu_si512(q); }
  FG_INLINE vector key(const bf16 *k) { return (__m512bh)_mm512_loadu_si512(k); }
  FG_INLINE vector key_n(const bf16 *k, int n) { return (__m512bh)_mm512_maskz_loadu_epi16(halves_below(n), k); }
  FG_INLINE vf dot(vf sum, vector q, vector k) { return _mm512_dpbf16_ps(sum, q, k); }
  static void take_query(const bf16 *from, int dim, bf16 *to) {
    for (int d = 0; d < dim; d += 32)
      _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(halves_below(dim - d), from + d));
  }

  // The sum of the rounded weights divides what they weighed: their common error cancels.
  FG_INLINE vf weight(vf p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p)), 16));
  }

  // The weights s[n] become bfloat16, in place; zeros up to a whole vector.
  static void take_weights(float *s, int n) {
    for (int r = 0; r < n; r += 32) {
      vf low = load(s + r), high = r + W < n ? load(s + r + W) : set1(0.0f);
      _mm512_storeu_si512(reinterpret_cast<bf16 *>(s) + r, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  // How many of `count` keys that lie one after another are taken in one go, `left` being those up to the end: pairs
  // alone, and at a block's end the pair of which it has one.
  static int whole_run(int count, int left) {
    return count % 2 == 0 || count == left ? count : count == 1 ? 2 : count - 1;
  }

  // o[m] += sum over n keys of p[m][key] v[key], for M queries and C steps of dims, the last of `lanes`.  In o a step's
  // sums stand as give() takes them: those of dims 8 i to 8 i + 3, then those of 8 i + 4 to 8 i + 7.
  template <int M, int C>
  FG_INLINE void blend(const bf16 *p, const bf16 *v, const bf16 *ahead, int64_t stride, int n, int lanes,
                              float *o) {
    vf sum[M][2 * C];
    __mmask32 last = halves_below(lanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < 2 * C; ++c) sum[m][c] = load(o + m * WIDE + c * W);
    for (int r = 0; r < n; r += 2) {
      __m512bh x[2 * C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const bf16 *at = v + r * stride + c * 32;
        __mmask32 mask = c + 1 < C ? ~0u : last;
        __builtin_prefetch(ahead + r * stride + c * 32);
        __builtin_prefetch(ahead + (r + 1) * stride + c * 32);
        __m512i even = _mm512_maskz_loadu_epi16(mask, at);
        __m512i odd = _mm512_maskz_loadu_epi16(r + 1 < n ? mask : 0, at + stride);
        x[2 * c] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        x[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        memcpy(&pair, p + 2 * m * PIECE + r, 4);
        __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; ++c) sum[m][c] = _mm512_dpbf16_ps(sum[m][c], both, x[c]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < 2 * C; ++c) store(o + m * WIDE + c * W, sum[m][c]);
  }

  template <int M>
  static void blends(const float *s, int r, const bf16 *v, const bf16 *ahead, int64_t stride, int n, int dim,
                     float *o) {
    const bf16 *p = reinterpret_cast<const bf16 *>(s) + r;
    int d = 0;
    for (; d + 32 < dim; d += 64)
      blend<M, 2>(p, v + d, ahead + d, stride, n, dim - d < 64 ? dim - d - 32 : 32, o + d);
    if (d < dim) blend<M, 1>(p, v + d, ahead + d, stride, n, dim - d, o + d);
  }

  static void give(const float *o, int dim, float *to) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int d = 0; d < dim; d += 32) {
      __m512d x = _mm512_loadu_pd(o + d), y = _mm512_loadu_pd(o + d + W);
      store(to + d, _mm512_castpd_ps(_mm512_permutex2var_pd(x, low, y)));
      if (d + W < dim) store(to + d + W, _mm512_castpd_ps(_mm512_permutex2var_pd(x, high, y)));
    }
  }
};

}  // namespace
