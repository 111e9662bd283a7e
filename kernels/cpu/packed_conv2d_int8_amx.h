// A 3x3 convolution in int8 on AMX tiles: 32 pixels by 32 outputs at a time.
//
// The codes of all pixels are made first, in planes of 64 channels with the code of zero around the images: a tap's tile
// is then 16 lines in a row, wherever it lies.  Of stride 2 even columns lie before the odd ones, and one that is doubled
// is four convolutions, one for each place in a pixel's 2 x 2, whose taps read the same pixels more than once: both are
// nothing but other offsets of the nine taps.  Where an image is narrow, samples lie side by side, pixel by pixel, so
// that tiles are full.  Sums begin with what the zero point takes off them, and go out between the next products.
#pragma once
#include "image_codes.h"
#include "panel.h"
#include "tile_products.h"

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kChunk = 64;                        // channels of a plane, bytes of a line
constexpr int64_t kTapBytes = kTile * kSide * 4;      // 16 words of channels by 32 outputs
constexpr int64_t kPlaneTaps = kTaps * kTapBytes;
constexpr int64_t kPixels = 512;                      // outputs of a block, about, and bytes of what is around them
constexpr int64_t kBytes = 1 << 20;
constexpr int64_t kAcross = 64;                       // columns of a block, at the most
constexpr int64_t kItems = 8;                         // a thread, at the least, where groups of outputs can be shared out
constexpr int64_t kRoom = 8;                          // rows of sums that are finished at a time

using Args = fg_packed_conv2d_int8_args;

FG_INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// How x lies in planes, [set of samples][plane][row][column][sample][64 channels], and is cut into blocks.
struct Cut {
  int64_t height, width, shared = 1, sets;             // of what tiles walk over; samples side by side, 1 << shift
  int64_t half, wide, tall, plane, planes, set;        // columns of a parity, lines of a row, rows; lines of a plane; of a set
  int64_t rows, columns, down, across, phases;
  int64_t offsets[4][kTaps];                           // of each phase: the taps' lines
  int shift = 0;

  explicit Cut(const Args *a) : height((a->height - 1) / a->stride + 1), width((a->width - 1) / a->stride + 1) {
    while (width << shift & (kTile - 1) && width << shift < 3 * kTile && 1 << shift < a->batch) ++shift;
    shared = 1 << shift, sets = up(a->batch, shared);
    half = up(a->width + 2, a->stride);
    wide = half * a->stride * shared, tall = a->height + 2;
    plane = (tall * wide) | 1, planes = up(a->inputs, kChunk), set = planes * plane;
    phases = a->doubled ? 4 : 1;
    for (int64_t p = 0; p < phases; ++p)
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t i = tap / 3, j = tap % 3;
        offsets[p][tap] = a->doubled ? ((p / 2 + i + 1) / 2 * wide + (p % 2 + j + 1) / 2 * shared) : i * wide + at(a, j);
      }
    block(a);
  }

  // Where column c of those with borders lies.
  int64_t at(const Args *a, int64_t c) const { return (a->stride == 1 ? c : c % 2 * half + c / 2) * shared; }

  void block(const Args *a) {
    across = up(width, kAcross);
    columns = up(width, across);
    columns = across > 1 ? up(columns, kTile) * kTile : columns;
    across = up(width, columns);
    const int64_t line = (columns * a->stride + 2) * shared * planes * kChunk;  // bytes of a row of pixels
    rows = kPixels / (columns * shared);
    rows = rows * a->stride + 2 > kBytes / line ? (kBytes / line - 2) / a->stride : rows;
    rows = rows < 2 ? 2 : rows > height ? height : rows;
    down = up(height, rows);
    rows = up(height, down);
    rows = down > 1 ? up(rows, 2) * 2 : rows;  // tiles are taken in pairs
    down = up(height, rows);
  }

  int64_t blocks() const { return sets * down * across; }
  int64_t bytes() const { return (sets * set + kTile) * kChunk; }
};

template <class T>
struct Job {
  const Args *a;
  const Cut &cut;
  uint8_t *pixels;
  const Coding *codings;  // of the samples

  // Row r of a set, borders among them.
  void code_row(int64_t s, int64_t r) const {
    for (int64_t c = 0; c < a->width + 2; ++c)
      for (int64_t i = 0; i < cut.shared && s * cut.shared + i < a->batch; ++i) {
        const int64_t n = s * cut.shared + i;
        uint8_t *to = pixels + (s * cut.set + r * cut.wide + cut.at(a, c) + i) * kChunk;
        const __m512i zero = _mm512_set1_epi32(static_cast<int>(codings[n].zero));
        if (r < 1 || r > a->height || c < 1 || c > a->width) {
          const __m512i border = _mm512_set1_epi8(static_cast<char>(codings[n].zero));
          for (int64_t p = 0; p < cut.planes; ++p, to += cut.plane * kChunk) _mm512_store_si512(to, border);
          continue;
        }
        const vf rate = set1(codings[n].rate);
        const T *from = static_cast<const T *>(a->x) + ((n * a->height + r - 1) * a->width + c - 1) * a->inputs;
        for (int64_t p = 0; p < cut.planes; ++p, to += cut.plane * kChunk)
          _mm512_store_si512(to, codes_of(from + p * kChunk, a->inputs - p * kChunk, rate, zero));
      }
  }
};

