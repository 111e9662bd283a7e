// What stands between attention's two products on AMX tiles: scores S[query][key] become weights.
//
// Weights are exp2(score * rate - shift).  A row's shift is not its running maximum: it is BIAS above the maximum of
// the first keys that the row met, and moves only when a weight reaches 2, that is when a score is found BIAS + 1
// octaves above.  Any shift gives the same softmax, in floating point without loss.  So a block of keys needs no
// maximum before its exponentials; that no weight reached 2 is one bit of the packed weights, looked at afterwards.
// Whether a row's shift moves depends on its own scores alone.
#pragma once
#include "attention_amx.h"

namespace {

constexpr float BIAS = 40.0f;  // octaves: sums of 2^13 times the largest weights are far from overflow, and what is
                               // 2^-80 of the largest is still a normal number

struct alignas(64) Rows {
  float shift[SIDE], maximum[SIDE];  // the maximum is what the shift was taken from; -inf before
  int64_t blocks;                    // of keys met so far
  bool ready;                        // all rows have a shift
};

FG_INLINE void reset(Rows *rows) {
  store(rows->shift, set1(0.0f));
  store(rows->maximum, set1(-infinity()));
  rows->blocks = 0;
  rows->ready = false;
}

// 2^t (1 + 2^-8 of the power of two below): cut to bfloat16 it is 2^t rounded, halves upwards.
FG_INLINE vf exp2_to_cut(vf t) {
  vf f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // exp2_falling<3>
  vf p = fma(set1(0.07802452147f), f, set1(0.22606717050f));
  p = fma(p, f, set1(0.69583350420f));
  p = fma(p, f, set1(0.99992519617f + 0.00390625f));
  return _mm512_scalef_ps(p, t);
}

// The weights of four rows and a unit of keys, in place of the first 16 keys' scores.  Bits 14 and 30 of `any` tell of
// weights from 2 up, and of NaN.
FG_INLINE void weigh(char *s, float rate, const float *shift, __m512i &any) {
  const vf factor = set1(rate);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const vf down = set1(shift[r]);
    const float *at = reinterpret_cast<const float *>(s + r * 64);
    const __m512i near = (__m512i)exp2_to_cut(_mm512_fmsub_ps(load(at), factor, down));
    const __m512i far = (__m512i)exp2_to_cut(_mm512_fmsub_ps(load(at + TILE / 4), factor, down));
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(near, 16), far);
    any = _mm512_or_si512(any, both);
    _mm512_store_si512(s + r * 64, both);
  }
}
FG_INLINE bool reached(__m512i any) { return _mm512_test_epi32_mask(any, _mm512_set1_epi32(0x40004000)) != 0; }

// Four rows and a unit at a time: PARTS for a unit, counted through a tile's units.
constexpr int PARTS = 4;
FG_INLINE void weigh_part(char *s, int part, float rate, const Rows *rows, __m512i &any) {
  const int row = part % PARTS * 4;
  written();
  weigh(s + part / PARTS * 2 * TILE + row * 64, rate, rows->shift + row, any);
  written();
}

// Moves the shifts that these scores move, and what O has so far with them.
inline void move_shifts(const char *s, int units, float rate, int wide, Rows *rows, char *o) {
  __m512i x[16];
  for (int r = 0; r < SIDE; ++r) {
    vf most = set1(-infinity());
    const float *at = reinterpret_cast<const float *>(s + r * 64);
    for (int j = 0; j < 2 * units; ++j) most = max(load(at + j * TILE / 4), most);  // NaN is met again in the weights
    x[r] = (__m512i)most;
  }
  transpose(x);
  vf most = (vf)x[0];
#pragma GCC unroll 16
  for (int r = 1; r < 16; ++r) most = max(most, (vf)x[r]);
  const vf old = load(rows->shift), before = load(rows->maximum), here = mul(most, set1(rate));
  const __mmask16 unset = _mm512_cmp_ps_mask(before, set1(-infinity()), _CMP_EQ_OQ);
  const __mmask16 some = _mm512_cmp_ps_mask(here, set1(LOWEST), _CMP_GE_OQ);
  const __mmask16 over = _mm512_cmp_ps_mask(_mm512_fmsub_ps(most, set1(rate), old), set1(1.0f), _CMP_GE_OQ);
  const __mmask16 moves = static_cast<__mmask16>((unset & some) | (~unset & over));
  const __mmask16 scaled = static_cast<__mmask16>(moves & ~unset);
  const vf now = _mm512_mask_add_ps(old, moves, here, set1(BIAS));
  store(rows->shift, now);
  store(rows->maximum, _mm512_mask_mov_ps(before, moves, here));
  rows->ready = static_cast<__mmask16>(~unset | moves) == 0xffff;
  if (!scaled || !rows->blocks) return;
  alignas(64) float alpha[SIDE];
  store(alpha, _mm512_mask_mov_ps(set1(1.0f), scaled, exp2_falling<5>(sub(old, now))));
  float *sums = reinterpret_cast<float *>(o);
  for (int i = 0; i < wide * SIDE; ++i) store(sums + i * 16, mul(load(sums + i * 16), set1(alpha[i % SIDE])));
}

