// What stands between attention's two products on AMX tiles: scores S[query][key] become weights.
//
// Weights are exp2(score * rate - shift).  A row's shift is not its running maximum: it is BIAS above the maximum of the
// first keys that the row met, up to a whole number, and moves only where a weight reaches 2^LIMIT.  Any shift gives the
// same softmax, in floating point without loss.  So a block of keys needs no maximum before its exponentials; that no
// weight reached 2^LIMIT is one bit, looked at afterwards.
//
// While tiles are multiplied, a core has one unit for other multiplications and for shifts, not two: so exponentials are
// a multiply-add that rounds to counts of an octave, and a look into a table of how far 2^f is below 1 + f.  A row with a
// score that these do not serve, NaN or one beyond LIMIT after the shift moved, takes float32.  Whether its shift moves,
// and which way it takes, depends on its own scores alone.
#pragma once
#include "attention_amx.h"

namespace {

constexpr float LIMIT = -63.0f;  // half of what bfloat16's exponents reach: a count's uppermost bit
constexpr float BIAS = 72.0f;    // octaves: the largest weights may grow 2^9 times, and what is 2^-54 of them is not 0,
                                 // nor are their products with values from 2^-54 on
constexpr float OCTAVE = 512.0f;  // its counts
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer, its last bits

struct alignas(64) Rows {
  float shift[SIDE], maximum[SIDE];  // the maximum is what the shift was taken from; -inf before
  float base[SIDE];                  // what a score's counts are added to
  int64_t blocks;                    // of keys met so far
  bool ready;                        // all rows have a shift
};

// ROUND, the counts of a score of 0, so that bfloat16's exponent comes out, and half of what is cut off in the end.
FG_INLINE vf base_of(vf shift) { return fma(sub(set1(127.0f), shift), set1(OCTAVE), set1(ROUND + 2.0f)); }

FG_INLINE void reset(Rows *rows) {
  store(rows->shift, set1(0.0f));
  store(rows->base, base_of(set1(0.0f)));
  store(rows->maximum, set1(-infinity()));
  rows->blocks = 0;
  rows->ready = false;
}

// 2^t (1 + 2^-8 of the power of two below): cut to bfloat16 it is 2^t rounded, halves upwards.
FG_INLINE vf exp2_to_cut(vf t) {
  constexpr auto &c = PowerOfTwo<3>::terms;
  vf whole, f = fraction(t, whole), p = fma(set1(c[0]), f, set1(c[1]));
  p = fma(p, f, set1(c[2]));
  p = fma(p, f, set1(c[3] + 0.00390625f));
  return scaled(p, whole);
}

// Counts to take off for each 64th of an octave, so that what is left, cut to bfloat16, is nearest to 2^f: 1.78e-3 apart
// (rms), where rounding alone is 1.66e-3.  The first is 0: what is far below comes out as 0.
alignas(64) constexpr uint8_t BENDS[64] = {0,  4,  6,  8,  10, 12, 15, 16, 19, 20, 22, 24, 26, 28, 29, 31,  //
                                           32, 33, 35, 36, 37, 38, 39, 40, 41, 41, 42, 43, 43, 44, 44, 44,  //
                                           44, 45, 45, 45, 44, 44, 44, 43, 43, 42, 42, 41, 40, 39, 38, 37,  //
                                           35, 34, 33, 31, 29, 27, 25, 23, 21, 19, 17, 14, 11, 9,  6,  3};

// What scores came to: all counts, whose uppermost bits tell of weights that reached 2^LIMIT, and lanes without NaN, whose
// sign, which nothing settles, would make it a count.
struct Seen {
  __m512i counts = _mm512_setzero_si512();
  __mmask16 numbers = 0xffff;
  inline __attribute__((always_inline)) bool reached() const {
    return numbers != 0xffff || _mm512_test_epi32_mask(counts, _mm512_set1_epi32(static_cast<int>(0x80008000u))) != 0;
  }
};

// A row's counts for a unit of keys, from 0 to what 16 bits hold: four of the first 16 keys before four of the last.
FG_INLINE __m512i count(const char *s, vf factor, vf base, Seen &seen) {
  const float *at = reinterpret_cast<const float *>(s);
  const vf near = fma(load(at), factor, base), far = fma(load(at + TILE / 4), factor, base);
  seen.numbers = _mm512_mask_cmp_ps_mask(seen.numbers, near, far, _CMP_ORD_Q);
  const __m512i zero = (__m512i)set1(ROUND);
  return _mm512_packus_epi32(_mm512_sub_epi32((__m512i)near, zero), _mm512_sub_epi32((__m512i)far, zero));
}
FG_INLINE __m512i weight_of(__m512i counts, __m512i bends) {
  const __m512i bend = _mm512_maskz_permutexvar_epi8(0x5555555555555555u, _mm512_srli_epi16(counts, 3), bends);
  return _mm512_srli_epi16(_mm512_sub_epi16(counts, bend), 2);
}

// The weights of four rows and a unit of keys, in place of the first 16 keys' scores.
FG_INLINE void weigh(char *s, float rate, const float *base, Seen &seen) {
  const vf factor = set1(rate * OCTAVE);
  const __m512i bends = _mm512_load_si512(BENDS);
#pragma GCC unroll 2
  for (int r = 0; r < 4; r += 2, s += 128) {
    const __m512i one = count(s, factor, set1(base[r]), seen), two = count(s + 64, factor, set1(base[r + 1]), seen);
    seen.counts = _mm512_ternarylogic_epi32(seen.counts, one, two, 0xfe);
    _mm512_store_si512(s, weight_of(one, bends));
    _mm512_store_si512(s + 64, weight_of(two, bends));
  }
}

// The same by exp2_to_cut.
FG_INLINE __m512i weigh_exactly(const char *s, float rate, float shift) {
  const float *at = reinterpret_cast<const float *>(s);
  const __m512i near = (__m512i)exp2_to_cut(_mm512_fmsub_ps(load(at), set1(rate), set1(shift)));
  const __m512i far = (__m512i)exp2_to_cut(_mm512_fmsub_ps(load(at + TILE / 4), set1(rate), set1(shift)));
  return _mm512_packus_epi32(_mm512_srli_epi32(near, 16), _mm512_srli_epi32(far, 16));
}

// All rows, each exactly where counts do not serve it.
inline void weigh_rows(char *s, int units, float rate, const Rows *rows) {
  const __m512i bends = _mm512_load_si512(BENDS);
  for (int r = 0; r < SIDE; ++r, s += 64) {
    __m512i counts[4];
    Seen seen;
    for (int u = 0; u < units; ++u) {
      counts[u] = count(s + 2 * u * TILE, set1(rate * OCTAVE), set1(rows->base[r]), seen);
      seen.counts = _mm512_or_si512(seen.counts, counts[u]);
    }
    for (int u = 0; u < units; ++u) {
      char *at = s + 2 * u * TILE;
      _mm512_store_si512(at, seen.reached() ? weigh_exactly(at, rate, rows->shift[r]) : weight_of(counts[u], bends));
    }
  }
}

// Four rows and a unit at a time: PARTS for a unit, counted through a tile's units.
constexpr int PARTS = 4;
FG_INLINE void weigh_part(char *s, int part, float rate, const Rows *rows, Seen &seen) {
  const int row = part % PARTS * 4;
  written();
  weigh(s + part / PARTS * 2 * TILE + row * 64, rate, rows->base + row, seen);
  written();
}

// Moves the shifts that these scores move, and what O has so far with them: where a weight is so far beyond LIMIT that
// its counts, rounded, are too.
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
  const __mmask16 over = _mm512_cmp_ps_mask(_mm512_fmsub_ps(most, set1(rate), old), set1(LIMIT + 0.01f), _CMP_GE_OQ);
  const __mmask16 moves = static_cast<__mmask16>((unset & some) | (~unset & over));
  const __mmask16 scaled = static_cast<__mmask16>(moves & ~unset);
  const vf whole = _mm512_roundscale_ps(here, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  const vf now = _mm512_mask_add_ps(old, moves, whole, set1(BIAS));
  store(rows->shift, now);
  store(rows->base, base_of(now));
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
