// A tile of attention_int8 with VNNI: TQ queries over all keys of their head, a block of NB at a time.
//
// Scores of two keys are packed to 16 bits side by side, of four to bytes: within 128 bits stand four queries of the
// first key, then four of the next.  So a tile's weights end as words of four keys for each query, what the second
// product reads.
#pragma once
#include <type_traits>

#include "attention_int8_sides.h"
#include "attention_tile.h"

namespace {

constexpr int64_t SPAN = TQ;  // queries of an item

struct alignas(64) Tile {
  int32_t q[MOST_DIM / 4][TQ];     // words of four codes
  int32_t begin[TQ];               // of a score: -128 times the sum of the codes, and half of the shift's unit
  int16_t scores[NB / 2][2][32];   // (pair of keys, half of the queries, as packed)
  int32_t weights[NB / 4][TQ];
  int16_t top[2][32], factor[2][32], most[2][32], twice[2][32];  // as packed
  float rate[TQ], by[TQ];          // octaves of a score; what a code of q stands for
  int32_t sum[TQ];                 // of a block's weights
  float maximum[TQ], grow[TQ], add[TQ];
  bool far;                        // whether a score's unit is a step or more, of some query
  float o[MOST_DIM + 1][TQ];
};

// Rows [q0, q0 + rows) of q as codes; the others are zeros.
template <class T>
inline void pack_queries(const T *q, int64_t row, int rows, const Sizes &s, int shift, Tile *t) {
  alignas(64) int8_t codes[16][MOST_DIM];
  const int64_t padded = (s.dim + 63) / 64 * 64;
  for (int i = 0; i < TQ; i += 16) {
    for (int r = 0; r < 16; ++r) {
      Scaled found{0.0f, 0.0f};
      if (i + r < rows)
        found = quantize(q + (i + r) * row, s.dim, padded, codes[r]);
      else
        memset(codes[r], 0, static_cast<size_t>(padded));
      t->by[i + r] = found.scale;
      t->begin[i + r] = -128 * static_cast<int32_t>(found.sum) + (1 << shift >> 1);
    }
    for (int64_t d = 0; d < padded; d += 64) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(codes[r] + d);
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(t->q[d / 4 + r] + i, x[r]);
    }
  }
}

// Sums as GCC 12 keeps them in registers: without, it holds each of a loop twice, as two types of vector.
FG_INLINE void settle(__m512i (&acc)[8][2]) {
#pragma GCC unroll 8
  for (int m = 0; m < 8; ++m)
    for (int j = 0; j < 2; ++j) __asm__("" : "+v"(acc[m][j]));
}

// Packed scores of two keys, of which `there` are; the others lowest.
FG_INLINE __m512i without(__m512i two, int there) {
  const __m512i lowest = _mm512_set1_epi16(-32768);
  return there >= 2 ? two : there == 1 ? _mm512_mask_blend_epi16(0xf0f0f0f0u, two, lowest) : lowest;
}

// The shifted scores of `n` keys, up to whole eights, and their highest as packed; keys past n are lowest.
inline void scores(const uint8_t *k, int n, const Sizes &s, int shift, Tile *t) {
  const __m512i down = _mm512_set1_epi32(shift);
  const int32_t *words = reinterpret_cast<const int32_t *>(k);
  __m512i top[2] = {_mm512_set1_epi16(-32768), _mm512_set1_epi16(-32768)};
  auto eight = [&](int r, auto last) __attribute__((always_inline)) {
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m)
      for (int j = 0; j < 2; ++j) acc[m][j] = _mm512_load_si512(t->begin + j * 16);
    const int32_t *row = words + r * s.words;
    for (int64_t w = 0; w < s.words; ++w) {
      const __m512i q0 = _mm512_load_si512(t->q[w]), q1 = _mm512_load_si512(t->q[w] + 16);
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) {
        const __m512i one = _mm512_set1_epi32(row[m * s.words + w]);
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], one, q0);
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], one, q1);
      }
      settle(acc);
    }
#pragma GCC unroll 4
    for (int m = 0; m < 8; m += 2)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        __m512i two = _mm512_packs_epi32(_mm512_srav_epi32(acc[m][j], down), _mm512_srav_epi32(acc[m + 1][j], down));
        if (last) two = without(two, n - r - m);
        _mm512_store_si512(t->scores[(r + m) / 2][j], two);
        top[j] = _mm512_max_epi16(top[j], two);
      }
  };
  int r = 0;
  for (; r + 8 <= n; r += 8) eight(r, std::false_type());
  if (r < n) eight(r, std::true_type());
  for (int j = 0; j < 2; ++j)
    _mm512_store_si512(t->top[j], _mm512_max_epi16(top[j], _mm512_shuffle_epi32(top[j], _MM_PERM_BADC)));
}

// How the block's scores become weights, for a scale of its keys; what its sums and the tile's count for from here on.
inline void rates(float k_scale, float factor, Tile *t) {
  t->far = false;
  for (int j = 0; j < 2; ++j) {
    const vf rate = min(mul(mul(load(t->by + j * 16), set1(k_scale)), set1(factor)), set1(0x1p64f));
    const vf steps = mul(rate, set1(FINE));
    const vf exponent = min(max(add(_mm512_getexp_ps(steps), set1(1.0f)), set1(0.0f)), set1(15.0f));
    const vf whole = min(_mm512_scalef_ps(steps, sub(set1(15.0f), exponent)), set1(32767.0f));
    const __m512i f = _mm512_cvtps_epi32(whole), e = _mm512_cvtps_epi32(exponent);
    t->far |= _mm512_test_epi32_mask(e, e) != 0;
    _mm512_store_si512(t->factor[j], _mm512_packs_epi32(f, f));
    _mm512_store_si512(t->twice[j], _mm512_packs_epi32(e, e));
    _mm512_store_si512(t->most[j], _mm512_srlv_epi16(_mm512_set1_epi16(32767), _mm512_packs_epi32(e, e)));
    const __m512i packed = _mm512_load_si512(t->top[j]);
    const vf top = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_unpacklo_epi16(packed, packed), 16));
    const vf here = mul(top, rate), old = load(t->maximum + j * 16), now = max(here, old);
    store(t->maximum + j * 16, now);
    store(t->grow + j * 16, exp2_falling<5>(sub(old, now)));
    store(t->add + j * 16, exp2_falling<5>(sub(here, now)));
  }
}

