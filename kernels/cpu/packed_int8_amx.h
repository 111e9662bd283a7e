// Many rows of codes by an int8 weight in panels on AMX tiles; see packed_int8.h, whose tails it calls.
//
// As packed_linear_amx.h: 32 rows by 32 columns of sums at a time, a block of rows of codes in the second-level cache
// while the panels go past it, the tail of a pair of tiles between the products of the next.  A block's codes are made
// where it begins; of few blocks, whose panels are shared out, they are made for all threads first.
#pragma once
#include "tile_products.h"

namespace {

constexpr int64_t kTallest = 256;    // rows of x in a block, and bytes of their codes, at the most
constexpr int64_t kLarge = 1 << 20;  // bytes of a weight up to which half as many rows do: a cache holds it
constexpr int64_t kBytes = 3 << 19;
constexpr int64_t kPart = 18;        // steps of a panel at a time: the first cache holds them
constexpr int64_t kHeld = 1 << 20;   // bytes of panels that the second cache holds beside a block
constexpr int64_t kQuarters = kSide / kRows, kSlots = kTallest / kSide + 1;

// Adds one step of codes: tiles `x` and `more`, rows `row` bytes apart, by 64 columns of a panel; all is loaded first, as
// tile_products.h has it.
template <bool TWO>
FG_INLINE void add_codes(const int8_t *x, const int8_t *more, int64_t row, const int8_t *panel) {
  _tile_loadd(6, panel, kPanel * 4);
  _tile_stream_loadd(4, x, row);
  _tile_loadd(7, panel + kTile * 4, kPanel * 4);
  if (TWO) _tile_stream_loadd(5, more, row);
  _tile_dpbssd(0, 4, 6);
  _tile_dpbssd(1, 4, 7);
  if (TWO) {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

// What is still to be done with a pair's sums.
struct Rest {
  const float *sums = nullptr;  // bits of int32
  const float *scale;
  int64_t row, panel, rows;
};

// Rows [8 part, 8 part + 8) of what rests.
template <class Tail, class A>
FG_INLINE void finish(const A *a, const Rest &rest, int64_t part) {
  const int64_t from = part * kRows, column = rest.panel * Tail::COLUMNS, left = a->out_features - column;
  if (from >= rest.rows) return;
  Sums sums;
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kParts; ++i) sums[i] = to_float(_mm512_load_si512(rest.sums + from * kSide + i * W));
  const int rows = static_cast<int>(rest.rows - from < kRows ? rest.rows - from : kRows);
  const int64_t at = (rest.row + from) * a->out_features + column;
  if (left >= Tail::COLUMNS)
    Tail::put(a, sums, rest.scale + from, rows, at, column, static_cast<int64_t>(Tail::COLUMNS));
  else
    Tail::put(a, sums, rest.scale + from, rows, at, column, left);
}

// Lines of the next panel that a pair asks for, so many with each step: weights come from memory.
struct Next {
  const int8_t *at;
  int64_t lines;
};

// sums (+)= steps [from, to) of a pair of tiles by those of a panel.
template <class Tail, bool TWO, class A>
FG_INLINE void pair_by(const A *a, const int8_t *x, int64_t row, const int8_t *panel, int64_t from, int64_t to,
                       Next next, Wanted wanted, float *sums, Rest &rest) {
  begin_sums<TWO>(sums, from > 0);
  for (int64_t quarter = 0, s = from; quarter < kQuarters; ++quarter) {
    if (rest.sums) finish<Tail>(a, rest, quarter);
    for (const int64_t until = from + (to - from) * (quarter + 1) / kQuarters; s < until; ++s) {
      add_codes<TWO>(x + s * kStep, x + kTile * row + s * kStep, row, panel + s * kStep * kPanel);
      for (int64_t i = 0; i < next.lines; ++i, next.at += 64) __builtin_prefetch(next.at, 0, 2);
      wanted.ask<Tail>(a, s + 1 - from, to - from);
    }
  }
  end_sums<TWO>(sums);
  rest.sums = nullptr;
}

// Rows [first, last), in `coded`, by panels [p, end); `ask`: for each panel during the one before.
template <class Tail, class A>
int block_by(const A *a, const Coded &coded, int64_t first, int64_t last, int64_t p, int64_t end, bool ask) {
  alignas(64) float ring[kSlots][kSide * kSide];
  const int64_t row = coded.stride, steps = row / kStep - 1, pairs = (last - first + kSide - 1) / kSide;
  const int64_t parts = steps ? (steps + kPart - 1) / kPart : 1, slots = parts > 1 ? pairs + 1 : 2;
  const int8_t *codes = coded.codes + (first - coded.first) * row;
  const Tiles tiles;
  Rest rest;
  for (int64_t slot = 0; p < end; ++p)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = steps * part / parts, to = steps * (part + 1) / parts;
      const int8_t *panel = static_cast<const int8_t *>(a->panels) + p * steps * kStep * kPanel;
      const int64_t lines = ask && p + 1 < end ? (2 * kTile + pairs - 1) / pairs : 0;
      for (int64_t t = 0; t < pairs; ++t) {
        const int64_t m = first + t * kSide, rows = last - m < kSide ? last - m : kSide;
        float *sums = ring[(slot + t) % slots];
        const Wanted wanted = {m * a->out_features + p * Tail::COLUMNS, part + 1 == parts ? rows : 0};
        const Next next = {panel + steps * kStep * kPanel + (from * pairs + t * (to - from)) * lines * 64, lines};
        rows > kTile ? pair_by<Tail, true>(a, codes + t * kSide * row, row, panel, from, to, next, wanted, sums, rest)
                     : pair_by<Tail, false>(a, codes + t * kSide * row, row, panel, from, to, next, wanted, sums, rest);
        if (part + 1 == parts) rest = {sums, coded.scale + m - coded.first, m, p, rows};
      }
      if (part + 1 == parts) slot = (slot + pairs) % slots;
    }
  for (int64_t part = 0; rest.sums && part < kQuarters; ++part) finish<Tail>(a, rest, part);
  return FG_OK;
}

template <class Tail, class A>
int product(const A *a) {
  using T = typename Tail::Element;
  const int64_t rows = a->outer * a->inner, threads = fg_threads(), stride = stride_of(a->width);
  const int64_t panels = (a->out_features + Tail::COLUMNS - 1) / Tail::COLUMNS;
  const int64_t tallest = panels * kPanel * stride > kLarge ? kTallest : kTallest / 2;
  int64_t tall = kBytes / stride;
  tall = tall < kSide ? kSide : tall > tallest ? tallest : tall;
  int64_t blocks = (rows + tall - 1) / tall;
  tall = ((rows + blocks - 1) / blocks + kSide - 1) / kSide * kSide;  // blocks of one size
  blocks = (rows + tall - 1) / tall;
  int64_t groups = blocks < 4 * threads ? (4 * threads + blocks - 1) / blocks : 1;
  const int64_t some = groups > panels ? 1 : (panels + groups - 1) / groups;
  groups = (panels + some - 1) / some;
  const int64_t grain = 1 + kItem / (tall * some * kPanel * a->width + 1);
  const bool cold = blocks < 8 * threads || panels * kPanel * stride > kHeld;
  Coded all = {};
  if (groups > 1) {
    void *memory = fg_scratch(static_cast<size_t>(bytes_of(rows, stride)));
    if (!memory) return FG_NO_MEMORY;
    all = coded_at(memory, rows, stride, 0);
    parallel_for((rows + kTile - 1) / kTile, 1 + (1 << 15) / (a->width * kTile + 1), [&](int64_t item) {
      quantize_rows<T>(a, item * kTile, (item + 1) * kTile < rows ? (item + 1) * kTile : rows, all);
      return 0;
    });
  }
  return parallel_for(blocks * groups, grain, [&](int64_t item) {
    const int64_t first = item % blocks * tall, last = first + tall < rows ? first + tall : rows;
    const int64_t p = item / blocks * some, end = p + some < panels ? p + some : panels;
    if (all.codes) return block_by<Tail>(a, all, first, last, p, end, cold);
    void *memory = fg_scratch(static_cast<size_t>(bytes_of(tall, stride)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    const Coded coded = coded_at(memory, tall, stride, first);
    quantize_rows<T>(a, first, last, coded);
    return block_by<Tail>(a, coded, first, last, p, end, cold);
  });
}

}  // namespace