// A block of outputs, of every phase; tiles are numbered down the rows, then across.
template <class T>
struct Block {
  const Job<T> &job;
  const Args *a;
  const Cut &cut;
  int64_t sample, y, x, rows, columns, tiles;
  const uint8_t *pixels;

  Block(const Job<T> &job, int64_t block) : job(job), a(job.a), cut(job.cut) {
    const int64_t in_set = cut.down * cut.across, at = block % in_set;
    sample = block / in_set * cut.shared, y = at / cut.across * cut.rows, x = at % cut.across * cut.columns;
    rows = cut.height - y < cut.rows ? cut.height - y : cut.rows;
    columns = cut.width - x < cut.columns ? cut.width - x : cut.columns;
    tiles = rows * up(columns * cut.shared, kTile);
    pixels = job.pixels + (block / in_set * cut.set + y * a->stride * cut.wide + x * cut.shared) * kChunk;
  }

  int64_t pairs() const { return up(tiles, 2); }
  const uint8_t *tile(int64_t t) const { return pixels + (t % rows * a->stride * cut.wide + t / rows * kTile) * kChunk; }
};

// What the sums of a group of outputs begin with, and what they are multiplied by; a row of tiles is of one sample.
struct Group {
  const int8_t *taps, *next, *end;  // and those of the group that follows: what to ask for
  int64_t first;              // of the outputs
  int32_t start[kSide * kSide];

  template <class T>
  void open(const Block<T> &block, int64_t g, bool more) {
    const Args *a = block.a;
    first = g * kSide;
    taps = static_cast<const int8_t *>(a->taps) + g * block.cut.planes * kPlaneTaps;
    next = taps + block.cut.planes * kPlaneTaps, end = more ? next + block.cut.planes * kPlaneTaps : next;
    for (int64_t r = 0; r < kSide; ++r) {
      const int64_t n = block.sample + (r & (block.cut.shared - 1));
      const __m512i zero = _mm512_set1_epi32(n < a->batch ? -static_cast<int>(block.job.codings[n].zero) : 0);
      for (int64_t i = 0; i < kSide; i += kTile) {
        const __m512i sums = _mm512_loadu_si512(static_cast<const int32_t *>(a->sums) + first + i);
        _mm512_storeu_si512(start + r * kSide + i, _mm512_mullo_epi32(sums, zero));
      }
    }
  }
};

// What is still to be done with a pair's sums.
struct Rest {
  const int32_t *sums = nullptr;
  int64_t pair, first, phase;
};

