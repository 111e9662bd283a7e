// A 3x3 convolution on AMX tiles: 32 pixels by 32 outputs at a time.
//
// The pixels around a block of outputs are copied once, 32 channels of all of them together, zeros around the image: a
// tap's tile is then 16 lines in a row, wherever it lies.  The nine taps' tiles of 32 pixels overlap, so that a first
// cache has most of them, while the weight comes from the second.  Where an image is narrow, samples lie side by side,
// pixel by pixel, so that tiles are full.  Bias and residual are added between the products of the next pixels: vectors
// and tiles are different units.
#pragma once
#include "panel.h"
#include "threads.h"
#include "tile_products.h"

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kChunk = 32;                // channels of a plane
constexpr int64_t kPlanes = 10;               // planes that go into sums at a time, at the most
constexpr int64_t kTapWords = kTaps * kSide;  // from one pair of channels of the taps to the next
constexpr int64_t kPixels = 512;              // outputs of a block, about, and bytes of what is around them
constexpr int64_t kBytes = 1 << 20;
constexpr int64_t kAcross = 64;               // columns of a block, at the most
constexpr int64_t kGroups = 8;                // groups of outputs that pay for copying a block
constexpr int64_t kRoom = 8;                  // rows of sums that are finished at a time

using Args = fg_packed_conv2d_args;

// How the images are cut into blocks.
struct Cut {
  int64_t height, width, shared, rows, columns, down, across, sets;  // shared: samples side by side, 1 << shift
  int shift = 0;

  explicit Cut(const Args *a) : height((a->height - 1) / a->stride + 1), width((a->width - 1) / a->stride + 1) {
    if (a->stride == 1)
      while (width << shift & (kTile - 1) && width << shift < 3 * kTile && 1 << shift < a->batch) ++shift;
    shared = 1 << shift;
    sets = (a->batch + shared - 1) / shared;
    across = (width + kAcross - 1) / kAcross;
    columns = (width + across - 1) / across;
    columns = across > 1 ? (columns + kTile - 1) / kTile * kTile : columns;
    across = (width + columns - 1) / columns;
    const int64_t line = (columns * a->stride + 2) * shared * 2 * a->inputs + 1;  // bytes of a row of pixels
    rows = kPixels / (columns * shared);
    rows = rows * a->stride + 2 > kBytes / line ? (kBytes / line - 2) / a->stride : rows;
    rows = rows < 1 ? 1 : rows > height ? height : rows;
    down = (height + rows - 1) / rows;
    rows = (height + down - 1) / down;  // blocks of one size
  }

  int64_t blocks() const { return sets * down * across; }
};

// A block of outputs and the pixels around them, [plane][row][column][sample][32 channels].
struct Around {
  const Args *a;
  const Cut &cut;
  int64_t sample, y, x, rows, columns;           // of the outputs: where they begin, how many there are
  int64_t wide, tall, plane, planes, tiles;      // pixels of a row, rows, words of a plane; tiles of a row of outputs
  uint32_t *pixels, *end;                        // end: the taps of the last plane, zeros behind its channels
  float *sums;

  static int64_t pairs_of(const Cut &cut) {
    return (cut.rows * ((cut.columns * cut.shared + kTile - 1) / kTile) + 1) / 2;
  }

  static int64_t bytes_of(const Args *a, const Cut &cut) {
    const int64_t entries = (cut.columns * a->stride + kTile + 2) * cut.shared * (cut.rows * a->stride + 3) + 3 * kSide;
    const int64_t planes = (a->inputs + kChunk - 1) / kChunk;
    return 4 * (kTile * kTapWords + (pairs_of(cut) + 1) * kSide * kSide + planes * entries * kTile);
  }

