// levels: scalar avx2 avx512 neon
// G w G^T in panels of 16 outputs, in float32; see kernels/winograd_filters.py.
#include "abi.h"
#include "threads.h"
#include "winograd_extend.h"

namespace {

constexpr int64_t TAPS = 9, PANEL = 16, TOGETHER = 32;  // TOGETHER: inputs of an item
constexpr int64_t STEP = (TOGETHER + 1) * PANEL;        // from point to point: in other sets of a cache

// The weights of inputs [k, k + n) and 16 outputs from `first` on: to[input][tap][output].
template <class T>
void gather(const fg_winograd_filters_args *a, int64_t first, int64_t k, int64_t n, T *to) {
  const T *weight = static_cast<const T *>(a->weight);
  for (int64_t o = 0; o < PANEL && first + o < a->outputs; ++o) {
    const T *from = weight + ((first + o) * a->inputs + k) * TAPS;
    for (int64_t i = 0; i < n * TAPS; ++i) to[i * PANEL + o] = from[i];
  }
}

template <Domain D, class T>
int filters(const fg_winograd_filters_args *a) {
  constexpr int POINTS = kSide<D> * kSide<D>;
  const int64_t panels = (a->outputs + PANEL - 1) / PANEL, parts = (a->inputs + TOGETHER - 1) / TOGETHER;
  return parallel_for(panels * parts, 1, [&](int64_t item) {
    const int64_t p = item / parts, k = item % parts * TOGETHER, n = a->inputs - k < TOGETHER ? a->inputs - k : TOGETHER;
    alignas(64) T from[TOGETHER * TAPS * PANEL];
    if ((p + 1) * PANEL > a->outputs) memset(from, 0, sizeof(from));  // zeros after the last output
    gather(a, p * PANEL, k, n, from);
    alignas(64) float made[POINTS * STEP];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t o = 0; o < PANEL; o += W) {
        vf f[POINTS];
        extend_taps<D>(from + i * TAPS * PANEL + o, PANEL, f);
        for (int j = 0; j < POINTS; ++j) store(made + j * STEP + i * PANEL + o, f[j]);
      }
    float *out = static_cast<float *>(a->out) + (p * a->inputs + k) * PANEL;
    for (int j = 0; j < POINTS; ++j)
      memcpy(out + j * panels * a->inputs * PANEL, made + j * STEP, static_cast<size_t>(n * PANEL) * sizeof(float));
    return 0;
  });
}

template <class T>
int filters(const fg_winograd_filters_args *a) {
  return a->transposed ? filters<PHASES, T>(a) : filters<BY_FOUR, T>(a);
}

}  // namespace

extern "C" int FG_EXPORT(winograd_filters)(const fg_winograd_filters_args *a) {
  switch (a->dtype) {
    case FG_FLOAT32: return filters<float>(a);
    case FG_BFLOAT16: return filters<bf16>(a);
    case FG_FLOAT16: return filters<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