FG_INLINE void put_all(bf16 *to, const vf (&y)[kParts], int64_t left) {
  _mm512_mask_storeu_epi16(to, halves_below(left), (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
}
template <class T>
FG_INLINE void put_all(T *to, const vf (&y)[kParts], int64_t left) {
  for (int v = 0; v < kParts; ++v) store_n(to + v * W, y[v], columns(left, v));
}

// A part of what rests: kRoom rows of sums.
template <class T>
FG_INLINE void finish(const Block<T> &block, const Rest &rest, int64_t part) {
  const Args *a = block.a;
  const Cut &cut = block.cut;
  const int64_t in_tile = kTile / kRoom, t = 2 * rest.pair + part / in_tile, times = a->doubled ? 2 : 1;
  if (t >= block.tiles) return;
  const int64_t left = a->outputs - rest.first, first = t / block.rows * kTile + part % in_tile * kRoom;
  const int64_t row = (block.y + t % block.rows) * times + rest.phase / 2;
  vf bias[kParts], scale[kParts];
  get_bias(a->bias, a->bias_dtype, rest.first, left, bias);
  get_bias(a->scale, FG_FLOAT32, rest.first, left, scale);
  const int32_t *sums = rest.sums + part * kRoom * kSide;
  for (int64_t r = 0; r < kRoom; ++r, sums += kSide) {
    const int64_t e = first + r, column = e >> cut.shift, sample = block.sample + (e & (cut.shared - 1));
    if (column >= block.columns) return;
    if (sample >= a->batch) continue;
    const int64_t x = (block.x + column) * times + rest.phase % 2;
    const int64_t at = ((sample * cut.height * times + row) * cut.width * times + x) * a->outputs + rest.first;
    const vf by = set1(block.job.codings[sample].scale);
    vf y[kParts];
#pragma GCC unroll 2
    for (int v = 0; v < kParts; ++v) {
      y[v] = add(mul(mul(to_float(load_i(sums + v * W)), by), scale[v]), bias[v]);
      if (a->residual) y[v] = add(y[v], load_n(static_cast<const T *>(a->residual) + at + v * W, columns(left, v)));
    }
    put_all(static_cast<T *>(a->out) + at, y, left);
  }
}

// Adds one tap of a plane: 32 pixels of two tiles, lines `row` bytes apart.
FG_INLINE void add_tap(const uint8_t *one, const uint8_t *two, const int8_t *taps) {
  _tile_loadd(6, taps, 4 * kSide);
  _tile_loadd(4, one, kChunk);
  _tile_dpbusd(0, 4, 6);
  _tile_loadd(7, taps + 4 * kTile, 4 * kSide);
  _tile_dpbusd(1, 4, 7);
  _tile_loadd(5, two, kChunk);
  _tile_dpbusd(2, 5, 6);
  _tile_dpbusd(3, 5, 7);
}

// sums = a pair's pixels by the taps of a group; `ahead`: lines of the next group to ask for with each tap.
template <class T>
FG_INLINE void pair_by(const Block<T> &block, int64_t pair, int64_t phase, Group &group, int64_t ahead, int32_t *sums,
                       Rest &rest) {
  const int64_t last = block.tiles - 1, *offsets = block.cut.offsets[phase];
  const uint8_t *one = block.tile(2 * pair), *two = block.tile(2 * pair + 1 < last ? 2 * pair + 1 : last);
  const int8_t *taps = group.taps;
  begin_sums<true>(group.start, true);
  int64_t part = 0;
  for (int64_t p = 0; p < block.cut.planes; ++p) {
    for (int64_t tap = 0; tap < kTaps; tap += 3) {
      if (rest.sums && part < kSide / kRoom) finish(block, rest, part++);
#pragma GCC unroll 3
      for (int64_t i = 0; i < 3; ++i, taps += kTapBytes) {
        const int64_t at = (p * block.cut.plane + offsets[tap + i]) * kChunk;
        add_tap(one + at, two + at, taps);
        for (int64_t n = 0; n < ahead && group.next < group.end; ++n, group.next += kChunk)
          __builtin_prefetch(group.next, 0, 2);
      }
    }
  }
  end_sums<true>(sums);
  for (; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
  rest = {sums, pair, group.first, phase};
}

template <class T>
void block_by(const Block<T> &block, int64_t from, int64_t to) {
  alignas(64) int32_t sums[2][kSide * kSide];
  alignas(64) Group group;
  const int64_t pairs = block.pairs(), visits = pairs * block.cut.phases;
  Rest rest;
  int64_t turn = 0;
  for (int64_t g = from; g < to; ++g) {
    group.open(block, g, g + 1 < to);
    for (int64_t i = 0; i < visits; ++i, ++turn)
      pair_by(block, i % pairs, i / pairs, group, up(kTapBytes / kChunk, visits), sums[turn % 2], rest);
  }
  for (int64_t part = 0; rest.sums && part < kSide / kRoom; ++part) finish(block, rest, part);
}

template <class T>
int convolve(const Args *a) {
  const Cut cut(a);
  const Pieces pieces(a->height * a->width * a->inputs);
  const int64_t ranges = a->batch * pieces.each * static_cast<int64_t>(sizeof(Range));
  const int64_t codings = a->batch * static_cast<int64_t>(sizeof(Coding));
  uint8_t *memory = static_cast<uint8_t *>(fg_scratch(static_cast<size_t>(cut.bytes() + codings + ranges)));
  if (!memory) return FG_NO_MEMORY;
  Coding *made = reinterpret_cast<Coding *>(memory + cut.bytes());
  const Job<T> job{a, cut, memory, made};
  find_codings(static_cast<const T *>(a->x), a->batch, pieces, reinterpret_cast<Range *>(made + a->batch), made);
  parallel_for(cut.sets * cut.tall, 1 + (1 << 15) / (cut.wide * cut.planes * kChunk), [&](int64_t item) {
    job.code_row(item / cut.tall, item % cut.tall);
    return 0;
  });
  const int64_t groups = up(a->outputs, kSide), blocks = cut.blocks();
  int64_t runs = up(kItems * fg_threads(), blocks);
  runs = runs > up(groups, 2) ? up(groups, 2) : runs;
  const int64_t some = up(groups, runs), pixels = cut.rows * cut.columns * cut.shared * cut.phases;
  runs = up(groups, some);
  const int64_t grain = 1 + (1 << 22) / (pixels * some * kSide * kTaps * kChunk * cut.planes + 1);
  return parallel_for(blocks * runs, grain, [&](int64_t item) {
    const Tiles tiles;
    const int64_t from = item % runs * some;
    block_by(Block<T>(job, item / runs), from, from + some < groups ? from + some : groups);
    return static_cast<int>(FG_OK);
  });
}

}  // namespace
