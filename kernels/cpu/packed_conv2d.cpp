// levels: scalar avx2 avx512 avx512_bf16 amx neon
// A 3x3 convolution by taps that lie in groups of outputs and pairs of inputs; see kernels/conv_taps.py.
#include "panel.h"
#include "threads.h"

#if defined(FG_LEVEL_AMX)
#include "packed_conv2d_amx.h"
#else

namespace {

constexpr int64_t TAPS = 9, LANES = 2 * kPanel;  // outputs by two inputs
constexpr int64_t kItem = 1 << 18;               // multiply-adds that are worth a thread

using Sums = vf[kParts];

FG_INLINE float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Adds the products of a pixel's channels by one tap of a group, whose pairs lie TAPS apart.
FG_INLINE void multiply(const bf16 *pixel, const bf16 *taps, int64_t inputs, Sums &sums) {
  for (int64_t i = 0; i < inputs; i += 2, taps += TAPS * LANES) {
    const vf first = set1(wide(pixel[i])), second = set1(i + 1 < inputs ? wide(pixel[i + 1]) : 0.0f);
    for (int v = 0; v < kParts; ++v) {
      vf even, odd;
      deinterleave(load(taps + 2 * v * W), load(taps + (2 * v + 1) * W), even, odd);
      sums[v] = fma(odd, second, fma(even, first, sums[v]));
    }
  }
}

// The sums of the output pixel (row, column) of a sample: its nine taps in order, those outside the image left out.
FG_INLINE void pixel(const fg_packed_conv2d_args *a, const bf16 *x, const bf16 *taps, int64_t row, int64_t column,
                     Sums &sums) {
  for (vf &sum : sums) sum = set1(0.0f);
  for (int64_t tap = 0; tap < TAPS; ++tap) {
    const int64_t down = row * a->stride + tap / 3 - 1, across = column * a->stride + tap % 3 - 1;
    if (down < 0 || down >= a->height || across < 0 || across >= a->width) continue;
    multiply(x + (down * a->width + across) * a->inputs, taps + tap * LANES, a->inputs, sums);
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

int convolve(const fg_packed_conv2d_args *a) {
  const int64_t rows = (a->height - 1) / a->stride + 1, columns = (a->width - 1) / a->stride + 1;
  const int64_t groups = (a->outputs + kPanel - 1) / kPanel, pairs = (a->inputs + 1) / 2;
  const int64_t grain = 1 + kItem / (columns * TAPS * kPanel * a->inputs + 1);
  return parallel_for(a->batch * rows * groups, grain, [&](int64_t item) {
    const int64_t group = item % groups, row = item / groups % rows, sample = item / groups / rows;
    const bf16 *x = static_cast<const bf16 *>(a->x) + sample * a->height * a->width * a->inputs;
    const bf16 *taps = static_cast<const bf16 *>(a->taps) + group * pairs * TAPS * LANES;
    for (int64_t column = 0; column < columns; ++column) {
      Sums sums;
      pixel(a, x, taps, row, column, sums);
      put(a, sums, group * kPanel, ((sample * rows + row) * columns + column) * a->outputs + group * kPanel);
    }
    return 0;
  });
}

}  // namespace
#endif

extern "C" int FG_EXPORT(packed_conv2d)(const fg_packed_conv2d_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  return a->dtype == FG_BFLOAT16 ? convolve(a) : FG_BAD_ARGUMENT;
}
