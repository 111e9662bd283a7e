// levels: scalar avx2 avx512 neon
// A 3x3 weight rounded to bfloat16, laid out for products of pairs of channels; see kernels/conv_taps.py.
#include "abi.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t TAPS = 9, GROUP = 32, LANES = 2 * GROUP, AT_ONCE = 64;  // outputs; outputs by two inputs; pairs of an item

// Inputs 2 k and 2 k + 1 of 32 outputs from `first` on.
template <class T>
void pair(const fg_conv_taps_args *a, int64_t first, int64_t k, bf16 *to) {
  T from[TAPS * LANES] = {};
  const T *weight = static_cast<const T *>(a->weight);
  for (int64_t o = 0; o < GROUP && first + o < a->outputs; ++o)
    for (int64_t j = 0; j < 2 && 2 * k + j < a->inputs; ++j) {
      const T *w = weight + ((first + o) * a->inputs + 2 * k + j) * TAPS;
      for (int64_t i = 0; i < TAPS; ++i) from[i * LANES + 2 * o + j] = w[i];
    }
  for (int64_t i = 0; i < TAPS * LANES; i += W) store(to + i, load(from + i));
}

template <class T>
int taps(const fg_conv_taps_args *a) {
  const int64_t groups = (a->outputs + GROUP - 1) / GROUP, pairs = (a->inputs + 1) / 2;
  const int64_t parts = (pairs + AT_ONCE - 1) / AT_ONCE;
  return parallel_for(groups * parts, 1, [&](int64_t item) {
    const int64_t group = item / parts, begin = item % parts * AT_ONCE;
    bf16 *to = static_cast<bf16 *>(a->out) + group * pairs * TAPS * LANES;
    for (int64_t k = begin; k < pairs && k < begin + AT_ONCE; ++k) pair<T>(a, group * GROUP, k, to + k * TAPS * LANES);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(conv_taps)(const fg_conv_taps_args *a) {
  switch (a->dtype) {
    case FG_FLOAT32: return taps<float>(a);
    case FG_BFLOAT16: return taps<bf16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
