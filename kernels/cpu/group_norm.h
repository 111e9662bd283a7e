// Group normalization (+ SiLU), contiguous and channels-last, of x, of x + add, or of something joined from two tensors.
//
// A group's statistics are taken chunk by chunk and merged in the chunks' order; the chunks depend on the sizes of one
// sample alone, so neither threads nor batch change a bit.  Where the groups of one work item fit the second-level
// cache, the item takes the statistics and normalizes: memory is read once.  Else the two are separate sweeps, over as
// much at a time as the last cache holds, so that the second finds there what the first has read.
// What is added a channel goes into the statistics and the mean, so that it costs nothing an element; what is joined is
// written chunk by chunk, just before the statistics of the chunk are taken from it.
#pragma once
#include "abi.h"
#include "moments.h"
#include "silu.h"
#include "stream.h"
#include "vectors.h"

namespace {

constexpr int64_t kResident = 1 << 20;   // bytes of x that one work item may hold in cache
constexpr int64_t kSmall = 1 << 15;      // bytes of x below which one thread is enough
constexpr int64_t kRun = 8;              // work items, at most, that a thread takes together
constexpr int64_t kTogether = 16;        // contiguous chunks, at most, of a sweep that a thread takes together
constexpr int64_t kChunk = 4096;         // elements of a contiguous chunk
constexpr int64_t kRows = 256;           // pixels of a channels-last chunk
constexpr int64_t kTile = 1024;          // channels of it handled together
constexpr int64_t kColumns = 512;        // ... made in a buffer together

template <class T, bool kSilu>
FG_INLINE vf normalized(vf x, vf mean, vf scale, vf shift) {
  vf y = fma(sub(x, mean), scale, shift);
  return kSilu ? silu<T>(y) : y;
}

// What all work items share.  `channel` holds, per sample, three rows of C: the mean's float32 part, scale, shift.
struct Shared {
  const fg_group_norm_args *a;
  int64_t width, chunks, chunk;  // channels a group; chunks a sample or slab, and their pixels or elements
  Moments *partial;              // [batch][chunk][group]
  float *channel;                // [batch][3][C]
  float *added;                  // [batch][C], or null where nothing is added
  int64_t ahead;                 // elements from those being normalized to those to be prefetched, or 0
  bool streaming;                // whether the output is written past the caches
  Moments *at(int64_t b, int64_t chunk_index, int64_t group) const {
    return partial + (b * chunks + chunk_index) * a->groups + group;
  }
};

// What is normalized: x, or what was joined.
template <class T>
FG_INLINE const T *input(const fg_group_norm_args *a, int64_t b) {
  if (a->other) return static_cast<const T *>(a->joined) + b * a->channels * a->pixels;
  return static_cast<const T *>(a->x) + b * a->x_batch;
}
template <class T>
FG_INLINE T *output(const fg_group_norm_args *a, int64_t b) {
  return static_cast<T *>(a->out) + b * a->channels * a->pixels;
}

// Joins columns [c0, c0 + n) of rows [r0, r0 + rows) of a sample: a row is a pixel's channels where these are innermost,
// else the whole sample.
template <class T>
void join(const fg_group_norm_args *a, int64_t b, int64_t r0, int64_t rows, int64_t c0, int64_t n, int64_t unit) {
  const int64_t left = a->split * unit, width = a->channels * unit, right = a->concat ? width - left : width;
  const T *x = static_cast<const T *>(a->x) + b * a->x_batch, *other = static_cast<const T *>(a->other) + b * a->other_batch;
  T *joined = static_cast<T *>(a->joined) + b * a->channels * a->pixels;
  for (int64_t r = r0; r < r0 + rows; ++r) {
    T *out = joined + r * width + c0;
    if (!a->concat) {
      add_row<T, T>(x + r * left + c0, other + r * right + c0, nullptr, out, n);
      continue;
    }
    const int64_t first = c0 >= left ? 0 : c0 + n <= left ? n : left - c0;  // columns that are x's
    __builtin_memcpy(out, x + r * left + c0, static_cast<size_t>(first) * sizeof(T));
    __builtin_memcpy(out + first, other + r * right + c0 + first - left, static_cast<size_t>(n - first) * sizeof(T));
  }
}

// Groups contiguous in memory: a chunk is kChunk elements of the group's slab.
template <class T, bool kSilu>
struct Contiguous {
  static void statistics(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t slab = s.width * s.a->pixels, first = chunk * s.chunk;
    const int64_t n = slab - first < s.chunk ? slab - first : s.chunk;
    for (int64_t g = g0; g < g1; ++g) {
      if (s.a->other) join<T>(s.a, b, 0, 1, g * slab + first, n, s.a->pixels);
      *s.at(b, chunk, g) = s.added ? of_channels(s, b, g, first, n) : moments_of(input<T>(s.a, b) + g * slab + first, n);
    }
  }
  // The moments of elements [first, first + n) of a group with each channel's own value added.
  static Moments of_channels(const Shared &s, int64_t b, int64_t g, int64_t first, int64_t n) {
    const int64_t pixels = s.a->pixels, c0 = g * s.width;
    const T *x = input<T>(s.a, b) + c0 * pixels;
    Moments whole{0, 0};
    for (int64_t e = first; e < first + n;) {
      int64_t c = e / pixels, end = (c + 1) * pixels < first + n ? (c + 1) * pixels : first + n;
      Moments m[2] = {whole, moments_of(x + e, end - e)};
      m[1].mean += static_cast<double>(s.added[b * s.a->channels + c0 + c]);
      whole = merged(m, 2, 1, static_cast<double>(e - first), static_cast<double>(end - e));
      e = end;
    }
    return whole;
  }
  static void apply(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t pixels = s.a->pixels, slab = s.width * pixels, channels = s.a->channels;
    const int64_t first = chunk * s.chunk, last = slab - first < s.chunk ? slab : first + s.chunk;
    const float *means = s.channel + b * 3 * channels;
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t e = first; e < last;) {
        int64_t c = e / pixels, end = (c + 1) * pixels < last ? (c + 1) * pixels : last;
        const float *own = means + g * s.width + c;
        row(input<T>(s.a, b) + g * slab + e, output<T>(s.a, b) + g * slab + e, end - e, own[0], own[channels],
            own[2 * channels], s);
        e = end;
      }
  }
  FG_INLINE void row(const T *x, T *out, int64_t n, float mean, float scale, float shift, const Shared &s) {
    pieces(out, n, s.streaming,
           [&](int64_t i, int64_t m, T *to) { piece(x + i, to, m, mean, scale, shift, s.ahead); });
  }
  FG_INLINE void piece(const T *x, T *out, int64_t n, float mean, float scale, float shift, int64_t ahead) {
    const vf m = set1(mean), a = set1(scale), b = set1(shift);
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      if (ahead) {  // the next groups: memory would be idle while these, which are in the cache, are normalized
        __builtin_prefetch(x + i + ahead);
        if (sizeof(T) == 4) __builtin_prefetch(x + i + ahead + W);
      }
      vf y = normalized<T, kSilu>(load(x + i), m, a, b), z = normalized<T, kSilu>(load(x + i + W), m, a, b);
      store(out + i, y);
      store(out + i + W, z);
    }
    for (; i < n; i += W) {
      int rest = n - i < W ? static_cast<int>(n - i) : W;
      store_n(out + i, normalized<T, kSilu>(load_n(x + i, rest), m, a, b), rest);
    }
  }
};

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
  FG_INLINE vf load_some(const T *p, int n) { return n == W ? load(p) : load_n(p, n); }

  // The same of d = x - centre[c] and of d^2.
  FG_INLINE void squares(const T *x, int64_t stride, int64_t rows, int64_t columns, const float *centre, float *sum,
                         float *square) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2)
      for (int64_t c = 0; c < columns; c += W) {
        const T *p = x + r * stride + c;
        int n = columns - c < W ? static_cast<int>(columns - c) : W;
        vf m = load(centre + c);
        __builtin_prefetch(p + 4 * stride);
        __builtin_prefetch(p + 5 * stride);
        vf d = sub(load_some(p, n), m), e = sub(load_some(p + stride, n), m);
        store(sum + c, add(load(sum + c), add(d, e)));
        store(square + c, fma(e, e, fma(d, d, load(square + c))));
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

  static void statistics(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t channels = s.a->channels, first = chunk * s.chunk;
    const int64_t rows = s.a->pixels - first < s.chunk ? s.a->pixels - first : s.chunk;
    if (s.a->other) join<T>(s.a, b, first, rows, g0 * s.width, (g1 - g0) * s.width, 1);
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
    alignas(64) T buffer[4][kColumns];
    for (int64_t r = first; r < last; r += 4) {
      const int64_t rows = last - r < 4 ? last - r : 4, most = s.streaming ? kColumns : columns;
      const T *x = input<T>(s.a, b) + r * channels + c0;
      T *out = output<T>(s.a, b) + r * channels + c0;
      for (int64_t c = 0; c < columns; c += most) {
        const int64_t n = columns - c < most ? columns - c : most;
        T *to = s.streaming ? buffer[0] : out + c;
        block(x + c, to, rows, n, mean + c, scale + c, shift + c, channels, s.streaming ? kColumns : channels);
        for (int64_t i = 0; s.streaming && i < rows; ++i) stream<T>(buffer[i], out + i * channels + c, n);
      }
    }
  }
  // Up to four rows of n columns.
  FG_INLINE void block(const T *x, T *out, int64_t rows, int64_t columns, const float *mean, const float *scale,
                       const float *shift, int64_t stride, int64_t out_stride) {
    for (int64_t c = 0; c < columns; c += W) {
      int n = columns - c < W ? static_cast<int>(columns - c) : W;
      vf m = part(mean + c, n), k = part(scale + c, n), h = part(shift + c, n);
      if (n == W && rows == 4)
        for (int64_t i = 0; i < 4; ++i) {
          __builtin_prefetch(x + (i + 4) * stride + c);
          store(out + i * out_stride + c, normalized<T, kSilu>(load(x + i * stride + c), m, k, h));
        }
      else
        for (int64_t i = 0; i < rows; ++i)
          store_n(out + i * out_stride + c, normalized<T, kSilu>(load_n(x + i * stride + c, n), m, k, h), n);
    }
  }
};

