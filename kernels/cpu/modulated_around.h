// Around a library's convolution: x times its styles before it, and norm, noise, bias and activation after it.
//
// The library takes and gives pixels whose channels are innermost; x and out may have them outermost, and are then turned
// by squares of kSide channels and pixels.
#pragma once
#include "abi.h"
#include "activation.h"
#include "moments.h"
#include "threads.h"
#include "turn.h"

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread, at least

// a->scaled = x times the styles, (batch, height, width, channels).
template <class T>
int scale_input(const fg_modulated_conv2d_args *a, const float *styles) {
  const int64_t channels = a->channels, width = a->width;
  return parallel_for(a->batch * a->height, 1 + kGrain / (channels * width), [&](int64_t item) {
    const int64_t b = item / a->height;
    const T *x = static_cast<const T *>(a->x) + b * a->x_batch + item % a->height * a->x_row;
    T *to = static_cast<T *>(a->scaled) + item * width * channels;
    const float *style = styles + b * channels;
    if (a->x_col != 1 || channels == 1) {
      for (int64_t w = 0; w < width; ++w)
        for (int64_t c = 0; c < channels; c += W) {
          const int n = within(channels - c);
          store_n(to + w * channels + c, mul(load_n(x + w * a->x_col + c, n), load_n(style + c, n)), n);
        }
      return 0;
    }
    for (int64_t c = 0; c < channels; c += kSide)
      for (int64_t w = 0; w < width; w += kSide) {
        const int64_t rows = channels - c < kSide ? channels - c : kSide, columns = width - w < kSide ? width - w : kSide;
        turned(rows, columns, to + w * channels + c, channels, [&](int64_t i, int64_t v, int n) {
          return mul(load_n(x + (c + i) * a->x_channel + w + v, n), set1(style[c + i]));
        });
      }
    return 0;
  });
}

// out from a->product (batch, out_y, out_x, outputs), the convolution.
template <int kAct, class T>
int finish_product(const fg_modulated_conv2d_args *a, const Finish &f, const float *norms, const float *biases) {
  const int64_t outputs = a->outputs, width = a->out_x, plane = a->out_y * width;
  return parallel_for(a->batch * a->out_y, 1 + kGrain / (outputs * width), [&](int64_t item) {
    const int64_t b = item / a->out_y, y = item % a->out_y;
    const T *from = static_cast<const T *>(a->product) + item * width * outputs;
    T *out = static_cast<T *>(a->out) + (a->channels_last ? item * width * outputs : b * outputs * plane + y * width);
    const float *norm = norms + b * outputs;
    auto pixel = [&](int64_t w, int64_t o, int n) {
      const float noise = parameter(a->noise, a->noise_dtype, (b * a->noise_batch + y) * width + w, 0.0f);
      vf v = load_n(from + w * outputs + o, n);
      if (a->demodulate) v = mul(v, load_n(norm + o, n));
      return finished<kAct, T>(add(add(v, set1(noise)), load_n(biases + o, n)), f);
    };
    if (a->channels_last) {
      for (int64_t w = 0; w < width; ++w)
        for (int64_t o = 0; o < outputs; o += W) {
          const int n = within(outputs - o);
          store_n(out + w * outputs + o, pixel(w, o, n), n);
        }
      return 0;
    }
    for (int64_t o = 0; o < outputs; o += kSide)
      for (int64_t w = 0; w < width; w += kSide) {
        const int64_t rows = width - w < kSide ? width - w : kSide, columns = outputs - o < kSide ? outputs - o : kSide;
        turned(rows, columns, out + o * plane + w, plane, [&](int64_t i, int64_t v, int n) { return pixel(w + i, o + v, n); });
      }
    return 0;
  });
}

}  // namespace
