// What the forms of Winograd's F(2 x 2, 3 x 3) share: tiles of 4 x 4 pixels, two apart, some of them transformed at a
// time; then each block of these by the filters of a group of outputs, at all 16 points.
//
// Products are of words of a few channels: a line of memory holds 16 words of a tile at one point, and twelve tiles'
// lines lie together, so that a product reads one stream of them and one of filters.
#pragma once
#include "winograd.h"

namespace {

constexpr int SPOTS = 16;                            // points of a tile
constexpr int64_t GROUP = 32, ROWS = 12, LINE = 16;  // outputs of filters that lie together; tiles; words of a line
constexpr int64_t kBlock = 48;                       // tiles whose sums are in the cache at a time
constexpr int64_t kLittle = 2 << 20, kMuch = 12 << 20;  // bytes of transformed tiles at a time, within a last cache
constexpr int64_t kSums = SPOTS * GROUP + LINE;      // floats of a tile's sums

// Whether a point of every tile is zero where images are DOUBLED, each pixel of theirs being 2 x 2 of what is convolved: it
// is the difference of two rows, or columns, that are the same.
template <bool DOUBLED>
FG_INLINE bool vanishes(int i) {
  return DOUBLED && (i / 4 == 2 || i % 4 == 2);
}

// W outputs of a tile's four pixels from their sums at all points.
template <bool DOUBLED = false>
FG_INLINE void gather_tile(const float *m, vf *z) {
  vf d[SPOTS], e[8];
#pragma GCC unroll 16
  for (int i = 0; i < SPOTS; ++i) d[i] = vanishes<DOUBLED>(i) ? set1(0.0f) : load(m + i * GROUP);
  for (int i = 0; i < 4; ++i) gather_small(d + i, 4, e + i, 4);
  for (int i = 0; i < 2; ++i) gather_small(e + 4 * i, 1, z + 2 * i, 1);
}

// The first pixel of a tile's outputs.
struct Place {
  int64_t sample, y, x;
};

// The sizes of a problem, and how its tiles are shared out.
struct SmallTiles {
  int64_t inputs, outputs, height, width;
  int64_t words, lines, groups;  // of input channels; of a tile at a point; of GROUP outputs
  int64_t down, across, tiles;   // of a sample, of the batch
  int64_t chunk, part;           // tiles; words of its points
  int64_t span = 1;              // blocks of kBlock tiles that are convolved as one item
  uint32_t *spread;
  float *work;                   // `room` floats for each thread
  int64_t room;
  int *busy;

  // `height` and `width` are those of the outputs: of images that are doubled, twice theirs.
  SmallTiles(int64_t batch, int64_t inputs, int64_t outputs, int64_t height, int64_t width, int64_t channels)
      : inputs(inputs), outputs(outputs), height(height), width(width) {
    words = (inputs + channels - 1) / channels, lines = (words + LINE - 1) / LINE;
    groups = (outputs + GROUP - 1) / GROUP;
    down = (height + 1) / 2, across = (width + 1) / 2, tiles = batch * down * across;
    // Every chunk reads all filters: where they are large, it takes more tiles.
    const int64_t third = SPOTS * groups * words * GROUP * 4 / 3;
    const int64_t bytes = third < kLittle ? kLittle : third < kMuch ? third : kMuch;
    const int64_t fit = bytes / (SPOTS * (lines ? lines : 1) * 64) / kBlock;
    chunk = (fit < 1 ? 1 : fit) * kBlock;
    chunk = chunk < tiles ? chunk : tiles;
    part = (chunk + ROWS - 1) / ROWS * ROWS * lines * LINE + LINE;  // an odd number of lines: points in other sets
    room = kBlock * kSums;
  }

