// The operands of attention's bfloat16 products on AMX tiles, and the products.
//
// Queries are rows here, keys columns: a tile of queries is a left operand as it lies in memory, scores come out as
// S[query][key], the weights of a row's keys are packed where they stand into the left operand of the second product,
// and the output needs no turning.  Only keys are turned, once a block.  Every operand is a row of whole tiles, 1 KiB
// each, so that no two rows of a tile share a cache set.
//
// V has one column more than the head dimension: ones, whose product with the weights is their sum.
#pragma once
#include "attention_tile.h"
#include "tiles.h"

namespace {

constexpr int SIDE = 16;      // queries of a tile,
constexpr int TILE = 1024;    // its bytes,
constexpr int UNIT = 32;      // and the keys whose weights fill one

struct AmxShape {
  int dim, deep, wide, units;  // head dimension; tiles along it of q and k; of v and o; units of a block of keys
  explicit AmxShape(int64_t d)
      : dim(static_cast<int>(d)), deep((dim + 31) / 32), wide(dim / 16 + 1), units(dim <= 64 ? 3 : dim <= 96 ? 2 : 4) {}
  int keys() const { return units * UNIT; }
};

// Tiles [dim / 32] of 16 rows of q, its signs flipped or all zeros as `sign` says.
inline void pack_queries(const bf16 *q, int64_t stride, int rows, const AmxShape &s, float sign, char *to) {
  const __m512i flip = _mm512_set1_epi16(static_cast<short>(sign < 0 ? 0x8000 : 0));
  for (int d = 0; d < s.deep; ++d) {
    const __mmask32 mask = sign == 0.0f ? 0 : halves_below(s.dim - 32 * d);
    for (int r = 0; r < SIDE; ++r) {
      __m512i x = _mm512_maskz_loadu_epi16(r < rows ? mask : 0, q + r * stride + 32 * d);
      _mm512_store_si512(to + d * TILE + r * 64, _mm512_xor_si512(x, flip));
    }
  }
}

// Tiles [key / 16][dim / 32] of pairs of dims, up to whole units.  What stands past n is the last key again: its
// weights do no harm, and V has zeros there.
inline void pack_keys(const bf16 *k, int64_t stride, int n, const AmxShape &s, char *to) {
  for (int j = 0; j < (n + UNIT - 1) / UNIT * UNIT; j += 16)
    for (int d = 0; d < s.deep; ++d, to += TILE) {
      const __mmask32 mask = halves_below(s.dim - 32 * d);
      __m512i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const int key = j + r < n ? j + r : n - 1;
        x[r] = _mm512_maskz_loadu_epi16(mask, k + key * stride + 32 * d);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 64, x[r]);
    }
}

// Tiles [dim / 16][unit] of pairs of keys in the order of the weights, four of a unit's first 16 keys before four of
// its last; zeros past n.  Column `dim` is ones.
inline void pack_values(const bf16 *v, int64_t stride, int n, const AmxShape &s, char *to) {
  for (int u = 0; u < s.units && u * UNIT < n; ++u)
    for (int c = 0; c < 16; ++c) {
      const int one = u * UNIT + c / 4 * 4 + c % 2 * 2 + c % 4 / 2 * 16, two = one + 1;
      const bf16 *low = v + one * stride, *high = low + stride;
      const __m512i ones = _mm512_set1_epi32((one < n ? 0x3f80 : 0) | (two < n ? 0x3f800000 : 0));
      char *row = to + u * TILE + c * 64;
      for (int d = 0; d < s.wide; ++d, row += s.units * TILE) {
        const int left = s.dim - 16 * d;
        const __mmask16 mask = lanes_below(left < 16 ? left : 16);
        const __m256i x = _mm256_maskz_loadu_epi16(one < n ? mask : 0, low + 16 * d);
        const __m256i y = _mm256_maskz_loadu_epi16(two < n ? mask : 0, high + 16 * d);
        const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16);
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(x), upper);
        const __mmask16 past = left < 16 ? static_cast<__mmask16>(1u << left) : 0;
        _mm512_store_si512(row, _mm512_mask_mov_epi32(pairs, past, ones));
      }
    }
}

