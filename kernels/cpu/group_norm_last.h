// The sweeps of group normalization where channels are innermost.
#pragma once
#include "group_norm_shared.h"

namespace {

constexpr int64_t kTile = 1024;          // channels of it handled together
constexpr int64_t kLines = kAtOnce;      // pixels that are normalized step by step
constexpr int64_t kAhead = 1 << 13;      // bytes of those from what is computed to what is prefetched

// Channels innermost: a chunk is some pixels, of which an item handles the columns of its groups.
template <class T, bool kSilu>
struct ChannelsLast {
  // sum[c] += x[r][c] over the rows of a tile at most kTile columns wide.
  FG_INLINE void sums(const T *x, int64_t stride, int64_t rows, int64_t columns, float *sum) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      for (int64_t c = 0; c < columns; c += W) {
        const T *p = x + r * stride + c;
        int n = columns - c < W ? static_cast<int>(columns - c) : W;
        vf pair = add(load_some(p, n), load_some(p + stride, n));
        vf other = add(load_some(p + 2 * stride, n), load_some(p + 3 * stride, n));
        store(sum + c, add(load(sum + c), add(pair, other)));
      }
    for (; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += W) {
        int n = columns - c < W ? static_cast<int>(columns - c) : W;
        store(sum + c, add(load(sum + c), load_some(x + r * stride + c, n)));
      }
  }
  // Elements from a pixel to the one to be prefetched meanwhile: kAhead bytes on, whole rows.
  FG_INLINE int64_t ahead(int64_t stride) {
    const int64_t rows = kAhead / (stride * static_cast<int64_t>(sizeof(T)));
    return (rows < kLines ? kLines : rows) * stride;
  }
  FG_INLINE vf load_some(const T *p, int n) { return n == W ? load(p) : load_n(p, n); }

  // The same of d = x - centre[c] and of d^2.
  FG_INLINE void squares(const T *x, int64_t stride, int64_t rows, int64_t columns, const float *centre, float *sum,
                         float *square) {
    const int64_t next = ahead(stride);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      for (int64_t c = 0; c < columns; c += W) {
        const T *p = x + r * stride + c;
        int n = columns - c < W ? static_cast<int>(columns - c) : W;
        vf m = load(centre + c), d[4];
        for (int64_t i = 0; i < 4; ++i) {
          __builtin_prefetch(p + i * stride + next);
          d[i] = sub(load_some(p + i * stride, n), m);
        }
        store(sum + c, add(load(sum + c), add(add(d[0], d[1]), add(d[2], d[3]))));
        vf q = fma(d[1], d[1], fma(d[0], d[0], load(square + c)));
        store(square + c, add(q, fma(d[3], d[3], mul(d[2], d[2]))));
      }
    for (; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += W) {
        int n = columns - c < W ? static_cast<int>(columns - c) : W;
        vf d = sub(load_some(x + r * stride + c, n), load(centre + c));
        store(sum + c, add(load(sum + c), d));
        store(square + c, fma(d, d, load(square + c)));
      }
  }

