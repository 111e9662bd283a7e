// A 3x3 convolution transposed, of stride 2, and then a filter of four by four taps: an image of twice the size.
//
// Along an axis, the even pixels of the transposed convolution are a product of polynomials: four pixels by the outer
// two weights make five, from the values at 0, 1/2, -1, 2 and infinity; the odd ones are pixels by the middle weight.  So
// a tile of 4 x 4 pixels takes 9 x 9 products for 144, by 6 x 6 matrices of filters, and makes 9 x 9 pixels, whose outer
// ones are added to those of the tiles beside it.  The filter passes over them while they are in the cache.
//
// A pixel's sums run in order, over channels, tiles and taps: neither threads nor batch change a bit.
#pragma once
#include "winograd.h"

namespace {

constexpr int64_t kSome = 64;  // tiles multiplied at a time, where a row of the image has no more
constexpr int64_t kInRow = 4;  // tiles that a thread transforms one after the other
constexpr int SIDE = 4, EVEN = 5, SPAN = SIDE + EVEN;  // pixels of a tile; values of even pixels; all values
constexpr int KINDS = 6;       // of filters along an axis, the last of the middle weight: once for each pixel
constexpr int64_t RING = 16;  // rows of pixels: nine that a tile makes, three before them, one after

// The values of a polynomial of four coefficients `s` apart, eight of that at 1/2; five come out, `t` apart.
FG_INLINE void evaluate(const vf *a, int s, vf *o, int t) {
  const vf two = set1(2.0f), four = set1(4.0f), eight = set1(8.0f);
  o[0] = a[0];
  o[t] = fma(eight, a[0], fma(four, a[s], fma(two, a[2 * s], a[3 * s])));
  o[2 * t] = sub(add(a[0], a[2 * s]), add(a[s], a[3 * s]));
  o[3 * t] = fma(eight, a[3 * s], fma(four, a[2 * s], fma(two, a[s], a[0])));
  o[4 * t] = a[3 * s];
}

// The five coefficients, `t` apart, of the polynomial with these values, where those at 1/2 and 2 are 16 and 1 of 36,
// that at -1 one of nine.
FG_INLINE void interpolate(const vf *m, int s, vf *o, int t) {
  const vf half = m[s], minus = m[2 * s], two = m[3 * s], first = m[0], last = m[4 * s];
  const vf more = set1(-1.5f), less = set1(-2.0f), four = set1(4.0f);
  o[0] = first;
  o[t] = fma(four, half, fma(less, add(two, minus), fma(more, first, last)));
  o[2 * t] = fma(set1(5.0f), minus, fma(set1(2.0f), add(half, two), mul(more, add(first, last))));
  o[3 * t] = fma(four, two, fma(less, add(half, minus), fma(more, last, first)));
  o[4 * t] = last;
}

// The 9 x 9 values of four by four pixels; rows and columns EVEN and above are those of the middle weight.
FG_INLINE void spread_phases(const vf *d, vf *o) {
  vf wide[SIDE * SPAN];
  for (int i = 0; i < SIDE; ++i) {
    evaluate(d + SIDE * i, 1, wide + SPAN * i, 1);
    for (int j = 0; j < SIDE; ++j) wide[SPAN * i + EVEN + j] = d[SIDE * i + j];
  }
  for (int j = 0; j < SPAN; ++j) {
    evaluate(wide + j, SPAN, o + j, SPAN);
    for (int i = 0; i < SIDE; ++i) o[SPAN * (EVEN + i) + j] = wide[SPAN * i + j];
  }
}

// The 9 x 9 pixels of these values.
FG_INLINE void gather_phases(const vf *m, vf *o) {
  vf wide[SPAN * SPAN];
  for (int i = 0; i < SPAN; ++i) {
    interpolate(m + SPAN * i, 1, wide + SPAN * i, 2);
    for (int j = 0; j < SIDE; ++j) wide[SPAN * i + 2 * j + 1] = m[SPAN * i + EVEN + j];
  }
  for (int j = 0; j < SPAN; ++j) {
    interpolate(wide + j, SPAN, o + j, 2 * SPAN);
    for (int i = 0; i < SIDE; ++i) o[SPAN * (2 * i + 1) + j] = wide[SPAN * (EVEN + i) + j];
  }
}

// f(x, pixel) for each pixel of a row of the filtered image, from four rows of the other.
template <class F>
FG_INLINE void filter_row(const float *const *rows, const vf *taps, int64_t width, const F &f) {
  vf third = set1(0.0f), second = third, first = third;  // what the next three pixels have of the columns so far
  for (int64_t x = 0; x < width + 3; ++x) {
    vf sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = mul(load(rows[0] + x * W), taps[j]);
    for (int i = 1; i < 4; ++i)
      for (int j = 0; j < 4; ++j) sum[j] = fma(load(rows[i] + x * W), taps[4 * i + j], sum[j]);
    if (x >= 3) f(x - 3, add(first, sum[3]));
    first = add(second, sum[2]), second = add(third, sum[1]), third = sum[0];
  }
}

// The sizes of the image, and how its rows of tiles are shared out.
struct Phases : Filters {
  int64_t height, width;
  int64_t down, across, rows;     // of tiles: of a sample, of a row of them; such rows of the batch
  int64_t band, pitch;            // rows of tiles at a time; tiles between two of the 81 values
  int64_t pixels;                 // of a row of a ring
  int64_t begin[KINDS * KINDS + 1];  // where the tiles of a matrix begin, in tiles
  int64_t place[SPAN * SPAN];        // where those of a value do