// Up to four tiles of a left operand, `step` bytes apart, into registers 4 to 7, for score_tiles or value_tile.
FG_INLINE void hold(const char *left, int64_t step, int deep) {
  written();
  _tile_loadd(4, left, 64);
  if (deep > 1) _tile_loadd(5, left + step, 64);
  if (deep > 2) _tile_loadd(6, left + 2 * step, 64);
  if (deep > 3) _tile_loadd(7, left + 3 * step, 64);
}

// The scores of 16 keys for the queries held.  What the call before left in the other register is stored on the way:
// stored at once, it would keep what is behind it waiting.
#define FG_SCORES(sum, other)                                        \
  {                                                                  \
    _tile_zero(sum);                                                 \
    _tile_loadd(2, k, 64);                                           \
    _tile_dpbf16ps(sum, 4, 2);                                       \
    if (deep > 1) {                                                  \
      _tile_loadd(3, k + TILE, 64);                                  \
      _tile_dpbf16ps(sum, 5, 3);                                     \
    }                                                                \
    if (at > 0) _tile_stored(other, s - TILE, 64);                   \
    if (deep > 2) {                                                  \
      _tile_loadd(2, k + 2 * TILE, 64);                              \
      _tile_dpbf16ps(sum, 6, 2);                                     \
    }                                                                \
    if (deep > 3) {                                                  \
      _tile_loadd(3, k + 3 * TILE, 64);                              \
      _tile_dpbf16ps(sum, 7, 3);                                     \
    }                                                                \
  }

FG_INLINE void score_tile(const char *k, int at, int deep, char *s) {
  k += at * deep * TILE, s += at * TILE;
  if (at % 2) FG_SCORES(1, 0) else FG_SCORES(0, 1)
}
// What the last of an even number of calls left.
FG_INLINE void store_last(char *s, int tiles) { _tile_stored(1, s + (tiles - 1) * TILE, 64); }
#undef FG_SCORES

// O[16][16 dims] += the weights held . V.  What the call before left in the other register is stored on the way.
#define FG_VALUES(sum, other)                                        \
  {                                                                  \
    if (first)                                                       \
      _tile_zero(sum);                                               \
    else                                                             \
      _tile_loadd(sum, o, 64);                                       \
    _tile_loadd(2, v, 64);                                           \
    _tile_dpbf16ps(sum, 4, 2);                                       \
    if (units > 1) {                                                 \
      _tile_loadd(3, v + TILE, 64);                                  \
      _tile_dpbf16ps(sum, 5, 3);                                     \
    }                                                                \
    if (before) _tile_stored(other, o - TILE, 64);                   \
    if (units > 2) {                                                 \
      _tile_loadd(2, v + 2 * TILE, 64);                              \
      _tile_dpbf16ps(sum, 6, 2);                                     \
    }                                                                \
    if (units > 3) {                                                 \
      _tile_loadd(3, v + 3 * TILE, 64);                              \
      _tile_dpbf16ps(sum, 7, 3);                                     \
    }                                                                \
    if (last) _tile_stored(sum, o, 64);                              \
  }

// Tile `at` of the output's row of tiles; `wide` are called in order.
FG_INLINE void value_tile(const char *v, int at, int wide, int units, bool first, char *o) {
  const bool before = at > 0, last = at == wide - 1;
  if (at % 2) FG_VALUES(1, 0) else FG_VALUES(0, 1)
}
#undef FG_VALUES

// For heads that do not fit: two tiles of 16 queries at once, two of their results' columns.  Steps are in tiles: of
// the left operand from one set of queries to the next and from one tile to the next, of the right from one column to
// the next, of the result from one set of queries to the next.
struct Steps {
  int left, along, right, deep, to;
};
template <bool TWO>
FG_INLINE void square(const char *left, const char *right, const Steps &x, bool first, char *to) {
  char *at[4] = {to, to + TILE, to + x.to * TILE, to + (x.to + 1) * TILE};
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
    if (TWO) {
      _tile_zero(1);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, at[0], 64);
    _tile_loadd(2, at[2], 64);
    if (TWO) {
      _tile_loadd(1, at[1], 64);
      _tile_loadd(3, at[3], 64);
    }
  }
  for (int i = 0; i < x.deep; ++i, left += x.along * TILE, right += TILE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + x.left * TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (TWO) {
      _tile_loadd(7, right + x.right * TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, at[0], 64);
  _tile_stored(2, at[2], 64);
  if (TWO) {
    _tile_stored(1, at[1], 64);
    _tile_stored(3, at[3], 64);
  }
}

}  // namespace
