// Group normalization (+ SiLU), contiguous and channels-last, of x, of x + add, or of something joined from two tensors.
//
// A group's statistics are taken chunk by chunk and merged in the chunks' order; the chunks depend on the sizes of one
// sample alone, so neither threads nor batch change a bit.  Where the groups of one work item fit the second-level
// cache or, one at a time, the last one, the item takes the statistics and normalizes: memory is read once.  Else the two
// are separate sweeps, over as much at a time as the last cache holds, so that the second finds there what the first read.
// Where whoever made x, or its parts, left the moments of its channels, one sweep is left.
// What is added a channel goes into the statistics and the mean, so that it costs nothing an element; what is joined is
// written chunk by chunk, just before the chunk is read.
#pragma once
#include "group_norm_last.h"

namespace {

constexpr int64_t kResident = 1 << 20;   // bytes of x that one work item may hold in cache
constexpr int64_t kSmall = 1 << 15;      // bytes of x below which one thread is enough
constexpr int64_t kRun = 64;             // work items, at most, that a thread takes together
constexpr int64_t kTogether = 16;        // contiguous chunks, at most, of a sweep that a thread takes together

// Groups contiguous in memory: a chunk is kChunk elements of the group's slab.
template <class T, bool kSilu>
struct Contiguous {
  static void joined(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t slab = s.width * s.a->pixels, first = chunk * s.chunk;
    const int64_t n = slab - first < s.chunk ? slab - first : s.chunk;
    for (int64_t g = g0; s.a->other && g < g1; ++g) join<T>(s.a, b, 0, 1, g * slab + first, n, s.a->pixels);
  }
  static void statistics(const Shared &s, int64_t b, int64_t chunk, int64_t g0, int64_t g1) {
    const int64_t slab = s.width * s.a->pixels, first = chunk * s.chunk;
    const int64_t n = slab - first < s.chunk ? slab - first : s.chunk;
    for (int64_t g = g0; g < g1; ++g) {
      joined(s, b, chunk, g, g + 1);
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
        const T *x = input<T>(s.a, b) + g * slab + e;
        T *out = output<T>(s.a, b) + g * slab + e;
        leaving(out, s.streaming, [&](auto past) {
          row(x, out, end - e, own[0], own[channels], own[2 * channels], s.ahead, past);
        });
        e = end;
      }
  }
  template <class Past>
  FG_INLINE void row(const T *x, T *out, int64_t n, float mean, float scale, float shift, int64_t ahead, Past past) {
    const vf m = set1(mean), a = set1(scale), b = set1(shift);
    int64_t i = 0;
    for (; i + kAtOnce * W <= n; i += kAtOnce * W) {
      // The next groups: memory would be idle while these, which are in the cache, are normalized.
      for (int64_t line = 0; ahead && line < kAtOnce * W; line += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(x + i + ahead + line);
      vf y[kAtOnce];
      normalized<T, kSilu>(x + i, W, m, a, b, y);
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; ++v) leave(out + i + v * W, y[v], past);
    }
    for (; i < n; i += W)
      normalized_part<T, kSilu>(x + i, n - i < W ? static_cast<int>(n - i) : W, m, a, b, out + i);
  }
};

// The moments of a group by those of its channels, each with what is added to it.
Moments of_group(const Shared &s, int64_t b, int64_t g) {
  const int64_t channels = s.a->channels, c0 = g * s.width;
  const double *mean = static_cast<const double *>(s.a->moments) + b * 2 * channels + c0, *variance = mean + channels;
  const float *added = s.added ? s.added + b * channels + c0 : nullptr;
  double sum = 0, spread = 0;
  for (int64_t c = 0; c < s.width; ++c) sum += mean[c] + (added ? static_cast<double>(added[c]) : 0);
  const double middle = sum / static_cast<double>(s.width);
  for (int64_t c = 0; c < s.width; ++c) {
    const double apart = mean[c] + (added ? static_cast<double>(added[c]) : 0) - middle;
    spread += variance[c] + apart * apart;
  }
  return {middle, spread * static_cast<double>(s.a->pixels)};
}

// The rows of s.channel for groups [g0, g1) of a sample.
template <bool kLast>
void finish(const Shared &s, int64_t b, int64_t g0, int64_t g1) {
  const fg_group_norm_args *a = s.a;
  const int64_t unit = kLast ? s.width : 1, all = kLast ? a->pixels : a->pixels * s.width;
  const double full = static_cast<double>(s.chunk * unit);
  const double last = static_cast<double>((all - (s.chunks - 1) * s.chunk) * unit);
  float *mean = s.channel + b * 3 * a->channels, *scale = mean + a->channels, *shift = scale + a->channels;
  for (int64_t g = g0; g < g1; ++g) {
    Moments m = a->moments ? of_group(s, b, g) : merged(s.at(b, 0, g), s.chunks, a->groups, full, last);
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
  const int64_t even = ceil_div(a->batch * a->groups, fg_threads());  // an equal share for every thread
  // A thread goes through the groups one by one, and two at a time are to be found in the last cache.
  if (!kLast && group_bytes > kResident && even > 1 && 4 * fg_threads() * group_bytes <= fg_cache_bytes()) return 1;
  int64_t most = kResident / (group_bytes > 0 ? group_bytes : 1);
  most = most < a->groups ? most : a->groups;
  if (!most) return 0;
  int64_t groups = even < most ? even : most;
  if (!kLast && groups * group_bytes > kSmall) groups = kSmall / group_bytes > 1 ? kSmall / group_bytes : 1;
  // A run of channels shorter than a few cache lines would waste what memory delivers.
  bool narrow = kLast && groups < a->groups && groups * (a->channels / a->groups) * element < 256;
  return narrow ? 0 : groups;
}

// Both sweeps over `step` groups at a time.  Where memory is read and written, a thread takes the statistics of the next
// ones while it normalizes these: else it would be written only now, and read only then.
template <class Sweep, bool kLast>
int whole_groups(Shared s, int64_t step, int64_t grain, int64_t group_bytes) {
  const fg_group_norm_args *a = s.a;
  const int64_t items = ceil_div(a->groups, step), all = a->batch * items;
  int64_t run = all / (group_bytes > kResident ? fg_threads() : 4 * fg_threads());  // what one thread does in a row
  run = run < 1 ? 1 : run > kRun ? kRun : run;
  const bool both = !kLast && s.streaming;
  if (!kLast && !a->other && run > 1 && (both || 2 * step * group_bytes <= kResident)) s.ahead = step * s.width * a->pixels;
  const auto each = [&](int64_t item, const auto &body) {
    const int64_t g0 = item % items * step;
    body(item / items, g0, g0 + step < a->groups ? g0 + step : a->groups);
  };
  const auto finished = [&](int64_t item) {
    each(item, [&](int64_t b, int64_t g0, int64_t g1) { finish<kLast>(s, b, g0, g1); });
  };
  const auto sweep = [&](int64_t item, int64_t chunk, auto body) {
    each(item, [&](int64_t b, int64_t g0, int64_t g1) { body(s, b, chunk, g0, g1); });
  };
  return parallel_for(ceil_div(all, run), grain, [&](int64_t turn) {
    const int64_t first = turn * run, end = first + run < all ? first + run : all;
    for (int64_t item = first; item < end; ++item) {
      for (int64_t i = 0; (!both || item == first) && i < s.chunks; ++i) sweep(item, i, Sweep::statistics);
      finished(item);
      for (int64_t i = 0; i < s.chunks; ++i) {
        sweep(item, i, Sweep::apply);
        if (both && item + 1 < end) sweep(item + 1, i, Sweep::statistics);
      }
    }
    if (s.streaming) streamed();
    return 0;
  });
}

// Each sweep over as much as the last cache holds; as above, the statistics of what comes next while this is normalized.
template <class Sweep, bool kLast>
int separate_sweeps(const Shared &s, int64_t grain, int64_t group_bytes) {
  const fg_group_norm_args *a = s.a;
  const int64_t blocks = kLast ? 1 : a->groups, width = a->groups / blocks, all = a->batch * blocks;
  const int64_t fit = fg_cache_bytes() / (8 * width * group_bytes);
  const int64_t together = fit < 1 ? 1 : fit < all ? fit : all, share = together * s.chunks / (4 * fg_threads());
  const int64_t run = kLast || share < 1 ? 1 : share < kTogether ? share : kTogether;  // chunks a thread takes in a row
  const auto chunks = [&](int64_t first) { return (all - first < together ? all - first : together) * s.chunks; };
  const auto sweep = [&](int64_t first, int64_t from, auto body) {
    for (int64_t item = from; item < from + run && item < chunks(first); ++item) {
      const int64_t block = (first + item / s.chunks) % blocks, b = (first + item / s.chunks) / blocks;
      body(s, b, item % s.chunks, block * width, (block + 1) * width);
    }
  };
  for (int64_t first = -together; first < all; first += together) {
    const int64_t next = first + together, now = first < 0 ? 0 : ceil_div(chunks(first), run);
    const int64_t then = next < all ? ceil_div(chunks(next), run) : 0;
    const auto turn = [&](int64_t statistics, int64_t apply) {
      parallel_for(statistics > apply ? statistics : apply, grain, [&](int64_t i) {
        if (i < statistics) sweep(next, i * run, Sweep::statistics);
        if (i < apply) sweep(first, (apply - 1 - i) * run, Sweep::apply);  // from the end, which was read last
        if (s.streaming) streamed();
        return 0;
      });
    };
    turn(s.streaming ? then : 0, now);
    if (!s.streaming) turn(then, 0);
    for (int64_t i = next; i < next + together && i < all; ++i)
      finish<kLast>(s, i / blocks, i % blocks * width, (i % blocks + 1) * width);
  }
  return FG_OK;
}

// The second sweep alone, where the statistics are given; from the end, which whoever made x may have left in a cache.
template <class Sweep, bool kLast>
int one_sweep(const Shared &s, int64_t grain) {
  const fg_group_norm_args *a = s.a;
  const int64_t blocks = kLast ? 1 : a->groups, width = a->groups / blocks, all = a->batch * blocks * s.chunks;
  for (int64_t b = 0; b < a->batch; ++b) finish<kLast>(s, b, 0, a->groups);
  return parallel_for(all, grain, [&](int64_t i) {
    const int64_t item = all - 1 - i, block = item / s.chunks % blocks;
    Sweep::joined(s, item / s.chunks / blocks, item % s.chunks, block * width, (block + 1) * width);
    Sweep::apply(s, item / s.chunks / blocks, item % s.chunks, block * width, (block + 1) * width);
    if (s.streaming) streamed();
    return 0;
  });
}

template <template <class, bool> class Layout, class T, bool kSilu, bool kLast>
int normalize(const fg_group_norm_args *a) {
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
  const int64_t bytes = a->batch * a->groups * group_bytes;
  s.streaming = streams((a->other ? 4 : 2) * bytes);
  const int64_t grain = bytes < kSmall ? a->batch * a->groups * s.chunks + 1 : 1;
  if (a->moments) return one_sweep<Layout<T, kSilu>, kLast>(s, grain);
  const int64_t step = groups_an_item<kLast>(a, group_bytes, element);
  if (step) return whole_groups<Layout<T, kSilu>, kLast>(s, step, grain, group_bytes);
  return separate_sweeps<Layout<T, kSilu>, kLast>(s, grain, group_bytes);
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
