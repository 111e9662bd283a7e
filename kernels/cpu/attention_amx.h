// The two products of attention's bfloat16 engine on AMX tiles: 16 x 16 float sums of 32-element bfloat16 rows.
#pragma once
#include "attention_bf16.h"
#include "tiles.h"

namespace {

struct AmxEngine : Bf16Pack {
  static void begin() {
    TileConfig config = whole_tiles();
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // to[32 rows or 16][TQ] += left[row][pair] . right[pair][query], pairs a multiple of 16.  Tiles 0-3 hold the sums.
  template <bool TWO>
  FG_INLINE void product(const pair_t *left, int64_t stride, const pair_t *right, int pairs, bool add_to, float *to) {
    const int row = TQ * 4;
    if (add_to) {
      _tile_loadd(0, to, row);
      _tile_loadd(1, to + 16, row);
      if (TWO) {
        _tile_loadd(2, to + 16 * TQ, row);
        _tile_loadd(3, to + 16 * TQ + 16, row);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int i = 0; i < pairs; i += 16) {
      _tile_loadd(4, left + i, stride * 4);
      _tile_loadd(6, right + i * TQ, row);
      _tile_loadd(7, right + i * TQ + 16, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, left + 16 * stride + i, stride * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, row);
    _tile_stored(1, to + 16, row);
    if (TWO) {
      _tile_stored(2, to + 16 * TQ, row);
      _tile_stored(3, to + 16 * TQ + 16, row);
    }
  }

  static void scores(const void *q, const void *k, int n, int dim, float *s) {
    const pair_t *left = static_cast<const pair_t *>(k), *right = static_cast<const pair_t *>(q);
    int pairs = pad32(dim) / 2, r = 0;
    for (; r + 16 < n; r += 32) product<true>(left + r * pairs, pairs, right, pairs, false, s + r * TQ);
    if (r < n) product<false>(left + r * pairs, pairs, right, pairs, false, s + r * TQ);
  }

  static void gather_all(const float *, const void *p, const void *v, int n, int dim, const State *state, bool first,
                         bool moved, float *o) {
    const pair_t *left = static_cast<const pair_t *>(v), *right = static_cast<const pair_t *>(p);
    int pairs = pad32(n) / 2, d = 0;
    rescale(o, (dim + 15) / 16 * 16, state, first, moved);
    for (; d + 16 < dim; d += 32) product<true>(left + d * VS, VS, right, pairs, true, o + d * TQ);
    if (d < dim) product<false>(left + d * VS, VS, right, pairs, true, o + d * TQ);
  }
};

}  // namespace
