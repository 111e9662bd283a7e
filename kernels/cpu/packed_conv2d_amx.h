// A 3x3 convolution on AMX tiles: 32 pixels by 32 outputs at a time; of a doubled image the four of 2x2 taps that it
// is, one for each place in a pixel's 2 x 2.
//
// The pixels around a block of outputs are copied once, 32 channels of all of them together, zeros around the image: a
// tap's tile is then 16 lines in a row, wherever it lies.  The nine taps' tiles of 32 pixels overlap, so that a first
// cache has most of them, while the weight comes from the second.  Where an image is narrow, samples lie side by side,
// pixel by pixel, so that tiles are full.  Bias and residual are added between the products of the next pixels: vectors
// and tiles are different units.  Moments are taken there too, block by block: blocks are then of one sample, and
// depend on its size alone.
#pragma once
#include <cstdlib>

#include "channel_moments.h"
#include "panel.h"
#include "threads.h"
#include "tile_products.h"

namespace {

constexpr int64_t kChunk = 32;     // channels of a plane
constexpr int64_t kSteps = 90;     // taps of all planes that go into sums at a time, at the most
constexpr int64_t kPixels = 512;   // pixels of a block, about, and bytes of what is around them
constexpr int64_t kBytes = 1 << 20;
constexpr int64_t kAcross = 64;    // columns of a block, at the most
constexpr int64_t kGroups = 8;     // groups of outputs that pay for copying a block
constexpr int64_t kRoom = 8;       // rows of sums that are finished at a time

using Args = fg_packed_conv2d_args;

// How the images are cut into blocks.
struct Cut {
  int64_t height, width, times, side;  // of what tiles walk over; outputs a pixel of that and taps, each way
  int64_t shared, rows, columns, down, across, sets;  // shared: samples side by side, 1 << shift
  int64_t step;                                       // words from one pair of channels of the taps to the next
  int shift = 0;

  explicit Cut(const Args *a)
      : height((a->height - 1) / a->stride + 1), width((a->width - 1) / a->stride + 1), times(a->doubled ? 2 : 1),
        side(a->doubled ? 2 : 3), step(side * side * kSide) {
    if (a->stride == 1 && !a->moments)
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
  int64_t phases() const { return times * times; }
  int64_t at_once() const { return kSteps / (side * side); }  // planes
};

// A block of outputs and the pixels around them, [plane][row][column][sample][32 channels].
struct Around {
  const Args *a;
  const Cut &cut;
  int64_t sample, y, x, rows, columns;           // of the outputs: where they begin, how many there are
  int64_t wide, tall, plane, planes, tiles;      // pixels of a row, rows, words of a plane; tiles of a row of outputs
  uint32_t *pixels, *end;                        // end: the taps of the last plane, zeros behind its channels
  float *sums, *partial = nullptr;               // partial: of each group, where moments are taken (channel_moments.h)

  static int64_t pairs_of(const Cut &cut) {
    return (cut.rows * ((cut.columns * cut.shared + kTile - 1) / kTile) + 1) / 2;
  }