  Around(const Args *a, const Cut &cut, int64_t block, void *memory) : a(a), cut(cut) {
    const int64_t in_set = cut.down * cut.across, at = block % in_set;
    sample = block / in_set * cut.shared, y = at / cut.across * cut.rows, x = at % cut.across * cut.columns;
    rows = cut.height - y < cut.rows ? cut.height - y : cut.rows;
    columns = cut.width - x < cut.columns ? cut.width - x : cut.columns;
    tiles = (columns * cut.shared + kTile - 1) / kTile;
    wide = ((columns - 1) * a->stride + 3) * cut.shared, tall = (rows - 1) * a->stride + 3;
    planes = (a->inputs + kChunk - 1) / kChunk;
    plane = ((tall * wide + kTile * a->stride) | 1) * kTile;  // lines, an odd number; tiles may end behind the last row
    end = static_cast<uint32_t *>(memory);
    sums = reinterpret_cast<float *>(end + kTile * kTapWords);
    pixels = reinterpret_cast<uint32_t *>(sums + (pairs_of(cut) + 1) * kSide * kSide);
    for (int64_t i = 0; i < tall; ++i) copy_row(i);
    for (int64_t p = 0; p < planes; ++p)
      for (uint32_t *to = pixels + p * plane + tall * wide * kTile; to < pixels + (p + 1) * plane; to += kTile)
        _mm512_store_si512(to, _mm512_setzero_si512());
  }

  void copy_row(int64_t i) {
    const int64_t row = y * a->stride + i - 1, left = x * a->stride - 1;
    uint32_t *to = pixels + i * wide * kTile;
    for (int64_t j = 0; j < wide; ++j, to += kTile) {
      const int64_t n = sample + (j & (cut.shared - 1)), column = left + (j >> cut.shift);
      const bool is = row >= 0 && row < a->height && column >= 0 && column < a->width && n < a->batch;
      const int64_t pixel = is ? (n * a->height + row) * a->width + column : 0;
      const bf16 *from = static_cast<const bf16 *>(a->x) + pixel * a->inputs;
      for (int64_t p = 0; p < planes; ++p) {
        const __mmask32 there = halves_below(is ? a->inputs - p * kChunk : 0);
        _mm512_store_si512(to + p * plane, _mm512_maskz_loadu_epi16(there, from + p * kChunk));
      }
    }
  }

  int64_t pairs() const { return (rows * tiles + 1) / 2; }

  // Where tile t's pixels for the first tap lie.
  const uint32_t *tile(int64_t t) const {
    return pixels + (t / tiles * wide + t % tiles * kTile) * a->stride * kTile;
  }
};

// What is still to be done with a pair's sums: those of outputs [o, ...) of tiles 2 pair and 2 pair + 1.
struct Rest {
  const float *sums = nullptr;
  int64_t pair, o;
};

// Sums of one pixel, with bias and residual.
FG_INLINE void put(const Args *a, const float *sums, const vf (&bias)[kParts], int64_t at, int64_t left) {
  const bf16 *residual = static_cast<const bf16 *>(a->residual) + at;
  vf y[kParts];
#pragma GCC unroll 2
  for (int v = 0; v < kParts; ++v) {
    y[v] = add(load(sums + v * W), bias[v]);
    if (a->residual) y[v] = add(y[v], load_n(residual + v * W, columns(left, v)));
  }
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
  _mm512_mask_storeu_epi16(static_cast<bf16 *>(a->out) + at, halves_below(left), both);
}

// A part of what rests: kRoom rows of sums.
FG_INLINE void finish(const Around &block, const Rest &rest, int64_t part) {
  const Args *a = block.a;
  const int64_t in_tile = kTile / kRoom, t = 2 * rest.pair + part / in_tile, row = t / block.tiles;
  if (row >= block.rows) return;
  const int64_t left = a->outputs - rest.o, first = t % block.tiles * kTile + part % in_tile * kRoom;
  vf bias[kParts];
  get_bias(a->bias, a->bias_dtype, rest.o, left, bias);
  const float *sums = rest.sums + part * kRoom * kSide;
  for (int64_t r = 0; r < kRoom; ++r, sums += kSide) {
    const int64_t e = first + r, column = e >> block.cut.shift, sample = block.sample + (e & (block.cut.shared - 1));
    if (column >= block.columns) return;
    if (sample >= a->batch) continue;
    const int64_t pixel = (sample * block.cut.height + block.y + row) * block.cut.width + block.x + column;
    if (left >= kSide)
      put(a, sums, bias, pixel * a->outputs + rest.o, kSide);
    else
      put(a, sums, bias, pixel * a->outputs + rest.o, left);
  }
}

