// A 3x3 convolution by Winograd's algorithm, with bias and residual; see winograd.h.  `seen` is shown what is written, tile
// by tile.
#pragma once
#include "abi.h"
#include "winograd_taps.h"
#if defined(FG_HAS_AVX512_BF16)
#include "winograd_bf16.h"
#endif

namespace {

#if defined(FG_HAS_AVX512_BF16)
template <class Seen>
int convolve_pairs(const fg_winograd_conv2d_args *a, const Seen &seen) {
  PairWinograd problem(a->x, a->filters, nullptr, a->batch, a->inputs, a->outputs, a->height, a->width);
  const bf16 *residual = problem.beside = static_cast<const bf16 *>(a->residual);
  const auto take = [&](int64_t sample, int64_t pixel, int64_t o, vf low, vf high) {
    const __mmask32 mask = halves_below(a->outputs - o);
    const int64_t to = (sample * a->height * a->width + pixel) * a->outputs + o;
    if (a->bias && a->bias_dtype == FG_FLOAT32) {
      const float *bias = static_cast<const float *>(a->bias) + o;
      low = add(low, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), bias));
      high = add(high, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> W), bias + W));
    }
    if (a->bias && a->bias_dtype == FG_BFLOAT16) plus(static_cast<const bf16 *>(a->bias) + o, mask, low, high);
    if (residual) plus(residual + to, mask, low, high);
    const __m512i made = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(static_cast<bf16 *>(a->out) + to, mask, made);
    return made;
  };
  return a->doubled ? problem.run<true>(take, seen) : problem.run(take, seen);
}
#endif

// In float32, tiles of SIDE x SIDE pixels: what fills them, and what becomes of those that come out.
template <int SIDE, class Seen>
struct FloatTiles {
  static constexpr int OUT = SIDE - 2;
  const fg_winograd_conv2d_args *a;
  const Seen &seen;

  template <class Put>
  void fill(int64_t sample, int64_t y, int64_t x, const Put &put) const {
    const float *image = static_cast<const float *>(a->x) + sample * a->height * a->width * a->inputs;
    const float *pixel[SIDE * SIDE];
    pixels_at<SIDE>(image, a->height, a->width, a->inputs, y - 1, x - 1, pixel);
    for (int64_t c = 0; c < a->inputs; c += W) {
      const int some = lanes_left(a->inputs - c);
      vf d[SIDE * SIDE];
      for (int i = 0; i < SIDE * SIDE; ++i) d[i] = channels_of(pixel[i], c, some, 4 * a->inputs);
      put(c, d);
    }
  }

  // Of the outputs [first, last).
  template <class Get>
  void put(int64_t sample, int64_t y, int64_t x, int64_t first, int64_t last, const Get &get) const {
    const float *bias = static_cast<const float *>(a->bias), *residual = static_cast<const float *>(a->residual);
    const int64_t start = ((sample * a->height + y) * a->width + x) * a->outputs;
    const int64_t rows = a->height - y < OUT ? a->height - y : OUT, wide = a->width - x < OUT ? a->width - x : OUT;
    for (int64_t o = first; o < last; o += W) {
      const int some = lanes_left(a->outputs - o);
      const vf offset = bias ? load_n(bias + o, some) : set1(0.0f);
      vf z[OUT * OUT];
      get(o, z);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < wide; ++j) {
          const int64_t at = start + (i * a->width + j) * a->outputs + o;
          vf &value = z[OUT * i + j] = add(z[OUT * i + j], offset);
          if (residual) value = add(value, load_n(residual + at, some));
          store_n(static_cast<float *>(a->out) + at, value, some);
        }
      seen(sample, y, x, o, z);
    }
  }
};

template <int SIDE, class Seen>
int convolve_taps(const fg_winograd_conv2d_args *a, const Seen &seen) {
  const FloatTiles<SIDE, Seen> tiles{a, seen};
  return TapWinograd<SIDE>(a->filters, a->batch, a->inputs, a->outputs, a->height, a->width)
      .run([&](int64_t sample, int64_t y, int64_t x, const auto &put) { tiles.fill(sample, y, x, put); },
           [&](int64_t sample, int64_t y, int64_t x, int64_t first, int64_t last, const auto &get) {
             tiles.put(sample, y, x, first, last, get);
           });
}

template <class Seen>
int convolve_floats(const fg_winograd_conv2d_args *a, const Seen &seen) {
  if (a->taps) return a->taps == 2 ? convolve_taps<4>(a, seen) : convolve_taps<6>(a, seen);
  const FloatTiles<6, Seen> tiles{a, seen};
  return Winograd(a->filters, a->batch, a->inputs, a->outputs, a->height, a->width, !a->moments)
      .run([&](int64_t sample, int64_t y, int64_t x, const auto &put) { tiles.fill(sample, y, x, put); },
           [&](int64_t sample, int64_t y, int64_t x, const auto &get) {
             tiles.put(sample, y, x, int64_t{0}, a->outputs, get);
           });
}

}  // namespace