// 32 packed scores to weights in [0, 255].
template <bool FAR>
FG_INLINE __m512i weigh(__m512i score, __m512i top, __m512i factor, const Tile *t, int j) {
  __m512i far = _mm512_subs_epi16(top, score);
  if (FAR) {
    far = _mm512_min_epi16(far, _mm512_load_si512(t->most[j]));
    far = _mm512_sllv_epi16(far, _mm512_load_si512(t->twice[j]));
  }
  const __m512i steps = _mm512_mulhrs_epi16(far, factor);
  const __m512i fraction = _mm512_permutexvar_epi16(steps, _mm512_load_si512(kFalling));  // by its low five bits
  return _mm512_mulhrs_epi16(fraction, _mm512_srlv_epi16(_mm512_set1_epi16(512), _mm512_srli_epi16(steps, 5)));
}

template <bool FAR>
inline void weigh_all(int n, Tile *t) {
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int j = 0; j < 2; ++j) {
    const __m512i top = _mm512_load_si512(t->top[j]), factor = _mm512_load_si512(t->factor[j]);
    __m512i sum = _mm512_setzero_si512();
    for (int g = 0; g < n; g += 4) {
      const __m512i near = weigh<FAR>(_mm512_load_si512(t->scores[g / 2][j]), top, factor, t, j);
      const __m512i next = weigh<FAR>(_mm512_load_si512(t->scores[g / 2 + 1][j]), top, factor, t, j);
      const __m512i four = _mm512_shuffle_epi8(_mm512_packus_epi16(near, next), turn);
      const uint32_t there = n - g < 4 ? 0x01010101u >> (4 - (n - g)) * 8 : 0x01010101u;
      sum = _mm512_dpbusd_epi32(sum, four, _mm512_set1_epi32(static_cast<int>(there)));
      _mm512_store_si512(t->weights[g / 4] + j * 16, four);
    }
    _mm512_store_si512(t->sum + j * 16, sum);
  }
}

// o = o grow + add (weights v), and the sum of the weights likewise, its last row.
inline void gather(const int8_t *v, int n, const Sizes &s, Tile *t) {
  const vf grow0 = load(t->grow), grow1 = load(t->grow + 16), add0 = load(t->add), add1 = load(t->add + 16);
  auto put = [&](float *o, __m512i a, __m512i b) __attribute__((always_inline)) {
    store(o, fma(_mm512_cvtepi32_ps(a), add0, mul(load(o), grow0)));
    store(o + 16, fma(_mm512_cvtepi32_ps(b), add1, mul(load(o + 16), grow1)));
  };
  const int32_t *words = reinterpret_cast<const int32_t *>(v);
  const int groups = (n + 3) / 4;
  for (int64_t d = 0; d < s.wide; d += 8) {
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
    for (int g = 0; g < groups; ++g) {
      const __m512i p0 = _mm512_load_si512(t->weights[g]), p1 = _mm512_load_si512(t->weights[g] + 16);
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) {
        const __m512i one = _mm512_set1_epi32(words[g * 8 + m]);
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], p0, one);
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], p1, one);
      }
      settle(acc);
    }
    words += NB / 4 * 8;
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) put(t->o[d + m], acc[m][0], acc[m][1]);
  }
  put(t->o[s.wide], _mm512_load_si512(t->sum), _mm512_load_si512(t->sum + 16));
}

// TQ queries of a head from q0 on.
template <class T>
void tile(const Head &h, const Sides &sides, const Sizes &s, int shift, float factor, int64_t q0) {
  Tile t;
  const int64_t row = h.a->q_row;
  const int rows = static_cast<int>(h.a->queries - q0 < TQ ? h.a->queries - q0 : TQ);
  pack_queries(reinterpret_cast<const T *>(h.q) + q0 * row, row, rows, s, shift, &t);
  memset(t.o, 0, static_cast<size_t>(s.wide + 1) * sizeof t.o[0]);
  for (int i = 0; i < TQ; ++i) t.maximum[i] = -infinity();
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int n = static_cast<int>(s.keys - block * NB < NB ? s.keys - block * NB : NB);
    scores(sides.k + block * NB * s.words * 4, n, s, shift, &t);
    rates(sides.k_scale[block], factor, &t);
    t.far ? weigh_all<true>(n, &t) : weigh_all<false>(n, &t);
    gather(sides.v + block * NB * s.wide, n, s, &t);
  }
  State state;
  for (int j = 0; j < TQ; j += 16) {
    store(state.sum + j, load(t.o[s.wide] + j));
    const vf bad = fma(load(t.by + j), set1(0.0f), set1(*sides.broken));
    for (int64_t d = 0; d < s.dim; ++d)  // before the division by the sum: NaN stays
      store(t.o[d] + j, add(mul(load(t.o[d] + j), set1(sides.v_scale[d])), bad));
  }
  write_out<T>(h, t.o[0], &state, q0);
}

}  // namespace