  // Moments of `groups` groups side by side, `width` columns each (together at most kTile), as in moments.h; `added` to
  // each column, where not null.
  static void tile(const T *x, int64_t stride, int64_t rows, int64_t groups, int64_t width, const float *added,
                   Moments *out) {
    float sum[kTile + W], centre[kTile + W], square[kTile + W], middle[kTile];
    for (int64_t c = 0; c < groups * width + W; ++c) sum[c] = centre[c] = square[c] = 0;
    const int64_t head = rows < 16 ? 1 : rows / 16;
    const double count = static_cast<double>(rows * width);
    sums(x, stride, head, groups * width, sum);
    for (int64_t g = 0; g < groups; ++g) {
      float total = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c)
        total += sum[c] + (added ? static_cast<float>(head) * added[c] : 0.0f), sum[c] = 0;
      middle[g] = total / static_cast<float>(head * width);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) centre[c] = added ? middle[g] - added[c] : middle[g];
    }
    for (int64_t c = groups * width; c < groups * width + W; ++c) sum[c] = 0;
    squares(x, stride, rows, groups * width, centre, sum, square);
    for (int64_t g = 0; g < groups; ++g) {
      double s = 0, q = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        // What was taken from a column is centre + added, which the rounding of the centre leaves beside the middle.
        const double n = static_cast<double>(rows), all = static_cast<double>(sum[c]);
        const double beside = added ? static_cast<double>(centre[c]) + static_cast<double>(added[c]) - middle[g] : 0;
        s += all + n * beside;
        q += static_cast<double>(square[c]) + (2 * all + n * beside) * beside;
      }
      double m2 = q - s * s / count;
      out[g] = {static_cast<double>(middle[g]) + s / count, m2 > 0 ? m2 : 0};
    }
  }

  static void joined(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t first = chunk * s.chunk, rows = s.a->pixels - first < s.chunk ? s.a->pixels - first : s.chunk;
    if (s.a->other) join<T>(s.a, b, first, rows, g0 * s.width, (g1 - g0) * s.width, 1);
  }

  static void statistics(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t channels = s.a->channels, first = chunk * s.chunk;
    const int64_t rows = s.a->pixels - first < s.chunk ? s.a->pixels - first : s.chunk;
    joined(s, b, chunk, g0, g1);
    const T *x = input<T>(s.a, b) + first * channels;
    const float *added = s.added ? s.added + b * channels : nullptr;
    if (s.width <= kTile) {
      const int64_t step = kTile / s.width;
      for (int64_t g = g0; g < g1; g += step)
        tile(x + g * s.width, channels, rows, g1 - g < step ? g1 - g : step, s.width,
             added ? added + g * s.width : nullptr, s.at(b, chunk, g));
      return;
    }
    for (int64_t g = g0; g < g1; ++g) {  // a group wider than a tile: merge its parts
      Moments whole{0, 0};
      for (int64_t c = 0; c < s.width; c += kTile) {
        int64_t part = s.width - c < kTile ? s.width - c : kTile;
        Moments m[2] = {whole, {0, 0}};
        tile(x + g * s.width + c, channels, rows, 1, part, added ? added + g * s.width + c : nullptr, m + 1);
        whole = merged(m, 2, 1, static_cast<double>(rows * c), static_cast<double>(rows * part));
      }
      *s.at(b, chunk, g) = whole;
    }
  }

  static void apply(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t channels = s.a->channels, first = chunk * s.chunk;
    const int64_t last = s.a->pixels - first < s.chunk ? s.a->pixels : first + s.chunk;
    const int64_t c0 = g0 * s.width, columns = (g1 - g0) * s.width;
    const float *mean = s.channel + b * 3 * channels + c0, *scale = mean + channels, *shift = scale + channels;
    const bool whole = channels % (64 / static_cast<int64_t>(sizeof(T))) == 0;  // lines: all rows begin one
    leaving(output<T>(s.a, b) + c0, s.streaming && whole, [&](auto past) {
      for (int64_t r = first; r < last; r += kLines)
        block(input<T>(s.a, b) + r * channels + c0, output<T>(s.a, b) + r * channels + c0,
              last - r < kLines ? last - r : kLines, columns, mean, scale, shift, channels, past);
    });
  }
  // Up to kLines rows of n columns.
  template <class Past>
  FG_INLINE void block(const T *x, T *out, int64_t rows, int64_t columns, const float *mean, const float *scale,
                       const float *shift, int64_t stride, Past past) {
    const int64_t next = ahead(stride);
    for (int64_t c = 0; c < columns; c += W) {
      int n = columns - c < W ? static_cast<int>(columns - c) : W;
      vf m = part(mean + c, n), k = part(scale + c, n), h = part(shift + c, n);
      if (n == W && rows == kLines) {
        for (int64_t i = 0; i < kLines; ++i) __builtin_prefetch(x + i * stride + c + next);
        vf y[kLines];
        normalized<T, kSilu>(x + c, stride, m, k, h, y);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLines; ++i) leave(out + i * stride + c, y[i], past);
      } else {
        for (int64_t i = 0; i < rows; ++i)
          normalized_part<T, kSilu>(x + i * stride + c, n, m, k, h, out + i * stride + c);
      }
    }
  }
};

}  // namespace