  Phases(const void *filters, int64_t batch, int64_t inputs, int64_t outputs, int64_t height, int64_t width)
      : Filters(filters, inputs, outputs), height(height), width(width) {
    down = (height + SIDE - 1) / SIDE, across = (width + SIDE - 1) / SIDE, rows = batch * down;
    const int64_t most = across < kSome ? kSome / across : 1, parts = (rows + most - 1) / most;
    band = (rows + parts - 1) / parts;
    step += W, pitch = band * across | 1;  // odd numbers of lines: values in other sets of a cache
    pixels = 2 * SIDE * across + 3;
    begin[0] = 0;
    for (int k = 0; k < KINDS * KINDS; ++k) {
      const int tall = k / KINDS == EVEN ? SIDE : 1, wide = k % KINDS == EVEN ? SIDE : 1;
      for (int i = 0; i < tall * wide; ++i)
        place[(k / KINDS + i / wide) * SPAN + k % KINDS + i % wide] = begin[k] + i * pitch;
      begin[k + 1] = begin[k] + (tall * wide * pitch + kRows - 1) / kRows * kRows;
    }
  }

  float *row(float *ring, int64_t y) const { return ring + (y & (RING - 1)) * pixels * W; }

  // Row y of the pixels between `from` and `to`, zero.
  void clear(float *ring, int64_t y, int64_t from, int64_t to) const {
    memset(row(ring, y) + from * W, 0, static_cast<size_t>((to - from) * W) * sizeof(float));
  }

  // Where the sums of a vector of outputs from `o` on begin: for each panel, those of all values and tiles.
  int64_t sums(int64_t o) const { return o / PANEL * PANEL * begin[KINDS * KINDS] + o % PANEL; }

  // Adds what a row of tiles makes, of one vector of outputs, to the ring; `m`: the sums of the first of them.
  void add_row(const float *m, int64_t first, bool last, float *ring) const {
    if (!first) clear(ring, -1, 0, pixels), clear(ring, 0, 0, pixels);
    for (int64_t y = first + 1; y < first + SPAN; ++y) clear(ring, y, 0, 2);
    for (int64_t t = 0; t < across; ++t) {
      vf d[SPAN * SPAN], z[SPAN * SPAN];
      for (int i = 0; i < SPAN * SPAN; ++i) {
        const float *from = m + (place[i] + t) * PANEL;
        d[i] = load(from);
        if (W > 1) __builtin_prefetch(from + 2 * PANEL);
      }
      gather_phases(d, z);
      for (int y = 0; y < SPAN; ++y) {
        float *to = row(ring, first + y) + (1 + 2 * SIDE * t) * W;
        for (int x = 0; x < SPAN; ++x) {
          const vf own = z[SPAN * y + x];
          store(to + x * W, x && y ? own : add(load(to + x * W), own));
        }
      }
    }
    for (int64_t y = first; y < first + SPAN; ++y) clear(ring, y, 2 * width + 2, 2 * width + 3);
    if (last) clear(ring, 2 * height + 1, 0, pixels);
  }

