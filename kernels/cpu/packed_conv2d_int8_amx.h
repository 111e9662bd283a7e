// A 3x3 convolution in int8 on AMX tiles: 32 pixels by 32 outputs at a time.
//
// Codes of pixels are made into planes of 64 channels, the code of zero around the images: a tap's tile is then 16
// lines in a row, wherever it lies.  Of stride 2 even columns lie before the odd ones, and a convolution of what is
// doubled is four, one for each place in a pixel's 2 x 2, whose taps read some pixels more than once: both are nothing
// but other offsets of the nine taps.  Where an image is narrow, samples lie side by side, pixel by pixel, so that
// tiles are full.  Sums begin with what the zero point takes off them, and become outputs between the next products.
#pragma once
#include "image_codes.h"
#include "panel.h"
#include "tile_products.h"

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kChunk = 64;                    // channels of a plane, bytes of a line
constexpr int64_t kTapBytes = kTile * kSide * 4;  // 16 words of channels by 32 outputs
constexpr int64_t kPlaneTaps = kTaps * kTapBytes;
constexpr int64_t kPixels = 512;                  // outputs of a band, about, rows of it at the least,
constexpr int64_t kRows = 8;
constexpr int64_t kBytes = 1 << 20;               // and bytes of what is around them
constexpr int64_t kItems = 4;                     // a thread, at the least, where work can be shared out
constexpr int64_t kSamples = 64;                  // that are worked on at a time, at the most
constexpr int64_t kPlanes = 10;                   // planes that go into sums at a time, at the most,
constexpr int64_t kPairs = 16;                    // where no more pairs than these have sums that wait for the rest
constexpr int64_t kRoom = 4;                      // rows of sums that are finished at a time

using Args = fg_packed_conv2d_int8_args;

FG_INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// How samples lie in planes, [plane][row][column][sample][64 channels], and are cut into bands of rows.
struct Cut {
  const Args *a;
  int64_t samples, height, width, times, phases;  // height, width: of what tiles walk over, outputs or pixels to double
  int64_t shared, sets;                           // samples side by side, 1 << shift
  int64_t rows, down;                             // of a band; bands
  int64_t half, wide, tall, plane, planes;        // columns of a parity; lines and rows of a plane
  bool local;                                     // whether whoever multiplies a band makes its codes
  int64_t offsets[4][kTaps];                      // the taps' lines, of each phase
  int64_t to[kTile];                              // where the lines of a tile go in the output
  int shift = 0;

  Cut(const Args *a, int64_t samples)
      : a(a), samples(samples), height((a->height - 1) / a->stride + 1), width((a->width - 1) / a->stride + 1),
        times(a->doubled ? 2 : 1), phases(times * times) {
    while (width << shift & (kTile - 1) && width << shift < 3 * kTile && 1 << shift < samples) ++shift;
    while (height * width << shift < kPixels && shift < 4 && samples % (2 << shift) == 0) ++shift;
    shared = 1 << shift, sets = up(samples, shared);
    half = up(a->width + 2, a->stride), planes = up(a->inputs, kChunk), wide = half * a->stride * shared;
    const int64_t most = (kBytes / (wide * (planes ? planes : 1) * kChunk) - 2) / a->stride;
    rows = kPixels / (width * shared);
    rows = rows < kRows ? kRows : rows;
    rows = rows > most ? most : rows;
    rows = rows < 2 ? 2 : rows > height ? height : rows;
    rows = up(up(height, up(height, rows)), 2) * 2;  // tiles are taken in pairs
    down = up(height, rows);
    local = sets * down >= kItems * fg_threads();
    tall = local ? rows * a->stride + 2 : a->height + 2, plane = (tall * wide) | 1;
    for (int64_t p = 0; p < phases; ++p)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < 3; ++j)
          offsets[p][3 * i + j] =
              a->doubled ? (p / 2 + i + 1) / 2 * wide + (p % 2 + j + 1) / 2 * shared : i * wide + at(j);
    const int64_t image = height * width * phases * a->outputs;
    for (int64_t r = 0; r < kTile; ++r) to[r] = (r & (shared - 1)) * image + (r >> shift) * times * a->outputs;
  }

  // Where column c of those with borders lies.
  int64_t at(int64_t c) const { return (a->stride == 1 ? c : c % 2 * half + c / 2) * shared; }
  // Of the planes, and of what tiles may read behind the last line.
  int64_t bytes() const { return ((local ? 1 : sets) * planes * plane + kTile) * kChunk; }
};