  // The scratch memory, and `more` words of it for the caller, zeros, and behind them `rest`, which are none; null where
  // there is none.
  uint32_t *reserve(int64_t more, int64_t rest = 0) {
    const int64_t threads = fg_threads(), all = SPOTS * part + threads * room + more + rest + threads;
    spread = static_cast<uint32_t *>(fg_scratch(static_cast<size_t>(all) * 4));
    if (!spread) return nullptr;
    work = reinterpret_cast<float *>(spread + SPOTS * part);
    uint32_t *own = reinterpret_cast<uint32_t *>(work + threads * room);
    busy = reinterpret_cast<int *>(own + more + rest);
    memset(own, 0, static_cast<size_t>(more) * 4), memset(busy, 0, static_cast<size_t>(threads) * 4);
    return own;
  }

  Place place(int64_t tile) const { return {tile / (down * across), tile / across % down * 2, tile % across * 2}; }

  // The pixels of a tile of `image`, null outside of it: of one that is doubled 3 x 3, the middle ones twice.
  template <bool DOUBLED, class T>
  void pixels_of(const T *image, const Place &at, const T **pixel) const {
    if constexpr (DOUBLED) {
      const int64_t down_to = height / 2, wide = width / 2;
      const T *three[9];
      pixels_at<3>(image + at.sample * down_to * wide * inputs, down_to, wide, inputs, at.y / 2 - 1, at.x / 2 - 1, three);
      for (int i = 0; i < SPOTS; ++i) pixel[i] = three[(i / 4 + 1) / 2 * 3 + (i % 4 + 1) / 2];
    } else {
      pixels_at<4>(image + at.sample * height * width * inputs, height, width, inputs, at.y - 1, at.x - 1, pixel);
    }
  }

  // Where the first point of the `t`-th tile of a chunk begins; its lines are ROWS * LINE words apart.
  uint32_t *point_of(int64_t t) const { return spread + t / ROWS * ROWS * lines * LINE + t % ROWS * LINE; }

  // Fetches what lies `beside` the outputs, laid out as they are, from o on of tiles [from, to): four lines a tile, which
  // nothing foresees.  Were it not inlined at once, the compiler would drop its calls: to it they have no effect.
  template <class T>
  inline __attribute__((always_inline)) void fetch(const T *beside, int64_t from, int64_t to, int64_t o) const {
    for (int64_t tile = from; tile < to; ++tile) {
      const Place at = place(tile);
      const T *p = beside + ((at.sample * height + at.y) * width + at.x) * outputs + o;
      const int64_t right = at.x + 1 < width ? outputs : 0, below = at.y + 1 < height ? width * outputs : 0;
      __builtin_prefetch(p), __builtin_prefetch(p + right);
      __builtin_prefetch(p + below), __builtin_prefetch(p + below + right);
    }
  }

  // f(work): with memory that no other thread uses meanwhile.
  template <class F>
  void with_work(const F &f) const {
    int64_t slot = 0;
    while (__atomic_exchange_n(&busy[slot], 1, __ATOMIC_ACQUIRE)) slot = slot + 1 < fg_threads() ? slot + 1 : 0;
    f(work + slot * room);
    __atomic_store_n(&busy[slot], 0, __ATOMIC_RELEASE);
  }

  // fill(tile, t, work) transforms a tile, the `t`-th of its chunk; convolve(first, t, count, group, work) has `count`
  // tiles from the `t`-th on of the chunk that begins at tile `first` multiplied, and does what follows.
  template <class Fill, class Convolve>
  void run(const Fill &fill, const Convolve &convolve) const {
    for (int64_t first = 0; first < tiles; first += chunk) {
      const int64_t count = tiles - first < chunk ? tiles - first : chunk, most = span * kBlock;
      const int64_t items = (count + most - 1) / most;
      parallel_for((count + ROWS - 1) / ROWS, 1, [&](int64_t item) {
        with_work([&](float *own) {
          for (int64_t t = item * ROWS; t < count && t < (item + 1) * ROWS; ++t) fill(first + t, t, own);
        });
        return 0;
      });
      // Consecutive items share filters, which threads then read at about the same time.
      parallel_for(items * groups, 1, [&](int64_t item) {
        const int64_t t = item % items * most, some = count - t < most ? count - t : most;
        with_work([&](float *own) { convolve(first, t, some, item / items, own); });
        return 0;
      });
    }
  }
};

}  // namespace