  // fill(sample, y, x, put) hands put(c, d) the 4 x 4 pixels d of channels from c on of the tile that begins at pixel
  // (y, x).  take(sample, y, o, rows) filters row y of the outputs from o on.
  template <class Fill, class Take>
  int run(const Fill &fill, const Take &take) const {
    const int64_t floats = begin[KINDS * KINDS] * (step + columns), ring = RING * pixels * W;
    float *v = static_cast<float *>(fg_scratch(static_cast<size_t>(floats + columns / W * ring) * sizeof(float)));
    if (!v) return FG_NO_MEMORY;
    float *m = v + begin[KINDS * KINDS] * step, *rings = v + floats;
    for (int64_t first = 0; first < rows; first += band) {
      const int64_t some = rows - first < band ? rows - first : band;
      parallel_for((some * across + kInRow - 1) / kInRow, 1, [&](int64_t item) {
        for (int64_t t = item * kInRow; t < some * across && t < (item + 1) * kInRow; ++t) spread(first, t, v, fill);
        return 0;
      });
      multiply_all(some * across, v, m);
      parallel_for(columns / W, 1, [&](int64_t item) {
        for (int64_t r = 0; r < some; ++r)
          filter_rows(first + r, m + sums(item * W) + r * across * PANEL, rings + item * ring, item * W, take);
        return 0;
      });
    }
    return FG_OK;
  }

  // The values of the `t`-th tile from a row of tiles on.
  template <class Fill>
  void spread(int64_t first, int64_t t, float *v, const Fill &fill) const {
    const int64_t r = first + t / across;
    fill(r / down, r % down * SIDE, t % across * SIDE, [&](int64_t c, const vf *d) {
      vf e[SPAN * SPAN];
      spread_phases(d, e);
      for (int i = 0; i < SPAN * SPAN; ++i) {
        float *to = v + (place[i] + t) * step + c;
        store(to, e[i]);
        if (W > 1) __builtin_prefetch(to + W, 1);
      }
    });
  }

  // All products of `count` tiles, the longest first.
  void multiply_all(int64_t count, const float *v, float *m) const {
    const int64_t all = KINDS * KINDS * groups, threads = fg_threads();
    parallel_for(all, 1, [&](int64_t item) {
      const int64_t left = all - 1 - item, k = left / groups, next = left - threads;
      const int64_t tall = k / KINDS == EVEN ? SIDE : 1, wide = k % KINDS == EVEN ? SIDE : 1;
      const Layout layout = {step, PANEL, begin[KINDS * KINDS] * PANEL};
      multiply<true>(k, left % groups, (tall * wide - 1) * pitch + count, v + begin[k] * step, m + begin[k] * PANEL,
                     layout, next < 0 ? at(-1, 0) : at(next / groups, next % groups));
      return 0;
    });
  }

  // What the `r`-th row of tiles adds for outputs from `o` on, and the rows of the image that are then complete.
  template <class Take>
  void filter_rows(int64_t r, const float *m, float *ring, int64_t o, const Take &take) const {
    const int64_t first = r % down * 2 * SIDE;
    const bool last = r % down == down - 1;
    add_row(m, first, last, ring);
    const int64_t end = last ? 2 * height : first + 2 * SIDE - 2;
    for (int64_t y = first ? first - 2 : 0; y < end; ++y) {
      const float *from[4];
      for (int i = 0; i < 4; ++i) from[i] = row(ring, y - 1 + i);
      take(r / down, y, o, from);
    }
  }
};

}  // namespace
