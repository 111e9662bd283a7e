// Products of bfloat16 on AMX tiles: 32 rows by 32 columns of float32 sums, 32 columns of x, a step, at a time.
//
// A tile of x is 16 rows of 64 bytes, one step; a step of the weight is 16 pairs of its columns by 32 of its rows, two
// tiles side by side.  Sums are made in order: what comes out for a row does not depend on the other rows.
#pragma once
#include "abi.h"
#include "tiles.h"

namespace {

constexpr int64_t kTile = 16;                 // rows of a tile, words of a row
constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kSide = 2 * kTile;          // rows and columns of the sums

// Tiles 0 to 3 hold the sums, of four bytes, row by row; 4 and 5 x, 6 and 7 the weight.  TWO: of 32 rows, not 16.
template <bool TWO, class S>
FG_INLINE void begin_sums(const S *sums, bool add) {
  const int64_t row = kSide * 4;
  written();
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  _tile_loadd(0, sums, row);
  _tile_loadd(1, sums + kTile, row);
  if (TWO) {
    _tile_loadd(2, sums + kTile * kSide, row);
    _tile_loadd(3, sums + kTile * kSide + kTile, row);
  }
}

template <bool TWO, class S>
FG_INLINE void end_sums(S *sums) {
  const int64_t row = kSide * 4;
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + kTile, row);
  if (TWO) {
    _tile_stored(2, sums + kTile * kSide, row);
    _tile_stored(3, sums + kTile * kSide + kTile, row);
  }
}

// Adds one step: tiles `x` and `more`, rows `x_row` bytes apart, by a step of the weight, pairs `w_row` bytes apart.
// ONCE: x only passes through the first cache, so that the weight stays there.  All is loaded before it is multiplied:
// beside a busy neighbour on the core loads hardly overlap with products.
template <bool TWO, bool ONCE>
FG_INLINE void add_step(const uint32_t *x, const uint32_t *more, int64_t x_row, const uint32_t *w, int64_t w_row) {
  _tile_loadd(6, w, w_row);
  if (ONCE)
    _tile_stream_loadd(4, x, x_row);
  else
    _tile_loadd(4, x, x_row);
  _tile_loadd(7, w + kTile, w_row);
  if (TWO && ONCE) _tile_stream_loadd(5, more, x_row);
  if (TWO && !ONCE) _tile_loadd(5, more, x_row);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (TWO) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Rows of the output that a pair of tiles asks for while it is multiplied, `count` from element `at` on: all at once they
// would keep what it loads waiting.
struct Wanted {
  int64_t at, count, asked = 0;

  // Asks for those that are due once `done` of `steps` are done.
  template <class Tail, class A>
  inline __attribute__((always_inline)) void ask(const A *a, int64_t done, int64_t steps) {
    for (const int64_t due = count * done / steps; asked < due; ++asked) Tail::ahead(a, at + asked * a->out_features);
  }
};

// Tiles are set up while one of these lives; the CPU knows of none before and after.
struct Tiles {
  Tiles() { load_tiles(whole_tiles()); }
  ~Tiles() { _tile_release(); }
};

}  // namespace
