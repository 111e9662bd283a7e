// The products of queries of many heads over a key head in bfloat16 on AMX tiles: sixteen of them cost what one does.
//
// Keys are a left operand where they lie, queries the right one; scores are turned on their way to their rows.  Weights,
// rounded to bfloat16, are a left operand where they stand, and values lie in pairs of keys beside each other for the
// right one.  Such a pair is always the keys 2 i and 2 i + 1 of a piece, and a product takes 32 keys from a multiple of
// that on, whatever blocks of a paged cache they lie in.
#pragma once
#include "tiles.h"

namespace {

struct TileFew {
  using element = bf16;
  static constexpr bool TILES = true;
  static constexpr int ALIGN = 32;       // keys
  static constexpr int64_t LEAST = 8;    // heads over a key head that pay
  static constexpr int ROOM = 8;         // a key head's queries take dim / 32 KiB, its outputs as much at 8 rows
  static constexpr int SIDE = 16, TILE = 1024;
  static constexpr int APART = 2 * SIDE;  // elements of a line of a tile

  // Whatever the number of queries: a draft's bits are those of single steps.
  static bool serves(const fg_attention_args *a) { return a->heads / a->kv_heads >= LEAST && a->dim % APART == 0; }
  static int groups(int) { return 1; }

  // Query m's row in its column: pairs of dims one below the other.
  static void take_query(const bf16 *from, int dim, int m, char *to) {
    for (int d = 0; d < dim; d += 2) memcpy(to + (d / 2 * SIDE + m) * 4, from + d, 4);
  }

  static void begin_scores() { load_tiles(whole_tiles()); }
  // Tiles 0 to 4, weights and what they give, have a row for each query.
  static void begin_values(int rows) {
    TileConfig config = whole_tiles();
    for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<uint8_t>(rows);
    load_tiles(config);
  }
  static void end() { _tile_release(); }

  // to[m * ROW + r] = q[m] . k[r] for the rows m of a key head and `count` keys; what stands after them is written later.
  static void scores(const char *q, int rows, const bf16 *k, Ahead &ahead, int64_t stride, int count, int dim, float *to) {
    alignas(64) bf16 few[SIDE * FEW_DIM];
    for (int r = 0; r < count; r += SIDE, k += SIDE * stride) {
      const int left = count - r;
      if (left < SIDE) {  // a tile reads sixteen rows
        for (int i = 0; i < SIDE; ++i) memcpy(few + i * dim, k + (i < left ? i : left - 1) * stride, 2 * dim);
        score_tile(q, rows, few, ahead, dim, left, dim, to + r);
      } else {
        score_tile(q, rows, k, ahead, stride, SIDE, dim, to + r);
      }
    }
  }
  FG_INLINE void score_tile(const char *q, int rows, const bf16 *k, Ahead &ahead, int64_t stride, int keys, int dim,
                            float *to) {
    alignas(64) float sums[SIDE * SIDE];
    written();
    _tile_zero(0);
    for (int d = 0; d < dim; d += APART, q += TILE) {
      _tile_loadd(4, k + d, 2 * stride);
      _tile_loadd(5, q, 64);
      _tile_dpbf16ps(0, 4, 5);
      ahead.ask(keys * 64);
    }
    _tile_stored(0, sums, 64);
    written();
    __m512i x[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i) x[i] = _mm512_load_si512(sums + i * SIDE);
    transpose(x);
    for (int m = 0; m < rows; ++m) _mm512_storeu_si512(to + m * ROW, x[m]);
  }

  // The scores from s[r] on become BLOCK weights in bfloat16, in s as an array of those.  The sum of the rounded
  // weights divides what they weighed: their common error cancels.
  FG_INLINE vf weigh(float *s, int r, vf shift, vf sum) {
    const vf low = exp2_falling<5>(sub(load(s + r), shift)), high = exp2_falling<5>(sub(load(s + r + W), shift));
    const __m512i p = (__m512i)_mm512_cvtne2ps_pbh(high, low), odd = _mm512_set1_epi32(~0xffff);
    _mm512_storeu_si512(reinterpret_cast<bf16 *>(s) + r, p);
    return add(add(sum, (vf)_mm512_slli_epi32(p, 16)), (vf)_mm512_and_si512(p, odd));
  }

  // Two rows of values, pair by pair, to a line of each of dim / 16 tiles: in every two of them first those of dims 8 i
  // to 8 i + 3 of 32, then the others, as give() takes them.
  FG_INLINE void interleave(const bf16 *even, const bf16 *odd, Ahead &ahead, int dim, char *to) {
    for (int d = 0; d < dim; d += APART, to += 2 * TILE) {
      const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(a, b));
      ahead.ask(2 * 64);
    }
  }

  // o[dim / 16][row][16 dims] += the weights of 32 keys times their values, in so many tiles.
  static void add_values(const float *weights, int rows, const char *values, int dim, float *o) {
    written();
    _tile_loadd(4, weights, ROW * 4);
    for (int t = 0; t < dim / SIDE; t += 2, values += 2 * TILE, o += 2 * rows * SIDE) {
      float *next = o + rows * SIDE;
      _tile_loadd(5, values, 64);
      _tile_loadd(6, values + TILE, 64);
      _tile_loadd(0, o, 64);
      _tile_loadd(1, next, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      _tile_stored(0, o, 64);
      _tile_stored(1, next, 64);
    }
    written();
  }

  // Row m's values in order.
  static void give(const float *o, int m, int rows, int dim, float *to) {
    o += m * SIDE;
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int d = 0; d < dim; d += APART, o += 2 * rows * SIDE) {
      const __m512d x = _mm512_load_pd(o), y = _mm512_load_pd(o + rows * SIDE);
      store(to + d, _mm512_castpd_ps(_mm512_permutex2var_pd(x, low, y)));
      store(to + d + W, _mm512_castpd_ps(_mm512_permutex2var_pd(x, high, y)));
    }
  }
};

}  // namespace
