// Attention's engine in bfloat16 products with float32 sums, by AVX512-BF16; attention_amx.h has AMX tiles.
//
// It takes pairs of bfloat16 as 32-bit elements: Q[dim pair][query], K[key][dim pair], V[dim][key pair] and the weights
// P[key pair][query], a broadcast pair of K or V against a vector of Q or P.
#pragma once
#include "attention_tile.h"

namespace {

using pair_t = uint32_t;

FG_INLINE int pad32(int n) { return (n + 31) / 32 * 32; }

struct Bf16Pack {
  static constexpr int NB = 128;                       // keys of a block
  static constexpr int VS = NB / 2 + 16;               // pairs in a row of V: padded, so that rows fall in other cache sets
  static constexpr int64_t SCORES = static_cast<int64_t>(NB) * TQ;
  static int64_t q_size(int64_t dim) { return pad32(static_cast<int>(dim)) / 2 * TQ * 4; }
  static int64_t k_size(int64_t dim) { return NB * pad32(static_cast<int>(dim)) * 2; }
  static int64_t v_size(int64_t dim) { return pad32(static_cast<int>(dim)) * VS * 4; }
  static int64_t o_rows(int64_t dim) { return pad32(static_cast<int>(dim)); }
  static int64_t p_size() { return NB / 2 * TQ * 4; }

  static void pack_q(const bf16 *q, int64_t stride, int rows, int dim, float sign, void *to) {
    pair_t *out = static_cast<pair_t *>(to);
    __m512i flip = _mm512_set1_epi16(static_cast<short>(sign < 0 ? 0x8000 : 0));
    for (int i = 0; i < TQ; i += 16) {
      for (int d = 0; d < dim; d += 32) {
        __mmask32 mask = sign == 0.0f ? 0 : halves_below(dim - d);
        __m512i x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          x[r] = i + r < rows ? _mm512_maskz_loadu_epi16(mask, q + (i + r) * stride + d) : _mm512_setzero_si512();
          x[r] = _mm512_xor_si512(x[r], flip);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + (d / 2 + r) * TQ + i, x[r]);
      }
    }
  }

  static void pack_k(const bf16 *k, int64_t stride, int n, int dim, void *to) {
    bf16 *out = static_cast<bf16 *>(to);
    int wide = pad32(dim), rows = pad32(n);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < wide; d += 32) {
        __mmask32 mask = r < n ? halves_below(dim - d) : 0;
        _mm512_storeu_si512(out + r * wide + d, _mm512_maskz_loadu_epi16(mask, k + r * stride + d));
      }
  }

  static void pack_v(const bf16 *v, int64_t stride, int n, int dim, void *to) {
    pair_t *out = static_cast<pair_t *>(to);
    for (int r = 0; r < pad32(n); r += 32)
      for (int d = 0; d < dim; d += 16) {
        __mmask16 mask = lanes_below(dim - d < 16 ? dim - d : 16);
        __m512i x[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const bf16 *row = v + (r + 2 * j) * stride + d;
          __m256i low = _mm256_maskz_loadu_epi16(r + 2 * j < n ? mask : 0, row);
          __m256i high = _mm256_maskz_loadu_epi16(r + 2 * j + 1 < n ? mask : 0, row + stride);
          x[j] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
        transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) _mm512_storeu_si512(out + (d + j) * VS + r / 2, x[j]);
      }
  }

  // Two float vectors as one of pairs: lane i holds (low[i], high[i]), rounded to nearest even.
  FG_INLINE __m512i pair_up(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  static void weigh(float *s, int n, float rate, const float *shift, State *state, void *to) {
    pair_t *out = static_cast<pair_t *>(to);
    vf down0 = sub(set1(0.0f), load(shift)), down1 = sub(set1(0.0f), load(shift + W));
    vf sum0 = set1(0.0f), sum1 = sum0, factor = set1(rate);
    int r = 0;
    for (; r + 2 <= n; r += 2) {
      const float *at = s + r * TQ;
      vf a0 = exp2_falling<3>(fma(load(at), factor, down0)), a1 = exp2_falling<3>(fma(load(at + W), factor, down1));
      vf b0 = exp2_falling<3>(fma(load(at + TQ), factor, down0));
      vf b1 = exp2_falling<3>(fma(load(at + TQ + W), factor, down1));
      sum0 = add(sum0, add(a0, b0));
      sum1 = add(sum1, add(a1, b1));
      _mm512_store_si512(out + r / 2 * TQ, pair_up(a0, b0));
      _mm512_store_si512(out + r / 2 * TQ + W, pair_up(a1, b1));
    }
    if (r < n) {
      vf a0 = exp2_falling<3>(fma(load(s + r * TQ), factor, down0));
      vf a1 = exp2_falling<3>(fma(load(s + r * TQ + W), factor, down1));
      sum0 = add(sum0, a0);
      sum1 = add(sum1, a1);
      _mm512_store_si512(out + r / 2 * TQ, pair_up(a0, set1(0.0f)));
      _mm512_store_si512(out + r / 2 * TQ + W, pair_up(a1, set1(0.0f)));
      r += 2;
    }
    for (; r < pad32(n); r += 2) {
      _mm512_store_si512(out + r / 2 * TQ, _mm512_setzero_si512());
      _mm512_store_si512(out + r / 2 * TQ + W, _mm512_setzero_si512());
    }
    store(state->sum, add(load(state->sum), sum0));
    store(state->sum + W, add(load(state->sum + W), sum1));
  }

  // O *= alpha, or O = 0 on a tile's first block.
  FG_INLINE void rescale(float *o, int rows, const State *state, bool first, bool moved) {
    if (first) {
      memset(o, 0, static_cast<size_t>(rows) * TQ * 4);
    } else if (moved) {
      vf a0 = load(state->alpha), a1 = load(state->alpha + W);
      for (int d = 0; d < rows; ++d) {
        store(o + d * TQ, mul(load(o + d * TQ), a0));
        store(o + d * TQ + W, mul(load(o + d * TQ + W), a1));
      }
    }
  }
};

