// levels: scalar avx2 avx512 neon
// A 3x3 weight rounded to bfloat16, or for what is doubled the 2x2 ones of its four phases, laid out for products of
// pairs of channels; see kernels/conv_taps.py.
#include "abi.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t TAPS = 9, PHASES = 4, FOUR = 4;               // of a weight; FOUR: taps of each phase
constexpr int64_t GROUP = 32, LANES = 2 * GROUP, AT_ONCE = 64;  // outputs; outputs by two inputs; pairs of an item

// Inputs 2 k and 2 k + 1 of 32 outputs from `first` on.
template <class T>
void gather(const fg_conv_taps_args *a, int64_t first, int64_t k, T *from) {
  const T *weight = static_cast<const T *>(a->weight);
  for (int64_t o = 0; o < GROUP && first + o < a->outputs; ++o)
    for (int64_t j = 0; j < 2 && 2 * k + j < a->inputs; ++j) {
      const T *w = weight + ((first + o) * a->inputs + 2 * k + j) * TAPS;
      for (int64_t i = 0; i < TAPS; ++i) from[i * LANES + 2 * o + j] = w[i];
    }
}

// The rows of the weight, or its columns, whose sum tap t of phase p is.
struct Fold {
  int64_t from, to;
  Fold(int64_t p, int64_t t) : from(p ? 2 * t : t), to(p ? t + 2 : 2 * t + 1) {}
};

// Tap `tap` of a phase: up to four weights added up row by row.
template <class T>
FG_INLINE void folded(const T *from, int64_t phase, int64_t tap, bf16 *to) {
  const Fold rows(phase / 2, tap / 2), columns(phase % 2, tap % 2);
  for (int64_t i = 0; i < LANES; i += W) {
    vf sum = set1(0.0f);
    for (int64_t r = rows.from; r < rows.to; ++r)
      for (int64_t c = columns.from; c < columns.to; ++c) sum = add(sum, load(from + (3 * r + c) * LANES + i));
    store(to + i, sum);
  }
}

template <class T>
int taps(const fg_conv_taps_args *a) {
  const int64_t groups = (a->outputs + GROUP - 1) / GROUP, pairs = (a->inputs + 1) / 2;
  const int64_t parts = (pairs + AT_ONCE - 1) / AT_ONCE;
  bf16 *out = static_cast<bf16 *>(a->out);
  return parallel_for(groups * parts, 1, [&](int64_t item) {
    const int64_t group = item / parts, begin = item % parts * AT_ONCE;
    for (int64_t k = begin; k < pairs && k < begin + AT_ONCE; ++k) {
      T from[TAPS * LANES] = {};
      gather(a, group * GROUP, k, from);
      bf16 *to = out + (group * pairs + k) * TAPS * LANES;
      for (int64_t i = 0; !a->doubled && i < TAPS * LANES; i += W) store(to + i, load(from + i));
      for (int64_t phase = 0; a->doubled && phase < PHASES; ++phase)
        for (int64_t t = 0; t < FOUR; ++t)
          folded(from, phase, t, out + (((group * PHASES + phase) * pairs + k) * FOUR + t) * LANES);
    }
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
