// The products of a few queries in bfloat16 with float32 sums (AVX512-BF16): scores by attention_few_pairs.h, and the
// values of a pair of keys against its weights, rounded to bfloat16 as attention_bf16.h has them.
//
// A pair is always the keys 2 i and 2 i + 1 of a piece, whatever blocks of a paged cache they lie in.
#pragma once

namespace {

struct Bf16Few : Vectors, PairScores<bf16> {
  using element = bf16;

  // The scores from s[r] on become BLOCK weights in bfloat16, in s as an array of those.  The sum of the rounded
  // weights, two a lane, divides what they weighed: their common error cancels.
  FG_INLINE vf weigh(float *s, int r, vf shift, vf sum) {
    vf low = exp2_falling<5>(sub(load(s + r), shift)), high = exp2_falling<5>(sub(load(s + r + W), shift));
    __m512bh p = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(reinterpret_cast<bf16 *>(s) + r, (__m512i)p);
    return _mm512_dpbf16_ps(sum, p, (__m512bh)_mm512_set1_epi16(0x3f80));
  }

  // How many of `count` keys that lie one after another are taken in one go, `left` being those up to the end: pairs
  // alone, and at a block's end the pair of which it has one.
  static int whole_run(int count, int left) {
    return count % 2 == 0 || count == left ? count : count == 1 ? 2 : count - 1;
  }

  // o[m] += sum over n keys of p[m][key] v[key], for M queries and C steps of dims, the last of `lanes`, 32 where all
  // are WHOLE.  In o a step's sums stand as give() takes them: those of dims 8 i to 8 i + 3, then those of 8 i + 4 to
  // 8 i + 7.
  template <int M, int C, bool WHOLE>
  FG_INLINE void blend(const bf16 *p, const bf16 *v, Ahead &ahead, int64_t stride, int n, int lanes, float *o) {
    vf sum[M][2 * C];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c) sum[m][c] = load(o + m * WIDE + c * W);
    auto pair = [&](int r, bool second) __attribute__((always_inline)) {
      __m512bh x[2 * C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const bf16 *at = v + r * stride + c * 32;
        ahead.ask(2 * 64);
        const __mmask32 mask = WHOLE || c + 1 < C ? ~0u : halves_below(lanes);
        __m512i even = mask == ~0u ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(mask, at);
        __m512i odd = _mm512_setzero_si512();
        if (second) odd = mask == ~0u ? _mm512_loadu_si512(at + stride) : _mm512_maskz_loadu_epi16(mask, at + stride);
        x[2 * c] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        x[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        int32_t weights;
        memcpy(&weights, p + 2 * m * ROW + r, 4);
        __m512bh both = (__m512bh)_mm512_set1_epi32(weights);
#pragma GCC unroll 8
        for (int c = 0; c < 2 * C; ++c) sum[m][c] = _mm512_dpbf16_ps(sum[m][c], both, x[c]);
      }
    };
    int r = 0;
    for (; r + 2 <= n; r += 2) pair(r, true);
    if (r < n) pair(r, false);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c) store(o + m * WIDE + c * W, sum[m][c]);
  }

  // All dims of the n keys from the piece's key r on; of one or two queries whole rows, as far as registers hold them.
  template <int M>
  static void blends(const float *s, int r, const bf16 *v, Ahead &ahead, int64_t stride, int n, int dim, float *o) {
    constexpr int MOST = M <= 2 ? 4 : 2;
    const bf16 *p = reinterpret_cast<const bf16 *>(s) + r;
    Ahead own = ahead;
    int d = 0;
    for (; d + MOST * 32 <= dim; d += MOST * 32) blend<M, MOST, true>(p, v + d, own, stride, n, 32, o + d);
    if (d < dim) rest<M, MOST>(p, v + d, own, stride, n, dim - d, o + d);
    ahead = own;
  }
  template <int M, int C>
  FG_INLINE void rest(const bf16 *p, const bf16 *v, Ahead &ahead, int64_t stride, int n, int left, float *o) {
    if (left > (C - 1) * 32) return blend<M, C, false>(p, v, ahead, stride, n, (left - 1) % 32 + 1, o);
    if constexpr (C > 1) rest<M, C - 1>(p, v, ahead, stride, n, left, o);
  }

  static void give(const float *o, int m, int, int dim, float *to) {
    o += m * WIDE;
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
