// levels: scalar avx2 avx512 avx512_bf16 neon
// Modulated convolution: styles on the input, one set of weights, the norm and what follows on the output.
//
// A work item is a block of rows of one sample and a range of channels out.  It lays its part of the scaled input out
// once, with zeros around, so that a tap is a constant distance: an output then is a sum over (channel, tap) of a weight
// times the flat input, and `kPanel` channels by three vectors of pixels stay in registers for the whole sum, which is
// taken in one order whatever the batch.  A transposed convolution does the same for each of its up x up phases, with
// the taps that phase meets.
//
// Where a library takes the convolution, only what stands around it is done here; see modulated_around.h.
#include <cstdlib>

#include "modulated_around.h"

namespace {

#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_NEON)
constexpr int kPanel = 8;  // channels out of a panel: with three vectors of pixels they fill 32 registers
#else
constexpr int kPanel = 4;  // ... 16 registers
#endif
constexpr int64_t kInput = 768 << 10;  // bytes of input that an item lays out, about: they stay in the second-level cache
constexpr int64_t kRange = 64;         // channels out of an item where items would be few
constexpr int64_t kFew = 8;
constexpr int64_t kMostTaps = 1024;
constexpr int kPoints = 4;  // channels out up to which a 1x1 convolution takes a sum for each

struct Tap {
  int64_t weight, offset;
  int64_t ahead;  // from the offset to what is fetched for the channel after the next: the taps share the lines out
};

// Sizes that all items share.
struct Shape {
  int64_t low_y, low_x, span_y, span_x;  // inputs before an output's own row and column, and how many it meets
  int64_t rows, columns;                 // outputs of one phase
  int64_t block, pitch, plane;           // rows of an item; floats of a row and of a channel as laid out
};

FG_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Where output row `up q + phase` meets tap k: input row q + the result, if `met`.
FG_INLINE int64_t reach(int64_t up, int64_t pad, int64_t phase, int64_t k, bool *met) {
  *met = up == 1 || (phase + pad - k) % up == 0;
  return up == 1 ? k - pad : floor_div(phase + pad - k, up);
}

FG_INLINE void span(int64_t up, int64_t pad, int64_t taps, int64_t *low, int64_t *count) {
  int64_t least = 0, most = 0;
  for (int64_t phase = 0; phase < up; ++phase) {
    for (int64_t k = 0; k < taps; ++k) {
      bool met;
      int64_t at = reach(up, pad, phase, k, &met);
      if (met && at < least) least = at;
      if (met && at > most) most = at;
    }
  }
  *low = least;
  *count = most - least + 1;
}

FG_INLINE Shape shape_of(const fg_modulated_conv2d_args *a) {
  Shape s;
  span(a->up, a->pad_y, a->taps_y, &s.low_y, &s.span_y);
  span(a->up, a->pad_x, a->taps_x, &s.low_x, &s.span_x);
  s.rows = (a->out_y + a->up - 1) / a->up;
  s.columns = (a->out_x + a->up - 1) / a->up;
  s.pitch = s.columns + s.span_x - 1;
  const int64_t fit = kInput / (4 * a->channels * s.pitch) - s.span_y + 1;
  s.block = fit < 1 ? 1 : fit < s.rows ? fit : s.rows;
  s.plane = (s.block + s.span_y - 1) * s.pitch;
  return s;
}

template <class T>
FG_INLINE void widen_row(const T *from, float *to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// Channel `o`'s weights in float32: as they are, or converted into `room`.
template <class T>
FG_INLINE const float *weights_of(const fg_modulated_conv2d_args *a, int64_t o, float *room) {
  const int64_t count = a->channels * a->taps_y * a->taps_x;
  if (a->weight_dtype == FG_FLOAT32) return static_cast<const float *>(a->weight) + o * count;
  widen_row(static_cast<const T *>(a->weight) + o * count, room, count);
  return room;
}

// norms[b * outputs + o] of channel o: 1 / sqrt(sum of (style weight)^2 + eps), squared styles repeated for each tap.
template <class T>
int norms_of(const fg_modulated_conv2d_args *a, const float *squares, float *norms) {
  const int64_t count = a->channels * a->taps_y * a->taps_x;
  return parallel_for(a->outputs, 8, [&](int64_t o) {
    float *room = static_cast<float *>(fg_scratch(static_cast<size_t>(count) * sizeof(float)));
    if (!room) return static_cast<int>(FG_NO_MEMORY);
    const float *w = weights_of<T>(a, o, room);
    for (int64_t b = 0; b < a->batch; ++b) {
      const float *s = squares + b * count;
      vf x = set1(0.0f), y = x;
      int64_t i = 0;
      for (; i + 2 * W <= count; i += 2 * W) {
        vf u = load(w + i), v = load(w + i + W);
        x = fma(mul(u, load(s + i)), u, x);
        y = fma(mul(v, load(s + i + W)), v, y);
      }
      for (; i < count; i += W) {
        const int n = count - i < W ? static_cast<int>(count - i) : W;
        vf u = load_n(w + i, n);
        x = add(x, mul(mul(u, load_n(s + i, n)), u));
      }
      norms[b * a->outputs + o] = 1.0f / __builtin_sqrtf(hsum(add(x, y)) + static_cast<float>(a->eps));
    }
    return static_cast<int>(FG_OK);
  });
}

// The input rows that outputs [first, first + block) meet, times their styles: room[channel][row][column].
template <class T>
FG_INLINE void lay_out(const fg_modulated_conv2d_args *a, const Shape &s, int64_t b, int64_t first, const float *styles, float *room) {
  const int64_t rows = s.plane / s.pitch, left = -s.low_x, right = left + a->width < s.pitch ? left + a->width : s.pitch;
  const T *x = static_cast<const T *>(a->x) + b * a->x_batch;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = first + r + s.low_y;
    const bool there = y >= 0 && y < a->height;
    const T *row = x + (there ? y : 0) * a->x_row;
    for (int64_t i = 0; i < a->channels; ++i) {
      float *to = room + i * s.plane + r * s.pitch;
      const vf style = set1(styles[i]);
      int64_t c = 0;
      for (; c < (there ? left : s.pitch); ++c) to[c] = 0.0f;
      if (!there) continue;
      if (a->x_col == 1) {
        const T *from = row + i * a->x_channel - left;
        for (; c + W <= right; c += W) store(to + c, mul(load(from + c), style));
        if (c < right) store_n(to + c, mul(load_n(from + c, static_cast<int>(right - c)), style), static_cast<int>(right - c));
      }
      for (c = right; c < s.pitch; ++c) to[c] = 0.0f;
    }
    if (!there || a->x_col == 1) continue;
    for (int64_t c = left; c < right; ++c) {  // channels are innermost
      const T *from = row + (c - left) * a->x_col;
      float *to = room + r * s.pitch + c, lanes[W];
      for (int64_t i = 0; i < a->channels; i += W) {
        const int n = a->channels - i < W ? static_cast<int>(a->channels - i) : W;
        store(lanes, mul(load_n(from + i, n), load_n(styles + i, n)));
        for (int k = 0; k < n; ++k) to[(i + k) * s.plane] = lanes[k];
      }
    }
  }
}

// kPanel channels by kVectors vectors of flat pixels, summed over channels in and taps.
template <int kVectors>
FG_INLINE void product(const float *const *w, const float *x, int64_t channels, int64_t plane, int64_t all, const Tap *taps,
                       int64_t count, float *y, int64_t y_pitch) {
  vf acc[kPanel][kVectors];
  for (int m = 0; m < kPanel; ++m)
    for (int v = 0; v < kVectors; ++v) acc[m][v] = set1(0.0f);
  for (int64_t i = 0; i < channels; ++i) {
    const float *from = x + i * plane;
    for (int64_t t = 0; t < count; ++t) {
      const float *p = from + taps[t].offset;
      const int64_t k = i * all + taps[t].weight;
      __builtin_prefetch(p + taps[t].ahead);
      vf pixel[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) pixel[v] = load(p + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < kPanel; ++m) {
        const vf weight = set1(w[m][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[m][v] = fma(weight, pixel[v], acc[m][v]);
      }
    }
  }
  for (int m = 0; m < kPanel; ++m)
    for (int v = 0; v < kVectors; ++v) store(y + m * y_pitch + v * W, acc[m][v]);
}

// One row of one channel out: the phases' sums `y` (`apart` floats from one to the next) to the output.
template <int kAct, class T>
FG_INLINE void finish_row(const fg_modulated_conv2d_args *a, const Finish &f, int64_t b, int64_t o, int64_t row, float norm,
                          const float *y, int64_t apart, float *spare, T *line) {
  const vf scale = set1(norm), bias = set1(parameter(a->bias, a->bias_dtype, o, 0.0f));
  if (a->up > 1) {
    for (int64_t c = 0; c < a->out_x; ++c) spare[c] = y[c % a->up * apart + c / a->up];
    y = spare;
  }
  const int64_t at = (b * a->noise_batch + row) * a->out_x;  // noise_batch: rows of a sample's noise, or 0
  T *out = a->channels_last ? line : static_cast<T *>(a->out) + ((b * a->outputs + o) * a->out_y + row) * a->out_x;
  for (int64_t c = 0; c < a->out_x; c += W) {
    const int n = a->out_x - c < W ? static_cast<int>(a->out_x - c) : W;
    vf v = mul(load_n(y + c, n), scale);
    if (a->noise) {
      const bool wide = a->noise_dtype == FG_FLOAT32;
      v = add(v, wide ? load_n(static_cast<const float *>(a->noise) + at + c, n) : load_n(static_cast<const T *>(a->noise) + at + c, n));
    }
    store_n(out + c, finished<kAct, T>(add(v, bias), f), n);
  }
  if (!a->channels_last) return;
  T *to = static_cast<T *>(a->out) + (b * a->out_y + row) * a->out_x * a->outputs + o;
  for (int64_t c = 0; c < a->out_x; ++c) to[c * a->outputs] = line[c];
}

// The taps of the phase (phase_y, phase_x).
FG_INLINE int64_t taps_of(const fg_modulated_conv2d_args *a, const Shape &s, int64_t phase_y, int64_t phase_x, Tap *taps) {
  int64_t n = 0;
  for (int64_t ky = 0; ky < a->taps_y; ++ky) {
    for (int64_t kx = 0; kx < a->taps_x; ++kx) {
      bool in_y, in_x;
      const int64_t y = reach(a->up, a->pad_y, phase_y, ky, &in_y), x = reach(a->up, a->pad_x, phase_x, kx, &in_x);
      if (!in_y || !in_x) continue;
      taps[n] = {ky * a->taps_x + kx, (y - s.low_y) * s.pitch + x - s.low_x, 2 * s.plane + n % 3 * W};
      ++n;
    }
  }
  return n;
}

// Channels [o0, o1) of rows [first, first + block) of a phase of sample b.
template <int kAct, class T>
int block_of(const fg_modulated_conv2d_args *a, const Shape &s, const Finish &f, int64_t b, int64_t first, int64_t o0, int64_t o1,
             const float *styles, const float *norms) {
  const int64_t all = a->taps_y * a->taps_x, rows = first + s.block < s.rows ? s.block : s.rows - first;
  const int64_t input = a->channels * s.plane + 4 * W, flat = (rows - 1) * s.pitch + s.columns;
  const int64_t wide = (flat + 3 * W - 1) / W * W, converted = a->weight_dtype == FG_FLOAT32 ? 0 : kPanel * a->channels * all;
  const int64_t floats = input + a->up * kPanel * wide + converted + 2 * (a->out_x + W);
  float *x = static_cast<float *>(fg_scratch(static_cast<size_t>(floats) * sizeof(float)));
  if (!x) return FG_NO_MEMORY;
  float *y = x + input, *room = y + a->up * kPanel * wide, *spare = room + converted;
  T *line = reinterpret_cast<T *>(spare + a->out_x + W);
  lay_out<T>(a, s, b, first, styles + b * a->channels, x);
  Tap taps[kMostTaps];
  for (int64_t o = o0; o < o1; o += kPanel) {
    const float *w[kPanel];
    const int64_t there = o1 - o < kPanel ? o1 - o : kPanel;
    for (int64_t m = 0; m < kPanel; ++m) {
      w[m] = m < there ? weights_of<T>(a, o + m, room + m * a->channels * all) : w[m - 1];
    }
    for (int64_t phase_y = 0; phase_y < a->up; ++phase_y) {
      for (int64_t phase_x = 0; phase_x < a->up; ++phase_x) {
        const int64_t count = taps_of(a, s, phase_y, phase_x, taps);
        float *to = y + phase_x * kPanel * wide;
        int64_t q = 0;
        for (; q + 2 * W < flat; q += 3 * W) product<3>(w, x + q, a->channels, s.plane, all, taps, count, to + q, wide);
        if (q + W < flat) {
          product<2>(w, x + q, a->channels, s.plane, all, taps, count, to + q, wide);
        } else if (q < flat) {
          product<1>(w, x + q, a->channels, s.plane, all, taps, count, to + q, wide);
        }
      }
      for (int64_t m = 0; m < there; ++m) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = (first + r) * a->up + phase_y;
          if (row >= a->out_y) continue;
          const float norm = a->demodulate ? norms[b * a->outputs + o + m] : 1.0f;
          finish_row<kAct>(a, f, b, o + m, row, norm, y + m * wide + r * s.pitch, kPanel * wide, spare, line);
        }
      }
    }
  }
  return FG_OK;
}

// A 1x1 convolution to few channels, as to RGB, of pixels whose channels are innermost: a sum of products a pixel and
// channel out, in order, W at a time.
template <int kAct, class T>
int to_few(const fg_modulated_conv2d_args *a, const Finish &f, const float *styles, const float *norms) {
  const int64_t channels = a->channels, count = a->outputs;
  return parallel_for(a->batch * a->height, 1 + (1 << 12) / a->width, [&](int64_t item) {
    const int64_t b = item / a->height, y = item % a->height, pitch = (channels + W - 1) / W * W;
    float *w = static_cast<float *>(fg_scratch(static_cast<size_t>(kPoints * pitch + channels) * sizeof(float)));
    if (!w) return static_cast<int>(FG_NO_MEMORY);
    float norm[kPoints] = {}, bias[kPoints] = {}, sums[kPoints];
    for (int64_t i = 0; i < kPoints * pitch; ++i) w[i] = 0.0f;
    for (int64_t o = 0; o < count; ++o) {
      const float *from = weights_of<T>(a, o, w + kPoints * pitch);
      for (int64_t c = 0; c < channels; ++c) w[o * pitch + c] = from[c] * styles[b * channels + c];
      norm[o] = a->demodulate ? norms[b * count + o] : 1.0f;
      bias[o] = parameter(a->bias, a->bias_dtype, o, 0.0f);
    }
    const T *x = static_cast<const T *>(a->x) + b * a->x_batch + y * a->x_row;
    T *out = static_cast<T *>(a->out) + item * a->width * count;
    for (int64_t i = 0; i < a->width; ++i, x += a->x_col, out += count) {
      vf sum[kPoints];
      for (int o = 0; o < kPoints; ++o) sum[o] = set1(0.0f);
      for (int64_t c = 0; c < channels; c += W) {
        const vf v = channels - c < W ? load_n(x + c, static_cast<int>(channels - c)) : load(x + c);
        for (int o = 0; o < kPoints; ++o) sum[o] = fma(v, load(w + o * pitch + c), sum[o]);
      }
      const vf noise = set1(parameter(a->noise, a->noise_dtype, (b * a->noise_batch + y) * a->width + i, 0.0f));
      for (int64_t o = 0; o < count; ++o) sums[o] = hsum(sum[o]);
      for (int64_t o = 0; o < count; o += W) {
        const int n = within(count - o);
        const vf value = add(mul(load_n(sums + o, n), load_n(norm + o, n)), noise);
        store_n(out + o, finished<kAct, T>(add(value, load_n(bias + o, n)), f), n);
      }
    }
    return static_cast<int>(FG_OK);
  });
}

template <class T>
int convolve(const fg_modulated_conv2d_args *a, float *memory) {
  const int64_t all = a->taps_y * a->taps_x, styles = a->batch * a->channels;
  float *squares = memory + styles, *norms = squares + styles * all;
  for (int64_t i = 0; i < styles; ++i) {
    memory[i] = parameter(a->styles, a->styles_dtype, i, 1.0f);
    for (int64_t t = 0; t < all; ++t) squares[i * all + t] = memory[i] * memory[i];
  }
  if (a->scaled) return scale_input<T>(a, memory);
  if (a->demodulate) {
    if (int code = norms_of<T>(a, squares, norms)) return code;
  }
  const Finish f = {static_cast<float>(a->alpha), static_cast<float>(a->gain), static_cast<float>(a->clamp)};
  if (a->product) {
    float *biases = norms + a->batch * a->outputs;
    for (int64_t o = 0; o < a->outputs; ++o) biases[o] = parameter(a->bias, a->bias_dtype, o, 0.0f);
    return with_activation(a->act, [&](auto act) { return finish_product<decltype(act)::value, T>(a, f, norms, biases); });
  }
  const bool point = all == 1 && a->up == 1 && !a->pad_y && !a->pad_x && a->outputs <= kPoints;
  if (point && a->channels_last && a->x_channel == 1) {
    return with_activation(a->act, [&](auto act) { return to_few<decltype(act)::value, T>(a, f, memory, norms); });
  }
  const Shape s = shape_of(a);
  const int64_t blocks = (s.rows + s.block - 1) / s.block;
  const int64_t range = blocks < kFew ? kRange : a->outputs, ranges = (a->outputs + range - 1) / range;
  return with_activation(a->act, [&](auto act) {
    return parallel_for(a->batch * blocks * ranges, 1, [&](int64_t item) {
      const int64_t o0 = item % ranges * range, o1 = o0 + range < a->outputs ? o0 + range : a->outputs;
      const int64_t first = item / ranges % blocks * s.block, b = item / ranges / blocks;
      return block_of<decltype(act)::value, T>(a, s, f, b, first, o0, o1, memory, norms);
    });
  });
}

}  // namespace

extern "C" int FG_EXPORT(modulated_conv2d)(const fg_modulated_conv2d_args *a) {
  if (!a->batch || !a->outputs) return FG_OK;
  const int64_t styles = a->batch * a->channels, floats = styles * (1 + a->taps_y * a->taps_x) + (a->batch + 1) * a->outputs;
  float *memory = static_cast<float *>(std::malloc(static_cast<size_t>(floats) * sizeof(float)));
  if (!memory) return FG_NO_MEMORY;
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32) code = convolve<float>(a, memory);
  if (a->dtype == FG_BFLOAT16) code = convolve<bf16>(a, memory);
  if (a->dtype == FG_FLOAT16) code = convolve<fp16>(a, memory);
  std::free(memory);
  return code;
}