// What is added to the scores of `keys` keys from an element of the mask on, in units of log 2.
FG_INLINE vf mask_lanes(const fg_attention_args *a, int64_t offset, int keys) {
  const vf lowest = set1(-1e38f), closed = set1(-infinity());  // as in mask_at
  if (a->mask_key == 1) {
    const char *from = static_cast<const char *>(a->mask);
    vf x;
    switch (a->mask_dtype) {
      case FG_BOOL: {
        const __mmask16 there = lanes_below(keys);
        const __m128i open = _mm_maskz_loadu_epi8(there, from + offset);
        return _mm512_maskz_mov_ps(_mm_mask_testn_epi8_mask(there, open, open), closed);
      }
      case FG_FLOAT32: x = load_n(reinterpret_cast<const float *>(from) + offset, keys); break;
      case FG_BFLOAT16: x = load_n(reinterpret_cast<const bf16 *>(from) + offset, keys); break;
      default: x = load_n(reinterpret_cast<const fp16 *>(from) + offset, keys);
    }
    return mul(set1(LOG2E), select_gt(x, closed, max(lowest, x), x));
  }
  float added[W] = {};
  for (int j = 0; j < keys; ++j) added[j] = LOG2E * mask_at(a, offset + j * a->mask_key);
  return load(added);
}

// S = rate S + mask, in units of log 2, for keys [k0, k0 + n) and the rows of q0 on.
inline void add_mask_to_rows(const Head &h, char *s, int64_t q0, int64_t k0, int n, float rate) {
  const fg_attention_args *a = h.a;
  const int64_t base = h.batch * a->mask_batch + h.head * a->mask_head, left = a->queries - q0;
  for (int r = 0; r < SIDE && r < left; ++r)
    for (int j = 0; j < n; j += W) {
      const int keys = n - j < W ? n - j : W;
      const vf added = mask_lanes(a, base + (q0 + r) * a->mask_row + (k0 + j) * a->mask_key, keys);
      float *at = reinterpret_cast<float *>(s + j / W * TILE + r * 64);
      store(at, fma(load(at), set1(rate), added));
    }
}

FG_INLINE bool rows_closed(const Head &h, int64_t q0, int64_t k0, int n) {  // to all of them
  return k0 >= last_open(h, q0 + SIDE - 1) || k0 + n <= first_open(h, q0);
}
FG_INLINE bool rows_limited(const Head &h, int64_t q0, int64_t k0, int n) {  // to some of them
  return k0 + n > last_open(h, q0) || k0 < first_open(h, q0 + SIDE - 1);
}

// Scores of keys that are closed to a row become -inf; past n too, where some are closed.
inline void close_in_rows(const Head &h, char *s, int units, int64_t q0, int64_t k0, int n) {
  for (int r = 0; r < SIDE; ++r) {
    int64_t first = first_open(h, q0 + r) - k0, last = last_open(h, q0 + r) - k0;
    last = last < n ? last : n;
    for (int j = 0; j < units * UNIT; j += W) {
      const int64_t from = first - j, to = last - j;
      const __mmask16 open = static_cast<__mmask16>((to <= 0 ? 0u : to >= W ? 0xffffu : (1u << to) - 1u) &
                                                    ~(from <= 0 ? 0u : from >= W ? 0xffffu : (1u << from) - 1u));
      _mm512_mask_store_ps(s + j / W * TILE + r * 64, static_cast<__mmask16>(~open), set1(-infinity()));
    }
  }
}

// The rows of the output: O[16][dim] divided by the sums in its column `dim`; zeros where a query attended nothing.
inline void write_rows(const Head &h, const char *o, const Rows *rows, const AmxShape &x, int64_t q0) {
  const fg_attention_args *a = h.a;
  const float *sums = reinterpret_cast<const float *>(o) + x.dim / 16 * (TILE / 4) + x.dim % 16;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  vf sum = _mm512_i32gather_ps(_mm512_slli_epi32(lane, 4), sums, 4);
  if (h.e.sink > -infinity()) {  // where it drowns the keys, the sum becomes infinite and the output 0
    const vf most = select_gt(load(rows->maximum), set1(-infinity()), load(rows->shift), set1(-infinity()));
    const vf sink = set1(h.e.sink * LOG2E), top = max(sink, most);
    sum = add(sum, div(exp2_falling<5>(sub(sink, top)), exp2_falling<5>(sub(most, top))));
  }
  alignas(64) float inverse[SIDE];
  store(inverse, select_gt(sum, set1(0.0f), div(set1(1.0f), sum), sum));  // keeps NaN
  bf16 *out = reinterpret_cast<bf16 *>(h.out) + q0 * a->out_row;
  const int64_t left = a->queries - q0;
  for (int r = 0; r < SIDE && r < left; ++r, out += a->out_row) {
    const float *at = reinterpret_cast<const float *>(o + r * 64);
    const vf by = set1(inverse[r]);
    for (int d = 0; d < x.dim; d += 32, at += 2 * TILE / 4) {
      const vf high = x.dim - d > 16 ? mul(load(at + TILE / 4), by) : set1(0.0f);
      _mm512_mask_storeu_epi16(out + d, halves_below(x.dim - d), (__m512i)_mm512_cvtne2ps_pbh(high, mul(load(at), by)));
    }
  }
}

}  // namespace
