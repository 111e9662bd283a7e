// levels: scalar avx2 avx512 avx512_bf16 neon
// A modulated 3x3 convolution by Winograd's algorithm, see winograd.h, or winograd_phases.h where there are taps: a
// tile's pixels are scaled as it is filled; norm, noise, bias and activation follow as its outputs are stored.
#include <cstdlib>

#include "abi.h"
#include "activation.h"
#include "moments.h"
#include "winograd_phases.h"
#if defined(FG_HAS_AVX512_BF16)
#include "winograd_bf16.h"
#endif

namespace {

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

// put(c, pixels) for every vector of channels of SIZE by SIZE scaled pixels from (y, x) on.
template <int SIZE, class T, class Put>
FG_INLINE void fill_tile(const fg_winograd_modulated_conv2d_args *a, const float *styles, int64_t sample, int64_t y,
                         int64_t x, const Put &put) {
  const T *image = static_cast<const T *>(a->x) + sample * a->height * a->width * a->inputs, *from[SIZE * SIZE];
  pixels_at<SIZE>(image, a->height, a->width, a->inputs, y, x, from);
  for (int64_t c = 0; c < a->inputs; c += W) {
    const int some = lanes_left(a->inputs - c);
    const vf style = load_n(styles + sample * a->inputs + c, some);
    vf d[SIZE * SIZE];
    for (int i = 0; i < SIZE * SIZE; ++i) d[i] = mul(channels_of(from[i], c, some, 4 * a->inputs), style);
    put(c, d);
  }
}

// What becomes of the sums of some outputs, all of one sample.
template <int kAct, class T>
struct End {
  Finish finish;
  vf norm, bias;
  int some;

  End(const fg_winograd_modulated_conv2d_args *a, const float *norms, const float *biases, int64_t sample, int64_t o)
      : finish{static_cast<float>(a->alpha), static_cast<float>(a->gain), static_cast<float>(a->clamp)} {
    some = lanes_left(a->outputs - o);
    norm = load_n(norms + sample * a->outputs + o, some), bias = load_n(biases + o, some);
  }

  void operator()(vf sum, float noise, T *to) const {
    const vf value = finished<kAct, T>(add(add(mul(sum, norm), set1(noise)), bias), finish);
    if (some == W)
      store(to, value);
    else
      store_n(to, value, some);
  }
};

template <int kAct, class T>
int convolve(const fg_winograd_modulated_conv2d_args *a, const float *styles, const float *norms, const float *biases) {
  const int64_t height = a->height, width = a->width;
  const Winograd problem(a->filters, a->batch, a->inputs, a->outputs, height, width);
  const auto fill = [&](int64_t sample, int64_t y, int64_t x, const auto &put) {
    fill_tile<6, T>(a, styles, sample, y - 1, x - 1, put);
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
      const End<kAct, T> end(a, norms, biases, sample, o);
      vf z[16];
      get(o, z);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < wide; ++j) end(z[4 * i + j], noise[4 * i + j], out + (i * width + j) * a->outputs + o);
    }
  };
  return problem.run(fill, take);
}

// At twice the size; `noises`: as many floats as there is noise.
template <int kAct, class T>
int upsample(const fg_winograd_modulated_conv2d_args *a, const float *styles, const float *norms, const float *biases,
             float *noises) {
  const int64_t height = 2 * a->height, width = 2 * a->width;
  const Phases problem(a->filters, a->batch, a->inputs, a->outputs, a->height, a->width);
  vf taps[16];
  for (int i = 0; i < 16; ++i) taps[i] = set1(parameter(a->taps, a->taps_dtype, i, 0.0f));
  parallel_for((a->noise_batch ? a->batch : 1) * height, 64, [&](int64_t y) {
    for (int64_t i = y * width; i < (y + 1) * width; ++i) noises[i] = parameter(a->noise, a->noise_dtype, i, 0.0f);
    return 0;
  });
  const auto fill = [&](int64_t sample, int64_t y, int64_t x, const auto &put) {
    fill_tile<4, T>(a, styles, sample, y, x, put);
  };
  const auto take = [&](int64_t sample, int64_t y, int64_t o, const float *const *rows) {
    if (o >= a->outputs) return;
    const End<kAct, T> end(a, norms, biases, sample, o);
    const float *noise = noises + sample * a->noise_batch + y * width;
    T *to = static_cast<T *>(a->out) + (sample * height + y) * width * a->outputs + o;
    filter_row(rows, taps, width, [&](int64_t x, vf sum) { end(sum, noise[x], to + x * a->outputs); });
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
    const __m512i made = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(static_cast<bf16 *>(a->out) + to, mask, made);
    return made;
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
  return with_activation(a->act, [&](auto act) {
    constexpr int kAct = decltype(act)::value;
    return a->taps ? upsample<kAct, T>(a, styles, norms, biases, biases + a->outputs)
                   : convolve<kAct, T>(a, styles, norms, biases);
  });
}

}  // namespace

extern "C" int FG_EXPORT(winograd_modulated_conv2d)(const fg_winograd_modulated_conv2d_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  const int64_t noise = a->taps ? (a->noise_batch ? a->batch : 1) * 4 * a->height * a->width : 0;
  const int64_t floats = a->batch * (2 * a->inputs + 32 + a->outputs) + a->outputs + noise;
  float *memory = static_cast<float *>(std::malloc(static_cast<size_t>(floats) * sizeof(float)));
  if (!memory) return FG_NO_MEMORY;
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32) code = layer<float>(a, memory);
  if (a->dtype == FG_BFLOAT16) code = layer<bf16>(a, memory);
  if (a->dtype == FG_FLOAT16) code = layer<fp16>(a, memory);
  std::free(memory);
  return code;
}