template <class T>
struct Job {
  const Cut &cut;
  const T *x;
  const T *residual;
  T *out;
  const Coding *codings;

  // Row r of a set's pixels, borders among them, to a row of planes.
  void code_row(int64_t set, int64_t r, uint8_t *to) const {
    const Args *a = cut.a;
    for (int64_t c = 0; c < a->width + 2; ++c)
      for (int64_t n = set * cut.shared; n < (set + 1) * cut.shared && n < cut.samples; ++n) {
        uint8_t *line = to + (cut.at(c) + n - set * cut.shared) * kChunk;
        const vf rate = set1(codings[n].rate);
        const __m512i zero = _mm512_set1_epi32(static_cast<int>(codings[n].zero));
        const bool in = r > 0 && r <= a->height && c > 0 && c <= a->width;
        const T *from = x + (in ? ((n * a->height + r - 1) * a->width + c - 1) * a->inputs : 0);
        for (int64_t p = 0; p < cut.planes; ++p, line += cut.plane * kChunk)
          _mm512_store_si512(line, codes_of(from + p * kChunk, in ? a->inputs - p * kChunk : 0, rate, zero));
      }
  }
};

// A band of outputs, of every phase, and the planes of pixels around it; tiles are numbered down the rows, then across.
template <class T>
struct Band {
  const Job<T> &job;
  const Cut &cut;
  int64_t sample, y, rows, tiles;
  const uint8_t *pixels;

  Band(const Job<T> &job, int64_t band, uint8_t *planes) : job(job), cut(job.cut), pixels(planes) {
    const int64_t set = band / cut.down, line = cut.wide * kChunk;
    sample = set * cut.shared, y = band % cut.down * cut.rows;
    rows = cut.height - y < cut.rows ? cut.height - y : cut.rows;
    tiles = rows * up(cut.width * cut.shared, kTile);
    const int64_t top = y * cut.a->stride, needed = rows * cut.a->stride + 2;
    if (!cut.local) pixels += set * cut.planes * cut.plane * kChunk + top * line;
    for (int64_t r = 0; cut.local && r < needed && top + r < cut.a->height + 2; ++r)
      job.code_row(set, top + r, planes + r * line);
  }

  int64_t pairs() const { return up(tiles, 2); }
  const uint8_t *tile(int64_t t) const {
    return pixels + (t % rows * cut.a->stride * cut.wide + t / rows * kTile) * kChunk;
  }
};

// A group of outputs: its taps, what is to be asked for of those behind, and what sums begin with.
struct Group {
  alignas(64) int32_t start[kSide * kSide];
  const int8_t *taps, *next, *end;
  int64_t first;

  template <class T>
  void open(const Band<T> &band, int64_t g, bool more) {
    const Args *a = band.cut.a;
    const int64_t bytes = band.cut.planes * kPlaneTaps;
    first = g * kSide;
    taps = static_cast<const int8_t *>(a->taps) + g * bytes, next = taps, end = taps + (more ? 2 * bytes : bytes);
    for (int64_t r = 0; r < kSide; ++r) {
      const int64_t n = band.sample + (r & (band.cut.shared - 1));
      const __m512i zero = _mm512_set1_epi32(n < band.cut.samples ? -static_cast<int>(band.job.codings[n].zero) : 0);
      for (int64_t i = 0; i < kSide; i += kTile) {
        const __m512i sums = _mm512_loadu_si512(static_cast<const int32_t *>(a->sums) + first + i);
        _mm512_store_si512(start + r * kSide + i, _mm512_mullo_epi32(sums, zero));
      }
    }
  }
};

// The sums of two tiles by a group of outputs, and what is still to be done with them.
struct Pair {
  alignas(64) int32_t sums[kSide * kSide];
  float bias[kSide], scale[kSide];
  int64_t left = 0, at[2], lines[2];  // outputs; of each tile: where its first line goes, and how many there are

  template <class T>
  void settle(const Band<T> &band, int64_t number, int64_t phase, int64_t first) {
    const Cut &cut = band.cut;
    const Args *a = cut.a;
    left = a->outputs - first;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t t = 2 * number + i, column = t / band.rows * kTile;
      const int64_t rest = t < band.tiles ? cut.width * cut.shared - column : 0;
      const int64_t row = (band.y + t % band.rows) * cut.times + phase / 2;
      const int64_t x = (column >> cut.shift) * cut.times + phase % 2;
      at[i] = ((band.sample * cut.height * cut.times + row) * cut.width * cut.times + x) * a->outputs + first;
      lines[i] = rest < kTile ? rest : kTile;
    }
    vf biases[kParts], scales[kParts];
    get_bias(a->bias, a->bias_dtype, first, left, biases);
    get_bias(a->scale, FG_FLOAT32, first, left, scales);
    for (int v = 0; v < kParts; ++v) store(bias + v * W, biases[v]), store(scale + v * W, scales[v]);
  }
};