// sums (+)= a pair's pixels by planes [from, to) of the taps of a group.  The taps behind these, which may lie in
// memory, are asked for meanwhile: `lines` of them with each step.
FG_INLINE void pair_by(const Around &block, int64_t pair, const uint32_t *taps, int64_t from, int64_t to, float *sums,
                       Rest &rest) {
  const int64_t last = block.rows * block.tiles - 1, column = block.cut.shared * kTile;
  const int64_t row = 4 * kTile * block.a->stride;
  const uint32_t *one = block.tile(2 * pair), *two = block.tile(2 * pair + 1 < last ? 2 * pair + 1 : last);
  const int64_t lines = (2 * kTile + block.pairs() - 1) / block.pairs();
  const char *behind = reinterpret_cast<const char *>(taps + to * kTile * kTapWords);
  behind += pair * (to - from) * kTaps * lines * 64;
  begin_sums<true>(sums, from > 0);
  int64_t part = 0;
  for (int64_t p = from; p < to; ++p) {
    const bool cut = p + 1 == block.planes && block.a->inputs % kChunk;
    const uint32_t *w = cut ? block.end : taps + p * kTile * kTapWords;
    for (int64_t down = 0; down < 3; ++down, w += 3 * kSide) {
      if (rest.sums && part < kSide / kRoom) finish(block, rest, part++);
      const int64_t at = p * block.plane + down * block.wide * kTile;
#pragma GCC unroll 3
      for (int64_t i = 0; i < 3; ++i)
        add_step<true, false>(one + at + i * column, two + at + i * column, row, w + i * kSide, 4 * kTapWords);
      for (int64_t i = 0; i < 3 * lines; ++i, behind += 64) __builtin_prefetch(behind, 0, 2);
    }
  }
  end_sums<true>(sums);
  for (; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
  rest.sums = nullptr;
}

// All of the block by group g of the outputs, the `turn`-th of them.
inline void block_by(const Around &block, int64_t g, int64_t turn, Rest &rest) {
  const Args *a = block.a;
  const int64_t pairs = block.pairs(), slots = block.planes > kPlanes ? pairs + 1 : 2, channels = (a->inputs + 1) / 2;
  const uint32_t *taps = static_cast<const uint32_t *>(a->taps) + g * channels * kTapWords;
  if (a->inputs % kChunk) {
    const int64_t first = (block.planes - 1) * kTile;
    memset(block.end, 0, kTile * kTapWords * 4);
    memcpy(block.end, taps + first * kTapWords, (channels - first) * kTapWords * 4);
  }
  const int64_t parts = block.planes ? (block.planes + kPlanes - 1) / kPlanes : 1;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = block.planes * part / parts, to = block.planes * (part + 1) / parts;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      float *sums = block.sums + (turn * pairs + pair) % slots * kSide * kSide;
      pair_by(block, pair, taps, from, to, sums, rest);
      if (to == block.planes) rest = {sums, pair, g * kSide};
    }
  }
}

inline int convolve(const Args *a) {
  const Cut cut(a);
  const int64_t panels = (a->outputs + kSide - 1) / kSide, blocks = cut.blocks(), threads = fg_threads();
  int64_t runs = blocks < 4 * threads ? (4 * threads + blocks - 1) / blocks : 1;
  runs = runs > (panels + kGroups - 1) / kGroups ? (panels + kGroups - 1) / kGroups : runs;
  const int64_t some = (panels + runs - 1) / runs;
  runs = (panels + some - 1) / some;
  const int64_t grain = 1 + (1 << 21) / (cut.rows * cut.columns * cut.shared * some * kSide * (a->inputs * kTaps + 1));
  return parallel_for(blocks * runs, grain, [&](int64_t item) {
    void *memory = fg_scratch(static_cast<size_t>(Around::bytes_of(a, cut)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    const Around block(a, cut, item % blocks, memory);
    const Tiles tiles;
    Rest rest;
    for (int64_t g = item / blocks * some, turn = 0; turn < some && g < panels; ++g, ++turn)
      block_by(block, g, turn, rest);
    for (int64_t part = 0; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
    return static_cast<int>(FG_OK);
  });
}

}  // namespace
