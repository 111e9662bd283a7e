// The products of a few queries in bfloat16 on AMX tiles, where several heads share a key head.
//
// Keys are the left operand as they lie in memory, queries the right one, packed once: scores come out as S[key][query]
// and are turned.  A row of weights is a left operand as it lies.  Values are interleaved by pairs of keys, 32 keys at a
// time from the piece's first on, whatever blocks of a paged cache they lie in.
#pragma once
#include "tiles.h"

namespace {

// Registers 0: scores; 2 and 3: keys, or values; 4: queries; 5: weights; 6 and 7: sums of values.
struct TileSetting {
  explicit TileSetting(int rows) {
    TileConfig config = whole_tiles();
    config.rows[5] = config.rows[6] = config.rows[7] = static_cast<uint8_t>(rows);
    load_tiles(config);
  }
  TileSetting(const TileSetting &) = delete;
  TileSetting &operator=(const TileSetting &) = delete;
  ~TileSetting() { _tile_release(); }
};

struct TileFew : Bf16Few {
  using Setting = TileSetting;
  static constexpr int FEWEST = 8;   // heads over a key head; of fewer a single query is memory's anyway
  static constexpr int SPAN = 32;    // dims, or keys, of a tile's row
  static constexpr int TILE = 1024;  // bytes

  static int tall(int rows) { return rows < 8 ? 8 : (rows + 1) / 2 * 2; }  // room for queries packed as below
  static int groups(int) { return 1; }

  // Query m as column m of tiles [dim / 32] of pairs of dims.
  static void take_query(const bf16 *from, int dim, int m, char *to) {
    for (int d = 0; d < dim; ++d) memcpy(to + d / 2 * 64 + m * 4 + d % 2 * 2, from + d, sizeof *from);
  }

  // Scores of 16 keys, `step` elements apart, of which `count` are there: to[m * ROW + key].  What stands past them is
  // written later, or closed.
  static void score(const char *q, int rows, const bf16 *k, Ahead &ahead, int64_t step, int count, int dim, float *to) {
    alignas(64) bf16 edge[16][SPAN];
    alignas(64) float s[16 * 16];
    _tile_zero(0);
    for (int d = 0; d < dim; d += SPAN, q += TILE) {
      ahead.ask(count * 64);
      const bool whole = count == 16 && d + SPAN <= dim;
      for (int r = 0; !whole && r < 16; ++r)
        _mm512_store_si512(edge[r], _mm512_maskz_loadu_epi16(r < count ? halves_below(dim - d) : 0, k + r * step + d));
      written();
      _tile_loadd(4, q, 64);
      _tile_loadd(2, whole ? k + d : edge[0], whole ? 2 * step : 2 * SPAN);
      _tile_dpbf16ps(0, 2, 4);
    }
    _tile_stored(0, s, 64);
    written();
    __m512i x[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(s + r * 16);
    transpose(x);
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m)
      if (m < rows) _mm512_storeu_si512(to + m * ROW, x[m]);
  }

  static void scores(const char *q, int rows, const bf16 *k, Ahead &ahead, int64_t step, int count, int dim,
                     float *to) {
    Ahead own = ahead;
    for (int r = 0; r < count; r += 16)
      score(q, rows, k + r * step, own, step, count - r < 16 ? count - r : 16, dim, to + r);
    ahead = own;
  }
};

// The values of 32 keys of a head, interleaved by pairs of keys: tiles [dim / 32][half], as give() takes their sums.
struct Interleaved {
  const Pieces<TileFew> &x;
  alignas(64) char tiles[FEW_DIM * 64];

  explicit Interleaved(const Pieces<TileFew> &x) : x(x) {}

  // Pair i, its keys `near` and `far`; of one key where ALONE is set.
  template <bool ALONE, bool WHOLE>
  inline __attribute__((always_inline)) void pair(int i, const bf16 *near, const bf16 *far, Ahead &ahead) {
    char *to = tiles + i * 64;
    for (int d = 0; d < x.dim; d += 32, to += 2 * TileFew::TILE) {
      ahead.ask(2 * 64);
      const __mmask32 mask = WHOLE ? ~0u : halves_below(x.dim - d);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, near + d);
      const __m512i b = ALONE ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, far + d);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + TileFew::TILE, _mm512_unpackhi_epi16(a, b));
    }
  }

  // Keys [r, r + count) of the piece, zeros up to 32.
  template <bool WHOLE>
  void fill(int g, int r, int count) {
    const bf16 *v = x.v(g);
    for (int j = 0; j < count;) {
      const int run = run_of(x.item.of[0], x.k0 + r + j, count - j);
      const bf16 *at = v + x.v_at(r + j), *last = at + (run - 1) * x.a->v_row;
      Ahead ahead = x.behind(true, r + j, x.lead + x.pause, x.item.heads);
      if (!g) x.touch(true, r + j, run);
      for (int i = 0; i + 2 <= run; i += 2)
        pair<false, WHOLE>((j + i) / 2, at + i * x.a->v_row, at + (i + 1) * x.a->v_row, ahead);
      if (run % 2 && j + run < count) pair<false, WHOLE>((j + run) / 2, last, v + x.v_at(r + j + run), ahead);
      if (run % 2 && j + run == count) pair<true, WHOLE>((j + run) / 2, last, last, ahead);
      j += (run + 1) / 2 * 2;
    }
    for (char *to = tiles; to < tiles + (x.dim + 31) / 32 * 2 * TileFew::TILE; to += TileFew::TILE)
      for (int i = (count + 1) / 2; i < 16; ++i) _mm512_store_si512(to + i * 64, _mm512_setzero_si512());
  }
};

inline void values_of(Pieces<TileFew> &x) {
  Interleaved v(x);
  for (int r = 0; r < x.n; r += TileFew::SPAN) {
    const int count = x.n - r < TileFew::SPAN ? x.n - r : TileFew::SPAN;
    for (int g = 0; g < x.item.heads; ++g) {
      x.dim % 32 ? v.fill<false>(g, r, count) : v.fill<true>(g, r, count);
      written();
      _tile_loadd(5, reinterpret_cast<const bf16 *>(x.s + g * x.tall * ROW) + r, ROW * 4);
      float *o = x.o + g * x.tall * WIDE;
      const char *tile = v.tiles;
      for (int d = 0; d < x.dim; d += TileFew::SPAN, o += 2 * W, tile += 2 * TileFew::TILE) {
        _tile_loadd(6, o, WIDE * 4);
        _tile_loadd(7, o + W, WIDE * 4);
        _tile_loadd(2, tile, 64);
        _tile_loadd(3, tile + TileFew::TILE, 64);
        _tile_dpbf16ps(6, 5, 2);
        _tile_dpbf16ps(7, 5, 3);
        _tile_stored(6, o, WIDE * 4);
        _tile_stored(7, o + W, WIDE * 4);
      }
      written();
    }
  }
}

}  // namespace
