// Many rows of x by a weight in panels on AMX tiles; see packed_linear.h, whose tails it calls.
//
// Tiles of x are loaded where they lie, or of a copy where many panels go past a block of rows, which stays in the
// second-level cache; rows that make no whole tiles are always copied.  The tail of a pair of tiles is worked off between
// the products of the next pair: vectors and tiles are different units.  What it writes, and reads beside the sums, is
// asked for some rows with each step: all at once, it would keep the tiles of x waiting.
#pragma once
#include "tile_products.h"

namespace {

constexpr int64_t kTallest = 256;     // rows of x in a block, and bytes of them, at the most
constexpr int64_t kBytes = 1 << 20;
constexpr int64_t kMany = 20;         // panels for which rows of up to so many steps are copied
constexpr int64_t kShort = 40;
constexpr int64_t kPart = 18;         // steps of a panel at a time, or kWhole: the first cache holds them
constexpr int64_t kWhole = 20;
constexpr int64_t kHeld = 1 << 20;    // bytes of panels that the second cache holds beside a block
constexpr int64_t kQuarters = kSide / kRows;

// Two tiles of x, rows `row` bytes apart, and how many words a step is from the one before.
struct Pair {
  const uint32_t *x, *more;
  int64_t row, step;
};

// A block's rows, pairs of tiles of them that were copied, [pair][step][half of the rows], and its sums: a ring of
// `slots`.
template <class A>
struct Block {
  const A *a;
  int64_t first, last, steps, pairs, parts, slots;
  bool lies;  // whether whole pairs of tiles can be read where they lie
  uint32_t *x, *end;  // end: the last step of a panel, zeros behind its columns
  float *sums;

  static int64_t bytes_of(int64_t steps, int64_t pairs) {
    return 4 * ((pairs * steps + 1) * 2 * kTileWords + (pairs + 2) * kSide * kSide);
  }

  Block(const A *a, int64_t first, int64_t last, int64_t steps, int64_t panels, void *memory)
      : a(a), first(first), last(last), steps(steps), pairs((last - first + kSide - 1) / kSide),
        parts(steps > kWhole ? (steps + kPart - 1) / kPart : 1), slots(parts > 1 ? pairs + 1 : 2),
        end(static_cast<uint32_t *>(memory)) {
    sums = reinterpret_cast<float *>(end + 2 * kTileWords);
    x = reinterpret_cast<uint32_t *>(sums + slots * kSide * kSide);
    lies = (panels < kMany || steps > kShort) && !(a->width % 32) &&
           (a->x_outer == a->inner * a->x_inner || first / a->inner == (last - 1) / a->inner);
    for (int64_t t = lies ? (last - first) / kSide : 0; t < pairs; ++t) copy(t);
  }

  const bf16 *row_at(int64_t row) const { return row_of(a, row / a->inner, row % a->inner); }

  void copy(int64_t pair) {
    for (int64_t r = 0; r < kSide; ++r) {
      const int64_t at = first + pair * kSide + r;
      const bf16 *row = row_at(at < last ? at : first);
      uint32_t *to = x + pair * steps * 2 * kTileWords + r * kTile;
      for (int64_t s = 0; s < steps; ++s, to += 2 * kTileWords) {
        const __mmask32 there = halves_below(at < last ? a->width - 32 * s : 0);
        _mm512_store_si512(to, _mm512_maskz_loadu_epi16(there, row + 32 * s));
      }
    }
  }

  Pair pair(int64_t t) const {
    if (lies && first + (t + 1) * kSide <= last) {
      const bf16 *row = row_at(first + t * kSide);
      const auto words = [](const bf16 *at) { return reinterpret_cast<const uint32_t *>(at); };
      return {words(row), words(row + kTile * a->x_inner), 2 * a->x_inner, kTile};
    }
    const uint32_t *copied = x + t * steps * 2 * kTileWords;
    return {copied, copied + kTileWords, 4 * kTile, 2 * kTileWords};
  }
};

// Lines of the next panel that a pair asks for, so many with each step: weights come from memory.
struct Next {
  const char *at;
  int64_t lines;
};

// What is still to be done with a pair's sums.
struct Rest {
  const float *sums = nullptr;
  int64_t row, panel, rows;
};

// Rows [8 part, 8 part + 8) of what rests.
template <class Tail, class A>
FG_INLINE void finish(const A *a, const Rest &rest, int64_t part) {
  const int64_t from = part * kRows, column = rest.panel * Tail::COLUMNS, left = a->out_features - column;
  if (from >= rest.rows) return;
  Sums sums;
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kParts; ++i) sums[i] = load(rest.sums + from * kSide + i * W);
  const int64_t rows = rest.rows - from < kRows ? rest.rows - from : kRows;
  const int64_t at = (rest.row + from) * a->out_features + column;
  if (left >= Tail::COLUMNS)
    Tail::put(a, sums, static_cast<int>(rows), at, column, static_cast<int64_t>(Tail::COLUMNS));
  else
    Tail::put(a, sums, static_cast<int>(rows), at, column, left);
}

