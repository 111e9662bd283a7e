// levels: scalar avx2 avx512 avx512_bf16 neon
// A modulated 3x3 convolution by Winograd's algorithm, see winograd.h: a tile's pixels are scaled as it is filled, and
// upsampled where there are taps; norm, noise, bias and activation follow as its outputs are stored.
#include <cstdlib>

#include "abi.h"
#include "activation.h"
#include "moments.h"
#include "winograd.h"
#if defined(FG_HAS_AVX512_BF16)
#include "winograd_bf16.h"
#endif

namespace {

// The channels [c, c + some) of one pixel, scaled; zeros outside of the image.
template <class T>
FG_INLINE vf scaled(const T *pixel, int64_t c, vf style, int some) {
  if (!pixel) return set1(0.0f);
  return mul(some == W ? load(pixel + c) : load_n(pixel + c, some), style);
}

// Six by six pixels of the image at twice the size, from an odd row and column on, of four by four of its own.  Along an
// axis, of the image with a zero after every pixel, an odd pixel meets pixels at taps 1 and 3, an even one at 0 and 2.
FG_INLINE void upsample(const vf *x, const vf *taps, vf *d) {
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j) {
      const vf *at = x + i / 2 * 4 + j / 2, *tap = taps + (1 - i % 2) * 4 + 1 - j % 2;
      vf sum = mul(at[0], tap[0]);
      sum = fma(at[1], tap[2], sum);
      sum = fma(at[4], tap[8], sum);
      d[6 * i + j] = fma(at[5], tap[10], sum);
    }
}

// norms[b][o] = 1 / sqrt(sum over i of styles[b][i]^2 squares[o][i] + eps).
int norms_of(const fg_winograd_modulated_conv2d_args *a, const float *styles, float *norms) {
  return parallel_for(a->batch * a->outputs, 64, [&](int64_t item) {
    const float *s = styles + item / a->outputs * a->inputs;
    const float *w = static_cast<const float *>(a->squares) + item % a->outputs * a->inputs;
    vf sum = set1(0.0f);
    for (int64_t i = 0; i < a->inputs; i += W) {
      const int some = lanes_left(a->inputs - i);
      const vf style = load_n(s + i, some);
      sum = fma(mul(style, style), load_n(w + i, some), sum);
    }
    norms[item] = 1.0f / __builtin_sqrtf(hsum(sum) + static_cast<float>(a->eps));
    return 0;
  });
}

template <int kAct, class T>
int convolve(const fg_winograd_modulated_conv2d_args *a, const float *styles, const float *norms, const float *biases) {
  const int64_t up = a->taps ? 2 : 1, height = up * a->height, width = up * a->width;
  const Winograd problem(a->filters, a->batch, a->inputs, a->outputs, height, width);
  const Finish finish = {static_cast<float>(a->alpha), static_cast<float>(a->gain), static_cast<float>(a->clamp)};
  vf taps[16];
  for (int i = 0; i < 16; ++i) taps[i] = set1(parameter(a->taps, a->taps_dtype, i, 0.0f));
  const auto fill = [&](int64_t sample, int64_t y, int64_t x, const auto &put) {
    const T *image = static_cast<const T *>(a->x) + sample * a->height * a->width * a->inputs, *from[POINTS];
    if (up == 1) {
      pixels_at<6>(image, a->height, a->width, a->inputs, y - 1, x - 1, from);
    } else {
      pixels_at<4>(image, a->height, a->width, a->inputs, y / 2 - 1, x / 2 - 1, from);
    }
    for (int64_t c = 0; c < a->inputs; c += W) {
      const int some = lanes_left(a->inputs - c);
      const vf style = load_n(styles + sample * a->inputs + c, some);
      vf d[POINTS], small[16];
      if (up == 1) {
        for (int i = 0; i < POINTS; ++i) d[i] = scaled(from[i], c, style, some);
      } else {
        for (int i = 0; i < 16; ++i) small[i] = scaled(from[i], c, style, some);
        upsample(small, taps, d);
      }
      put(c, d);
    }
  };
  const auto take = [&](int64_t sample, int64_t y, int64_t x, const auto &get) {
    const int64_t rows = height - y < 4 ? height - y : 4, wide = width - x < 4 ? width - x : 4;
    const int64_t first = y * width + x;
    float noise[16];
    for (int64_t i = 0; i < 16; ++i) {
      const bool there = i / 4 < rows && i % 4 < wide;
      const int64_t at = sample * a->noise_batch + first + i / 4 * width + i % 4;
      noise[i] = there ? parameter(a->noise, a->noise_dtype, at, 0.0f) : 0.0f;
    }
    T *out = static_cast<T *>(a->out) + (sample * height * width + first) * a->outputs;
    for (int64_t o = 0; o < a->outputs; o += W) {
      const int some = lanes_left(a->outputs - o);
      const vf norm = load_n(norms + sample * a->outputs + o, some), bias = load_n(biases + o, some);
      vf z[16];
      get(o, z);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < wide; ++j) {
          const vf value = add(add(mul(z[4 * i + j], norm), set1(noise[4 * i + j])), bias);
          T *to = out + (i * width + j) * a->outputs + o;
          if (some == W) {
            store(to, finished<kAct, T>(value, finish));
          } else {
            store_n(to, finished<kAct, T>(value, finish), some);
          }
        }
    }
  };
  return problem.run(fill, take);
}