  static int64_t bytes_of(const Args *a, const Cut &cut) {
    const int64_t entries = (cut.columns * a->stride + kTile + 2) * cut.shared * (cut.rows * a->stride + 3) + 3 * kSide;
    const int64_t planes = (a->inputs + kChunk - 1) / kChunk;
    return 4 * (kTile * cut.step + (pairs_of(cut) + 1) * kSide * kSide + planes * entries * kTile);
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
    sums = reinterpret_cast<float *>(end + kTile * cut.step);
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

// What is still to be done with a pair's sums: those of outputs [o, ...) of tiles 2 pair and 2 pair + 1, of a phase.
struct Rest {
  const float *sums = nullptr;
  int64_t pair, o, phase;
};

// Sums of one pixel, with bias and residual; what is written of them.
FG_INLINE __m512i put(const Args *a, const float *sums, const vf (&bias)[kParts], int64_t at, int64_t left) {
  const bf16 *residual = static_cast<const bf16 *>(a->residual) + at;
  vf y[kParts];
#pragma GCC unroll 2
  for (int v = 0; v < kParts; ++v) {
    y[v] = add(load(sums + v * W), bias[v]);
    if (a->residual) y[v] = add(y[v], load_n(residual + v * W, columns(left, v)));
  }
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
  _mm512_mask_storeu_epi16(static_cast<bf16 *>(a->out) + at, halves_below(left), both);
  return both;
}

// A part of what rests: kRoom rows of sums.
template <bool MOMENTS>
FG_INLINE void finish(const Around &block, const Rest &rest, int64_t part) {
  const Args *a = block.a;
  const Cut &cut = block.cut;
  const int64_t in_tile = kTile / kRoom, t = 2 * rest.pair + part / in_tile, row = t / block.tiles;
  if (row >= block.rows) return;
  const int64_t left = a->outputs - rest.o, first = t % block.tiles * kTile + part % in_tile * kRoom;
  vf bias[kParts];
  get_bias(a->bias, a->bias_dtype, rest.o, left, bias);
  const float *sums = rest.sums + part * kRoom * kSide;
  float *own = MOMENTS ? block.partial + rest.o / kSide * kBand : nullptr;
  PairSums apart;
  const bool begun = t || part || rest.phase;
  if (MOMENTS && begun) apart.resume(own);
  const int64_t y = (block.y + row) * cut.times + rest.phase / 2;
  int64_t r = 0;
  for (; r < kRoom; ++r, sums += kSide) {
    const int64_t e = first + r, column = e >> cut.shift, sample = block.sample + (e & (cut.shared - 1));
    if (column >= block.columns) break;
    if (sample >= a->batch) continue;
    const int64_t x = (block.x + column) * cut.times + rest.phase % 2;
    const int64_t at = ((sample * cut.height * cut.times + y) * cut.width * cut.times + x) * a->outputs + rest.o;
    const __m512i both = left >= kSide ? put(a, sums, bias, at, kSide) : put(a, sums, bias, at, left);
    if (MOMENTS) apart.add(both);
  }
  if (!MOMENTS) return;
  if (begun) return apart.join(own);
  apart.settle(r);
  apart.leave(own);
}

FG_INLINE void finish(const Around &block, const Rest &rest, int64_t part) {
  block.partial ? finish<true>(block, rest, part) : finish<false>(block, rest, part);
}

// Planes [from, to) of a group's taps, for a phase.
struct Part {
  const uint32_t *taps;
  int64_t from, to, phase;
};

// sums (+)= a pair's pixels by a part of the taps.  The taps behind these, which may lie in memory, are asked for
// meanwhile: `lines` of them with each step.
template <int SIDE>
FG_INLINE void pair_by(const Around &block, int64_t pair, const Part &by, float *sums, Rest &rest) {
  constexpr int64_t step = SIDE * SIDE * kSide;
  const int64_t last = block.rows * block.tiles - 1, column = block.cut.shared * kTile;
  const int64_t row = 4 * kTile * block.a->stride, line = block.wide * kTile;
  const int64_t place = by.phase / 2 * line + by.phase % 2 * column;
  const uint32_t *one = block.tile(2 * pair) + place, *two = block.tile(2 * pair + 1 < last ? 2 * pair + 1 : last) + place;
  const int64_t lines = (2 * kTile + block.pairs() - 1) / block.pairs();
  const char *behind = reinterpret_cast<const char *>(by.taps + by.to * kTile * step);
  behind += pair * (by.to - by.from) * SIDE * SIDE * lines * 64;
  begin_sums<true>(sums, by.from > 0);
  int64_t part = 0;
  for (int64_t p = by.from; p < by.to; ++p) {
    const bool cut = p + 1 == block.planes && block.a->inputs % kChunk;
    const uint32_t *w = cut ? block.end : by.taps + p * kTile * step;
    for (int64_t down = 0; down < SIDE; ++down, w += SIDE * kSide) {
      if (rest.sums && part < kSide / kRoom) finish(block, rest, part++);
      const int64_t at = p * block.plane + down * line;
#pragma GCC unroll 3
      for (int64_t i = 0; i < SIDE; ++i)
        add_step<true, false>(one + at + i * column, two + at + i * column, row, w + i * kSide, 4 * step);
      for (int64_t i = 0; i < SIDE * lines; ++i, behind += 64) __builtin_prefetch(behind, 0, 2);
    }
  }
  end_sums<true>(sums);
  for (; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
  rest.sums = nullptr;
}

// All of the block by group g of the outputs for a phase, the `turn`-th of them.
template <int SIDE>
void block_by(const Around &block, int64_t g, int64_t phase, int64_t turn, Rest &rest) {
  const Args *a = block.a;
  const int64_t step = block.cut.step, at_once = block.cut.at_once(), channels = (a->inputs + 1) / 2;
  const int64_t pairs = block.pairs(), slots = block.planes > at_once ? pairs + 1 : 2;
  const uint32_t *taps = static_cast<const uint32_t *>(a->taps) + (g * block.cut.phases() + phase) * channels * step;
  if (a->inputs % kChunk) {
    const int64_t first = (block.planes - 1) * kTile;
    memset(block.end, 0, kTile * step * 4);
    memcpy(block.end, taps + first * step, (channels - first) * step * 4);
  }
  const int64_t parts = block.planes ? (block.planes + at_once - 1) / at_once : 1;
  for (int64_t part = 0; part < parts; ++part) {
    const Part by = {taps, block.planes * part / parts, block.planes * (part + 1) / parts, phase};
    for (int64_t pair = 0; pair < pairs; ++pair) {
      float *sums = block.sums + (turn * pairs + pair) % slots * kSide * kSide;
      pair_by<SIDE>(block, pair, by, sums, rest);
      if (by.to == block.planes) rest = {sums, pair, g * kSide, phase};
    }
  }
}

// Each sample's moments, of those of its blocks in order.
inline void merge(const Args *a, const Cut &cut, const float *partial) {
  const int64_t panels = (a->outputs + kSide - 1) / kSide, blocks = cut.down * cut.across;
  parallel_for(a->batch * panels, 1, [&](int64_t item) {
    const int64_t sample = item / panels, o = item % panels * kSide;
    double *mean = static_cast<double *>(a->moments) + sample * 2 * a->outputs + o;
    const auto pixels = [&](int64_t i) {
      const int64_t y = i / cut.across * cut.rows, x = i % cut.across * cut.columns;
      const int64_t rows = cut.height - y < cut.rows ? cut.height - y : cut.rows;
      const int64_t columns = cut.width - x < cut.columns ? cut.width - x : cut.columns;
      return rows * columns * cut.phases();
    };
    const float *own = partial + (sample * blocks * panels + o / kSide) * kBand;
    merge_bands<true>(own, panels * kBand, blocks, pixels, a->outputs - o, mean, mean + a->outputs);
    return 0;
  });
}

template <int SIDE>
int convolve(const Args *a, const Cut &cut, float *partial) {
  const int64_t panels = (a->outputs + kSide - 1) / kSide, blocks = cut.blocks(), threads = fg_threads();
  int64_t runs = blocks < 4 * threads ? (4 * threads + blocks - 1) / blocks : 1;
  runs = runs > (panels + kGroups - 1) / kGroups ? (panels + kGroups - 1) / kGroups : runs;
  const int64_t some = (panels + runs - 1) / runs, taps = SIDE * SIDE * cut.phases();
  runs = (panels + some - 1) / some;
  const int64_t grain = 1 + (1 << 21) / (cut.rows * cut.columns * cut.shared * some * kSide * (a->inputs * taps + 1));
  return parallel_for(blocks * runs, grain, [&](int64_t item) {
    void *memory = fg_scratch(static_cast<size_t>(Around::bytes_of(a, cut)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    Around block(a, cut, item % blocks, memory);
    if (partial) block.partial = partial + item % blocks * panels * kBand;
    const Tiles tiles;
    Rest rest;
    int64_t turn = 0;
    for (int64_t g = item / blocks * some; g < item / blocks * some + some && g < panels; ++g)
      for (int64_t phase = 0; phase < cut.phases(); ++phase) block_by<SIDE>(block, g, phase, turn++, rest);
    for (int64_t part = 0; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
    return static_cast<int>(FG_OK);
  });
}

inline int convolve(const Args *a) {
  const Cut cut(a);
  float *partial = nullptr;
  if (a->moments) {
    const int64_t floats = cut.blocks() * ((a->outputs + kSide - 1) / kSide) * kBand;
    partial = static_cast<float *>(std::malloc(static_cast<size_t>(floats) * sizeof(float)));
    if (!partial) return FG_NO_MEMORY;
  }
  const int code = a->doubled ? convolve<2>(a, cut, partial) : convolve<3>(a, cut, partial);
  if (partial && !code) merge(a, cut, partial);
  std::free(partial);
  return code;
}

}  // namespace
