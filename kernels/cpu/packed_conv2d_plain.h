// A 3x3 convolution by packed taps a pixel at a time, where there are no tiles.
#pragma once
#include "panel.h"
#include "threads.h"

namespace {

constexpr int64_t LANES = 2 * kPanel;  // outputs by two inputs
constexpr int64_t kItem = 1 << 18;     // multiply-adds that are worth a thread

using Sums = vf[kParts];

FG_INLINE float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Adds the products of a pixel's channels by one tap of a group, whose pairs lie `step` apart.
FG_INLINE void multiply(const bf16 *pixel, const bf16 *taps, int64_t step, int64_t inputs, Sums &sums) {
  for (int64_t i = 0; i < inputs; i += 2, taps += step) {
    const vf first = set1(wide(pixel[i])), second = set1(i + 1 < inputs ? wide(pixel[i + 1]) : 0.0f);
    for (int v = 0; v < kParts; ++v) {
      vf even, odd;
      deinterleave(load(taps + 2 * v * W), load(taps + (2 * v + 1) * W), even, odd);
      sums[v] = fma(odd, second, fma(even, first, sums[v]));
    }
  }
}

// The sums of the output pixel (row, column) of a sample by a group's taps: its nine in order, or where doubled the four
// of its place in a pixel's 2 x 2, those outside the image left out.
FG_INLINE void pixel(const fg_packed_conv2d_args *a, const bf16 *x, const bf16 *taps, int64_t row, int64_t column,
                     Sums &sums) {
  const int64_t side = a->doubled ? 2 : 3, step = side * side * LANES, places = a->doubled ? 2 : 1;
  const int64_t p = row % places, q = column % places, first_row = row / places * a->stride + p - 1;
  const int64_t first_column = column / places * a->stride + q - 1;
  taps += (p * places + q) * ((a->inputs + 1) / 2) * step;
  for (vf &sum : sums) sum = set1(0.0f);
  for (int64_t tap = 0; tap < side * side; ++tap) {
    const int64_t down = first_row + tap / side, across = first_column + tap % side;
    if (down < 0 || down >= a->height || across < 0 || across >= a->width) continue;
    multiply(x + (down * a->width + across) * a->inputs, taps + tap * LANES, step, a->inputs, sums);
  }
}

// Adds bias and residual to the sums of outputs [first, first + kPanel), and writes those that there are from `at` on.
FG_INLINE void put(const fg_packed_conv2d_args *a, const Sums &sums, int64_t first, int64_t at) {
  const int64_t left = a->outputs - first;
  vf bias[kParts];
  get_bias(a->bias, a->bias_dtype, first, left, bias);
  for (int v = 0; v < kParts; ++v) {
    const int some = columns(left, v);
    vf y = add(sums[v], bias[v]);
    if (a->residual) y = add(y, load_n(static_cast<const bf16 *>(a->residual) + at + v * W, some));
    store_n(static_cast<bf16 *>(a->out) + at + v * W, y, some);
  }
}

// The mean and variance of a sample's channels, in two passes.
void take_moments(const fg_packed_conv2d_args *a, int64_t sample, int64_t pixels) {
  const bf16 *out = static_cast<const bf16 *>(a->out) + sample * pixels * a->outputs;
  double *mean = static_cast<double *>(a->moments) + sample * 2 * a->outputs, *variance = mean + a->outputs;
  for (int64_t o = 0; o < a->outputs; ++o) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < pixels; ++i) sum += static_cast<double>(wide(out[i * a->outputs + o]));
    mean[o] = sum / static_cast<double>(pixels);
    for (int64_t i = 0; i < pixels; ++i) {
      const double apart = static_cast<double>(wide(out[i * a->outputs + o])) - mean[o];
      squares += apart * apart;
    }
    variance[o] = squares / static_cast<double>(pixels);
  }
}

int convolve(const fg_packed_conv2d_args *a) {
  const int64_t times = a->doubled ? 2 : 1, taps = a->doubled ? 16 : 9;  // of a group and pair of inputs
  const int64_t rows = ((a->height - 1) / a->stride + 1) * times, columns = ((a->width - 1) / a->stride + 1) * times;
  const int64_t groups = (a->outputs + kPanel - 1) / kPanel, pairs = (a->inputs + 1) / 2;
  const int64_t grain = 1 + kItem / (columns * taps * kPanel * a->inputs + 1);
  const int code = parallel_for(a->batch * rows * groups, grain, [&](int64_t item) {
    const int64_t group = item % groups, row = item / groups % rows, sample = item / groups / rows;
    const bf16 *x = static_cast<const bf16 *>(a->x) + sample * a->height * a->width * a->inputs;
    const bf16 *own = static_cast<const bf16 *>(a->taps) + group * pairs * taps * LANES;
    for (int64_t column = 0; column < columns; ++column) {
      Sums sums;
      pixel(a, x, own, row, column, sums);
      put(a, sums, group * kPanel, ((sample * rows + row) * columns + column) * a->outputs + group * kPanel);
    }
    return 0;
  });
  if (code || !a->moments) return code;
  return parallel_for(a->batch, 1, [&](int64_t sample) { return take_moments(a, sample, rows * columns), 0; });
}

}  // namespace