#if defined(FG_HAS_AVX512_BF16)
template <int kAct>
int convolve_pairs(const fg_winograd_modulated_conv2d_args *a, const float *scales, const float *norms,
                   const float *biases) {
  PairWinograd problem(a->x, a->filters, scales, a->batch, a->inputs, a->outputs, a->height, a->width);
  const Finish finish = {static_cast<float>(a->alpha), static_cast<float>(a->gain), static_cast<float>(a->clamp)};
  return problem.run([&](int64_t sample, int64_t pixel, int64_t o, vf low, vf high) {
    const __mmask32 mask = halves_below(a->outputs - o);
    const int64_t at = sample * a->noise_batch + pixel, to = (sample * a->height * a->width + pixel) * a->outputs + o;
    const vf noise = set1(parameter(a->noise, a->noise_dtype, at, 0.0f));
    const auto end = [&](vf sum, int64_t first, __mmask16 some) {
      const vf norm = _mm512_maskz_loadu_ps(some, norms + sample * a->outputs + first);
      return finished<kAct, bf16>(add(add(mul(sum, norm), noise), _mm512_maskz_loadu_ps(some, biases + first)), finish);
    };
    low = end(low, o, static_cast<__mmask16>(mask)), high = end(high, o + W, static_cast<__mmask16>(mask >> W));
    _mm512_mask_storeu_epi16(static_cast<bf16 *>(a->out) + to, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  });
}

// The styles as PairWinograd takes them, in `scales`.
void lay_styles(const fg_winograd_modulated_conv2d_args *a, const float *styles, float *scales) {
  const int64_t lines = (a->inputs + 2 * LINE - 1) / (2 * LINE);
  for (int64_t i = 0; i < a->batch * lines * 2 * LINE; ++i) {
    const int64_t c = i / (2 * LINE) % lines * 2 * LINE + i % LINE * 2 + i / LINE % 2;
    scales[i] = c < a->inputs ? styles[i / (2 * LINE) / lines * a->inputs + c] : 0.0f;
  }
}
#endif

template <class T>
int layer(const fg_winograd_modulated_conv2d_args *a, float *memory) {
  float *styles = memory, *norms = styles + a->batch * a->inputs, *biases = norms + a->batch * a->outputs;
  for (int64_t i = 0; i < a->batch * a->inputs; ++i) styles[i] = parameter(a->styles, a->styles_dtype, i, 1.0f);
  for (int64_t o = 0; o < a->outputs; ++o) biases[o] = parameter(a->bias, a->bias_dtype, o, 0.0f);
  if (int code = norms_of(a, styles, norms)) return code;
#if defined(FG_HAS_AVX512_BF16)
  if (a->pairs) {
    float *scales = biases + a->outputs;
    lay_styles(a, styles, scales);
    return with_activation(a->act,
                           [&](auto act) { return convolve_pairs<decltype(act)::value>(a, scales, norms, biases); });
  }
#endif
  if (a->pairs) return FG_BAD_ARGUMENT;
  return with_activation(a->act, [&](auto act) { return convolve<decltype(act)::value, T>(a, styles, norms, biases); });
}

}  // namespace

extern "C" int FG_EXPORT(winograd_modulated_conv2d)(const fg_winograd_modulated_conv2d_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  const int64_t floats = a->batch * (2 * a->inputs + 32 + a->outputs) + a->outputs;
  float *memory = static_cast<float *>(std::malloc(static_cast<size_t>(floats) * sizeof(float)));
  if (!memory) return FG_NO_MEMORY;
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32) code = layer<float>(a, memory);
  if (a->dtype == FG_BFLOAT16) code = layer<bf16>(a, memory);
  if (a->dtype == FG_FLOAT16) code = layer<fp16>(a, memory);
  std::free(memory);
  return code;
}