// The rows of s.channel for groups [g0, g1) of a sample.
template <bool kLast>
void finish(const Shared &s, int64_t b, int64_t g0, int64_t g1) {
  const fg_group_norm_args *a = s.a;
  const int64_t unit = kLast ? s.width : 1, all = kLast ? a->pixels : a->pixels * s.width;
  const double full = static_cast<double>(s.chunk * unit);
  const double last = static_cast<double>((all - (s.chunks - 1) * s.chunk) * unit);
  float *mean = s.channel + b * 3 * a->channels, *scale = mean + a->channels, *shift = scale + a->channels;
  for (int64_t g = g0; g < g1; ++g) {
    Moments m = merged(s.at(b, 0, g), s.chunks, a->groups, full, last);
    double deviation = 1.0 / __builtin_sqrt(m.m2 / static_cast<double>(a->pixels * s.width) + a->eps);
    for (int64_t c = g * s.width; c < (g + 1) * s.width; ++c) {
      double gain = 1.0 + static_cast<double>(parameter(a->scale, a->scale_dtype, b * a->scale_batch + c, 0.0f));
      double k = deviation * static_cast<double>(parameter(a->weight, a->weight_dtype, c, 1.0f)) * gain;
      double offset = static_cast<double>(parameter(a->bias, a->bias_dtype, c, 0.0f)) * gain +
                      static_cast<double>(parameter(a->shift, a->shift_dtype, b * a->shift_batch + c, 0.0f));
      double own = s.added ? m.mean - static_cast<double>(s.added[b * a->channels + c]) : m.mean;  // to take from x
      mean[c] = static_cast<float>(own);
      scale[c] = static_cast<float>(k);
      shift[c] = static_cast<float>(offset - (own - static_cast<double>(mean[c])) * k);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many groups of a sample one work item takes whole, or 0 where the sweeps are to be separate.
template <bool kLast>
int64_t groups_an_item(const fg_group_norm_args *a, int64_t group_bytes, int64_t element) {
  int64_t most = kResident / (group_bytes > 0 ? group_bytes : 1);
  most = most < a->groups ? most : a->groups;
  if (!most) return 0;
  int64_t even = ceil_div(a->batch * a->groups, fg_threads());  // an equal share for every thread
  int64_t groups = even < most ? even : most;
  if (!kLast && groups * group_bytes > kSmall) groups = kSmall / group_bytes > 1 ? kSmall / group_bytes : 1;
  // A run of channels shorter than a few cache lines would waste what memory delivers.
  bool narrow = kLast && groups < a->groups && groups * (a->channels / a->groups) * element < 256;
  return narrow ? 0 : groups;
}

template <template <class, bool> class Layout, class T, bool kSilu, bool kLast>
int normalize(const fg_group_norm_args *a) {
  using Sweep = Layout<T, kSilu>;
  Shared s{a, a->channels / a->groups, 0, kLast ? kRows : kChunk, nullptr, nullptr, nullptr, 0, false};
  s.chunks = ceil_div(kLast ? a->pixels : a->pixels * s.width, s.chunk);
  const int64_t partials = a->batch * s.chunks * a->groups * static_cast<int64_t>(sizeof(Moments));
  const int64_t values = a->batch * a->channels;
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(partials + 4 * values * 4)));
  if (!memory) return FG_NO_MEMORY;
  s.partial = reinterpret_cast<Moments *>(memory);
  s.channel = reinterpret_cast<float *>(memory + partials);
  if (a->add) {
    s.added = s.channel + 3 * values;
    for (int64_t i = 0; i < values; ++i)
      s.added[i] = parameter(a->add, a->add_dtype, i / a->channels * a->add_batch + i % a->channels, 0.0f);
  }
  const int64_t element = static_cast<int64_t>(sizeof(T)), group_bytes = s.width * a->pixels * element;
  s.streaming = streams((a->other ? 4 : 2) * a->batch * a->groups * group_bytes);
  const int64_t grain = a->batch * a->groups * group_bytes < kSmall ? a->batch * a->groups * s.chunks + 1 : 1;
  if (int64_t step = groups_an_item<kLast>(a, group_bytes, element)) {
    const int64_t items = ceil_div(a->groups, step), all = a->batch * items;
    int64_t run = all / (4 * fg_threads());  // what one thread does in a row
    run = run < 1 ? 1 : run > kRun ? kRun : run;
    if (!kLast && !a->other && run > 1 && 2 * step * group_bytes <= kResident) s.ahead = step * s.width * a->pixels;
    return parallel_for(ceil_div(all, run), grain, [&](int64_t first) {
      for (int64_t item = first * run; item < all && item < (first + 1) * run; ++item) {
        int64_t b = item / items, g0 = item % items * step, g1 = g0 + step < a->groups ? g0 + step : a->groups;
        for (int64_t i = 0; i < s.chunks; ++i) Sweep::statistics(s, b, i, g0, g1);
        finish<kLast>(s, b, g0, g1);
        for (int64_t i = 0; i < s.chunks; ++i) Sweep::apply(s, b, i, g0, g1);
      }
      if (s.streaming) streamed();
      return 0;
    });
  }
  const int64_t blocks = kLast ? 1 : a->groups, width = a->groups / blocks, all = a->batch * blocks;
  const int64_t bytes = width * group_bytes, fit = fg_cache_bytes() / (8 * (bytes > 0 ? bytes : 1));
  const int64_t together = fit < 1 ? 1 : fit < all ? fit : all;  // blocks that both sweeps take before the next
  for (int64_t first = 0; first < all; first += together) {
    const int64_t count = all - first < together ? all - first : together;
    auto each = [&](void (*sweep)(const Shared &, int64_t, int64_t, int64_t, int64_t), bool back) {
      const int64_t chunks = count * s.chunks, most = kLast ? 1 : kTogether, share = chunks / (4 * fg_threads());
      const int64_t run = share < 1 ? 1 : share < most ? share : most, runs = ceil_div(chunks, run);
      parallel_for(runs, grain, [&](int64_t i) {
        const int64_t from = (back ? runs - 1 - i : i) * run, to = from + run < chunks ? from + run : chunks;
        for (int64_t item = from; item < to; ++item) {
          const int64_t block = (first + item / s.chunks) % blocks, b = (first + item / s.chunks) / blocks;
          sweep(s, b, item % s.chunks, block * width, (block + 1) * width);
        }
        if (s.streaming) streamed();
        return 0;
      });
    };
    each(Sweep::statistics, false);
    parallel_for(count, 16, [&](int64_t i) {
      const int64_t block = (first + i) % blocks, b = (first + i) / blocks;
      return finish<kLast>(s, b, block * width, (block + 1) * width), 0;
    });
    each(Sweep::apply, true);  // from the end, which was read last
  }
  return FG_OK;
}

template <class T>
int dispatch(const fg_group_norm_args *a) {
  // With one pixel the two layouts are the same memory, and the channels are the long axis.
  if (a->channels_last || a->pixels == 1)
    return a->silu ? normalize<ChannelsLast, T, true, true>(a) : normalize<ChannelsLast, T, false, true>(a);
  return a->silu ? normalize<Contiguous, T, true, false>(a) : normalize<Contiguous, T, false, false>(a);
}

// By the element type.
inline int normalize_groups(const fg_group_norm_args *args) {
  if (!args->batch || !args->channels || !args->pixels) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32: return dispatch<float>(args);
    case FG_BFLOAT16: return dispatch<bf16>(args);
    case FG_FLOAT16: return dispatch<fp16>(args);
    default: return FG_BAD_ARGUMENT;
  }
}

}  // namespace
