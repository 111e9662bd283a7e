// levels: scalar avx2 avx512 avx512_bf16 amx neon
// A 3x3 convolution in int8 by taps that lie in groups of outputs and words of inputs; see kernels/conv_taps_int8.py.
#include "image_codes.h"
#include "panel.h"

#if defined(FG_LEVEL_AMX)
#include "packed_conv2d_int8_amx.h"
#else

namespace {

constexpr int64_t kTaps = 9, kChunk = 64, kWord = 4, kLanes = kWord * kPanel, kTap = kChunk * kPanel;
constexpr int64_t kItem = 1 << 18;  // multiply-adds that are worth a thread

using Args = fg_packed_conv2d_int8_args;

// Adds the products of a pixel's codes, less their zero point, by one tap of a group, whose chunks lie kTaps apart.
FG_INLINE void multiply(const uint8_t *pixel, int32_t zero, const int8_t *taps, int64_t inputs,
                        int32_t (&sums)[kPanel]) {
  for (int64_t i = 0; i < inputs; ++i) {
    const int8_t *w = taps + i / kChunk * kTaps * kTap + i % kChunk / kWord * kLanes + i % kWord;
    const int32_t code = pixel[i] - zero;
    for (int64_t o = 0; o < kPanel; ++o) sums[o] += code * w[o * kWord];
  }
}

// The sums of the output pixel (row, column) of a sample: its nine taps in order, those outside the image left out.
FG_INLINE void pixel(const Args *a, const uint8_t *codes, int32_t zero, const int8_t *taps, int64_t row, int64_t column,
                     int32_t (&sums)[kPanel]) {
  const int64_t times = a->doubled ? 2 : 1;
  memset(sums, 0, sizeof sums);
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const int64_t down = row * a->stride + tap / 3 - 1, across = column * a->stride + tap % 3 - 1;
    if (down < 0 || down >= a->height * times || across < 0 || across >= a->width * times) continue;
    const uint8_t *at = codes + (down / times * a->width + across / times) * a->inputs;
    multiply(at, zero, taps + tap * kTap, a->inputs, sums);
  }
}

// The sums of outputs [first, first + kPanel) as numbers, with bias and residual, those that there are from `at` on.
template <class T>
FG_INLINE void put(const Args *a, const int32_t (&sums)[kPanel], float scale, int64_t first, int64_t at) {
  const int64_t left = a->outputs - first;
  vf bias[kParts], scales[kParts];
  get_bias(a->bias, a->bias_dtype, first, left, bias);
  get_bias(a->scale, FG_FLOAT32, first, left, scales);
  for (int v = 0; v < kParts; ++v) {
    const int some = columns(left, v);
    vf y = add(mul(to_float(load_i(sums + v * W)), mul(set1(scale), scales[v])), bias[v]);
    if (a->residual) y = add(y, load_n(static_cast<const T *>(a->residual) + at + v * W, some));
    store_n(static_cast<T *>(a->out) + at + v * W, y, some);
  }
}

template <class T>
int products(const Args *a, const uint8_t *codes, const Coding *codings) {
  const int64_t times = a->doubled ? 2 : 1, size = a->height * a->width * a->inputs;
  const int64_t rows = (a->height * times - 1) / a->stride + 1, columns = (a->width * times - 1) / a->stride + 1;
  const int64_t groups = (a->outputs + kPanel - 1) / kPanel;
  const int64_t of_group = (a->inputs + kChunk - 1) / kChunk * kTaps * kTap;
  const int64_t grain = 1 + kItem / (columns * kTaps * kPanel * a->inputs + 1);
  return parallel_for(a->batch * rows * groups, grain, [&](int64_t item) {
    const int64_t group = item % groups, row = item / groups % rows, sample = item / groups / rows;
    const Coding &by = codings[sample];
    const int8_t *taps = static_cast<const int8_t *>(a->taps) + group * of_group;
    for (int64_t column = 0; column < columns; ++column) {
      int32_t sums[kPanel];
      pixel(a, codes + sample * size, static_cast<int32_t>(by.zero), taps, row, column, sums);
      const int64_t at = ((sample * rows + row) * columns + column) * a->outputs;
      put<T>(a, sums, by.scale, group * kPanel, at + group * kPanel);
    }
    return 0;
  });
}

template <class T>
int convolve(const Args *a) {
  const T *x = static_cast<const T *>(a->x);
  const Pieces pieces(a->height * a->width * a->inputs);
  const int64_t items = a->batch * pieces.each, room = (a->batch * pieces.elements + 63) / 64 * 64;
  const size_t codings = static_cast<size_t>(a->batch) * sizeof(Coding);
  uint8_t *codes = static_cast<uint8_t *>(
      fg_scratch(static_cast<size_t>(room) + codings + static_cast<size_t>(items) * sizeof(Range)));
  if (!codes) return FG_NO_MEMORY;
  Coding *made = reinterpret_cast<Coding *>(codes + room);
  find_codings(x, a->batch, pieces, reinterpret_cast<Range *>(made + a->batch), made);
  parallel_for(items, 1, [&](int64_t item) {
    const int64_t at = pieces.start(item);
    put_codes(x + at, pieces.size(item), made[item / pieces.each], codes + at);
    return 0;
  });
  return products<T>(a, codes, made);
}

}  // namespace
#endif

extern "C" int FG_EXPORT(packed_conv2d_int8)(const fg_packed_conv2d_int8_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return convolve<float>(a);
    case FG_BFLOAT16: return convolve<bf16>(a);
    case FG_FLOAT16: return convolve<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