// Two vectors of a pixel, WHOLE or the first `left` of them.
template <bool WHOLE>
FG_INLINE void put(bf16 *to, const vf (&y)[kParts], int64_t left) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
  WHOLE ? _mm512_storeu_si512(to, both) : _mm512_mask_storeu_epi16(to, halves_below(left), both);
}
template <bool WHOLE, class T>
FG_INLINE void put(T *to, const vf (&y)[kParts], int64_t left) {
  for (int v = 0; v < kParts; ++v) WHOLE ? store(to + v * W, y[v]) : store_n(to + v * W, y[v], columns(left, v));
}

// A part of what rests: kRoom rows of sums.
template <bool WHOLE, class T>
FG_INLINE void finish(const Band<T> &band, const Pair &pair, int64_t part) {
  const int64_t tile = part / (kTile / kRoom), from = part % (kTile / kRoom) * kRoom;
  const int64_t lines = pair.lines[tile], end = from + kRoom < lines ? from + kRoom : lines;
  const int32_t *sums = pair.sums + part * kRoom * kSide;
  for (int64_t r = from; r < end; ++r, sums += kSide) {
    const int64_t sample = band.sample + (r & (band.cut.shared - 1)), at = pair.at[tile] + band.cut.to[r];
    if (sample >= band.cut.samples) continue;
    const vf by = set1(band.job.codings[sample].scale);
    const T *residual = band.job.residual + at;
    vf y[kParts];
#pragma GCC unroll 2
    for (int v = 0; v < kParts; ++v) {
      y[v] = add(mul(to_float(load_i(sums + v * W)), mul(by, load(pair.scale + v * W))), load(pair.bias + v * W));
      if (band.job.residual)
        y[v] = add(y[v], WHOLE ? load(residual + v * W) : load_n(residual + v * W, columns(pair.left, v)));
    }
    put<WHOLE>(band.job.out + at, y, pair.left);
  }
}

template <class T>
FG_INLINE void finish(const Band<T> &band, const Pair &pair, int64_t part) {
  pair.left >= kSide ? finish<true>(band, pair, part) : finish<false>(band, pair, part);
}

// Adds one tap of a plane to the sums of two tiles of pixels; all is loaded first, as add_step does.
FG_INLINE void add_tap(const uint8_t *one, const uint8_t *two, const int8_t *taps) {
  _tile_loadd(6, taps, 4 * kSide);
  _tile_loadd(4, one, kChunk);
  _tile_loadd(7, taps + 4 * kTile, 4 * kSide);
  _tile_loadd(5, two, kChunk);
  _tile_dpbusd(0, 4, 6);
  _tile_dpbusd(1, 4, 7);
  _tile_dpbusd(2, 5, 6);
  _tile_dpbusd(3, 5, 7);
}

// What a pair of tiles is multiplied by: planes [from, to) of a group's taps, for a phase; `ahead`: lines behind these
// to ask for with each tap.
struct Part {
  int64_t phase, from, to, ahead;
};

// A pair's pixels by a part of a group's taps, the other pair's sums finished meanwhile, where they are whole.
template <class T>
FG_INLINE void pair_by(const Band<T> &band, int64_t number, const Part &by, Group &group, Pair &pair, Pair &other) {
  const int64_t last = band.tiles - 1, *offsets = band.cut.offsets[by.phase];
  const uint8_t *one = band.tile(2 * number), *two = band.tile(2 * number + 1 < last ? 2 * number + 1 : last);
  const int8_t *taps = group.taps + by.from * kPlaneTaps;
  begin_sums<true>(by.from ? pair.sums : group.start, true);
  int64_t part = other.left ? 0 : kSide / kRoom;
  for (int64_t p = by.from; p < by.to; ++p) {
#pragma GCC unroll 3
    for (int64_t tap = 0; tap < kTaps; ++tap, taps += kTapBytes) {
      const int64_t at = (p * band.cut.plane + offsets[tap]) * kChunk;
      add_tap(one + at, two + at, taps);
      if (part < kSide / kRoom) finish(band, other, part++);
      for (int64_t n = 0; n < by.ahead && group.next < group.end; ++n, group.next += kChunk)
        __builtin_prefetch(group.next, 0, 2);
    }
  }
  end_sums<true>(pair.sums);
  for (; part < kSide / kRoom; ++part) finish(band, other, part);
  other.left = 0;
  if (by.to == band.cut.planes) pair.settle(band, number, by.phase, group.first);
}