// write_out for bfloat16: pairs of dims are turned together, which halves the turning.
template <>
inline void write_out<bf16>(const Head &h, const float *o, const State *state, int64_t q0) {
  const fg_attention_args *a = h.a;
  int dim = static_cast<int>(a->dim);
  for (int i = 0; i < TQ; i += W) {
    vf sum = load(state->sum + i);
    vf inverse = select_gt(sum, set1(0.0f), div(set1(1.0f), sum), sum);  // keeps NaN
    int64_t rows = a->queries - q0 - i < W ? a->queries - q0 - i : W;
    for (int d = 0; d < dim; d += 32) {
      const float *from = o + d * TQ + i;
      __m512i x[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)  // a row more than dim is there to be read: the mask drops it
        x[j] = d + 2 * j < dim ? Bf16Pack::pair_up(mul(load(from + 2 * j * TQ), inverse),
                                                   mul(load(from + (2 * j + 1) * TQ), inverse))
                               : _mm512_setzero_si512();
      transpose(x);
      bf16 *out = reinterpret_cast<bf16 *>(h.out) + (q0 + i) * a->out_row + d;
      __mmask32 mask = halves_below(dim - d);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r)
        if (r < rows) _mm512_mask_storeu_epi16(out + r * a->out_row, mask, x[r]);
    }
  }
}

struct Bf16Engine : Bf16Pack {
  static void begin() {}
  static void end() {}

  // to[i][query] (+)= sum over j of left[i][j] . right[j][query] for ROWS rows i and all j in [0, pairs).
  template <int ROWS>
  FG_INLINE void product(const pair_t *left, int64_t stride, const pair_t *right, int pairs, bool add_to, float *to) {
    __m512 acc[ROWS][2];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
      for (int j = 0; j < 2; ++j) acc[m][j] = add_to ? load(to + m * TQ + j * W) : set1(0.0f);
    for (int i = 0; i < pairs; ++i) {
      __m512bh r0 = (__m512bh)_mm512_load_si512(right + i * TQ), r1 = (__m512bh)_mm512_load_si512(right + i * TQ + W);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        __m512bh one = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[m * stride + i]));
        acc[m][0] = _mm512_dpbf16_ps(acc[m][0], one, r0);
        acc[m][1] = _mm512_dpbf16_ps(acc[m][1], one, r1);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
      for (int j = 0; j < 2; ++j) store(to + m * TQ + j * W, acc[m][j]);
  }

  static void scores(const void *q, const void *k, int n, int dim, float *s) {
    const pair_t *left = static_cast<const pair_t *>(k), *right = static_cast<const pair_t *>(q);
    int64_t stride = pad32(dim) / 2;
    for (int r = 0; r < n; r += 8) product<8>(left + r * stride, stride, right, (dim + 1) / 2, false, s + r * TQ);
  }

  static void gather_all(const float *, const void *p, const void *v, int n, int dim, const State *state, bool first,
                         bool moved, float *o) {
    const pair_t *left = static_cast<const pair_t *>(v), *right = static_cast<const pair_t *>(p);
    int rows = (dim + 7) / 8 * 8;
    rescale(o, rows, state, first, moved);
    for (int d = 0; d < rows; d += 8) product<8>(left + d * VS, VS, right, (n + 1) / 2, true, o + d * TQ);
  }
};

}  // namespace