template <class Tail, class A>
FG_INLINE void finish_all(const A *a, Rest &rest) {
  for (int64_t part = 0; rest.sums && part < kQuarters; ++part) finish<Tail>(a, rest, part);
  rest.sums = nullptr;
}

// sums (+)= steps [from, to) of a pair of tiles by those of a panel.
template <class Tail, bool TWO, class A>
FG_INLINE void pair_by(const Block<A> &block, const Pair &pair, const uint32_t *panel, int64_t from, int64_t to,
                       Next next, Wanted wanted, float *sums, Rest &rest) {
  const bool cut = to == block.steps && block.a->width % 32;
  begin_sums<TWO>(sums, from > 0);
  for (int64_t quarter = 0, s = from; quarter < kQuarters; ++quarter) {
    if (rest.sums) finish<Tail>(block.a, rest, quarter);
    for (const int64_t until = from + (to - from) * (quarter + 1) / kQuarters; s < until; ++s) {
      const uint32_t *x = pair.x + s * pair.step, *w = cut && s + 1 == to ? block.end : panel + s * 2 * kTileWords;
      add_step<TWO, true>(x, pair.more + s * pair.step, pair.row, w, kSide * 4);
      for (int64_t i = 0; i < next.lines; ++i, next.at += 64) __builtin_prefetch(next.at, 0, 2);
      wanted.ask<Tail>(block.a, s + 1 - from, to - from);
    }
  }
  end_sums<TWO>(sums);
  rest.sums = nullptr;
}

// All of the block by panel p, the `turn`-th of them; `ask`: for the panel behind it.
template <class Tail, class A>
void block_by(const Block<A> &block, int64_t p, int64_t turn, bool ask, Rest &rest) {
  const A *a = block.a;
  const int64_t columns = (a->width + 1) / 2, steps = block.steps, parts = block.parts;
  const uint32_t *panel = static_cast<const uint32_t *>(a->panels) + p * columns * kSide;
  const char *behind = reinterpret_cast<const char *>(panel + columns * kSide);
  const int64_t lines = ask ? (2 * kTile + block.pairs - 1) / block.pairs : 0;
  if (a->width % 32) {
    memset(block.end, 0, 2 * kTileWords * 4);
    memcpy(block.end, panel + (steps - 1) * 2 * kTileWords, (columns - (steps - 1) * kTile) * kSide * 4);
  }
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = steps * part / parts, to = steps * (part + 1) / parts;
    for (int64_t t = 0; t < block.pairs; ++t) {
      const int64_t row = block.first + t * kSide, rows = block.last - row < kSide ? block.last - row : kSide;
      float *sums = block.sums + (turn * block.pairs + t) % block.slots * kSide * kSide;
      const Pair pair = block.pair(t);
      const Next next = {behind + (from * block.pairs + t * (to - from)) * lines * 64, lines};
      const Wanted wanted = {row * a->out_features + p * Tail::COLUMNS, part + 1 == parts ? rows : 0};
      rows > kTile ? pair_by<Tail, true>(block, pair, panel, from, to, next, wanted, sums, rest)
                   : pair_by<Tail, false>(block, pair, panel, from, to, next, wanted, sums, rest);
      if (part + 1 == parts) rest = {sums, row, p, rows};
    }
  }
}

template <class Tail, class A>
int product(const A *a) {
  const int64_t rows = a->outer * a->inner, threads = fg_threads(), steps = (a->width + 31) / 32;
  const int64_t panels = (a->out_features + Tail::COLUMNS - 1) / Tail::COLUMNS;
  int64_t tall = kBytes / (64 * steps + 1);
  tall = tall < kSide ? kSide : tall > kTallest ? kTallest : tall;
  int64_t blocks = (rows + tall - 1) / tall;
  tall = (rows + blocks - 1) / blocks;  // blocks of one size
  tall = (tall + kSide - 1) / kSide * kSide;
  blocks = (rows + tall - 1) / tall;
  int64_t groups = blocks < 4 * threads ? (4 * threads + blocks - 1) / blocks : 1;
  const int64_t some = groups > panels ? 1 : (panels + groups - 1) / groups;
  groups = (panels + some - 1) / some;
  const bool cold = blocks < 8 * threads || panels * kPanel * a->width * 2 > kHeld;
  const int64_t grain = 1 + kItem / (tall * some * kPanel * a->width + 1);
  return parallel_for(blocks * groups, grain, [&](int64_t item) {
    const int64_t first = item % blocks * tall, last = first + tall < rows ? first + tall : rows;
    void *memory = fg_scratch(Block<A>::bytes_of(steps, (last - first + kSide - 1) / kSide));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    const Block<A> block(a, first, last, steps, some, memory);
    const Tiles tiles;
    Rest rest;
    for (int64_t p = item / blocks * some, turn = 0; turn < some && p < panels; ++p, ++turn)
      block_by<Tail>(block, p, turn, cold && turn + 1 < some && p + 1 < panels, rest);
    finish_all<Tail>(a, rest);
    return static_cast<int>(FG_OK);
  });
}

}  // namespace