// A band by groups [from, to) of the outputs.
template <class T>
void band_by(const Band<T> &band, int64_t from, int64_t to) {
  Group group;
  Pair pair[kPairs + 1], *other = pair + kPairs;
  const int64_t pairs = band.pairs(), planes = band.cut.planes, phases = band.cut.phases;
  const int64_t parts = pairs <= kPairs && planes > kPlanes ? up(planes, kPlanes) : 1;
  const int64_t slots = parts > 1 ? pairs + 1 : 2, ahead = up(kTapBytes / kChunk, pairs * phases);
  int64_t turn = 0;
  for (int64_t g = from; g < to; ++g) {
    group.open(band, g, g + 1 < to);
    group.next += planes / parts * kPlaneTaps;
    for (int64_t phase = 0; phase < phases; ++phase, turn += pairs)
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < pairs; ++i) {
          Pair &own = pair[(turn + i) % slots];
          pair_by(band, i, {phase, planes * part / parts, planes * (part + 1) / parts, ahead}, group, own, *other);
          other = &own;
        }
  }
  for (int64_t part = 0; other->left && part < kSide / kRoom; ++part) finish(band, *other, part);
}

// All bands by all groups; `planes`: the pixels of all samples, or null where each band is to have its own.
template <class T>
int products(const Job<T> &job, uint8_t *planes) {
  const Cut &cut = job.cut;
  const int64_t groups = up(cut.a->outputs, kSide), bands = cut.sets * cut.down;
  int64_t runs = cut.local ? 1 : up(kItems * fg_threads(), bands);
  runs = runs > up(groups, 2) ? up(groups, 2) : runs;
  const int64_t some = up(groups, runs), pixels = cut.rows * cut.width * cut.shared * cut.phases;
  runs = up(groups, some);
  const int64_t grain = 1 + (1 << 22) / (pixels * some * kSide * kTaps * kChunk * cut.planes + 1);
  return parallel_for(bands * runs, grain, [&](int64_t item) {
    uint8_t *own = cut.local ? static_cast<uint8_t *>(fg_scratch(static_cast<size_t>(cut.bytes()))) : planes;
    if (!own) return static_cast<int>(FG_NO_MEMORY);
    const Band<T> band(job, item / runs, own);
    const Tiles tiles;
    const int64_t from = item % runs * some;
    band_by(band, from, from + some < groups ? from + some : groups);
    return static_cast<int>(FG_OK);
  });
}

// `samples` of the batch from `first` on.
template <class T>
int some_samples(const Args *a, int64_t first, int64_t samples) {
  const Cut cut(a, samples);
  const Pieces pieces(a->height * a->width * a->inputs);
  const T *x = static_cast<const T *>(a->x) + first * pieces.elements;
  const int64_t at = first * cut.height * cut.width * cut.phases * a->outputs;
  Coding codings[kSamples];
  Range *found = static_cast<Range *>(fg_scratch(static_cast<size_t>(samples * pieces.each) * sizeof(Range)));
  if (!found) return FG_NO_MEMORY;
  find_codings(x, samples, pieces, found, codings);
  const T *residual = static_cast<const T *>(a->residual);
  const Job<T> job{cut, x, residual ? residual + at : nullptr, static_cast<T *>(a->out) + at, codings};
  if (cut.local) return products(job, nullptr);
  uint8_t *planes = static_cast<uint8_t *>(fg_scratch(static_cast<size_t>(cut.bytes())));
  if (!planes) return FG_NO_MEMORY;
  parallel_for(cut.sets * cut.tall, 1 + (1 << 15) / (cut.wide * cut.planes * kChunk + 1), [&](int64_t item) {
    const int64_t set = item / cut.tall, row = item % cut.tall;
    job.code_row(set, row, planes + (set * cut.planes * cut.plane + row * cut.wide) * kChunk);
    return 0;
  });
  return products(job, planes);
}

template <class T>
int convolve(const Args *a) {
  int worst = FG_OK;
  for (int64_t first = 0; first < a->batch && worst == FG_OK; first += kSamples)
    worst = some_samples<T>(a, first, a->batch - first < kSamples ? a->batch - first : kSamples);
  return worst;
}

}  // namespace
