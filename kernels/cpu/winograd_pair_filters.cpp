// levels: scalar avx2 avx512 neon
// G w G^T, rounded to bfloat16, for every pair of channels, laid out for products of pairs; see kernels/winograd_pair_filters.py.
#include "abi.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t GROUP = 32, LANES = 2 * GROUP, AT_ONCE = 64;  // outputs; outputs by two inputs; pairs of an item

// G w for three vectors `s` apart in w; four come out, `t` apart.
FG_INLINE void widen(const vf *w, int s, vf *o, int t) {
  const vf half = set1(0.5f), outer = mul(half, add(w[0], w[2 * s])), middle = mul(half, w[s]);
  o[0] = w[0];
  o[t] = add(outer, middle);
  o[2 * t] = sub(outer, middle);
  o[3 * t] = w[2 * s];
}

// Inputs 2 k and 2 k + 1 of 32 outputs from `first` on; `to` is where the first point goes, the others `point` apart.
template <class T>
void pair(const fg_winograd_pair_filters_args *a, int64_t first, int64_t k, int64_t point, bf16 *to) {
  T from[9][LANES] = {};
  const T *weight = static_cast<const T *>(a->weight);
  for (int64_t o = 0; o < GROUP && first + o < a->outputs; ++o)
    for (int64_t j = 0; j < 2 && 2 * k + j < a->inputs; ++j) {
      const T *w = weight + ((first + o) * a->inputs + 2 * k + j) * 9;
      for (int i = 0; i < 9; ++i) from[i][2 * o + j] = w[i];
    }
  for (int64_t lane = 0; lane < LANES; lane += W) {
    vf w[9], rows[12], all[16];
    for (int i = 0; i < 9; ++i) w[i] = load(from[i] + lane);
    for (int i = 0; i < 3; ++i) widen(w + i, 3, rows + i, 3);
    for (int i = 0; i < 4; ++i) widen(rows + 3 * i, 1, all + 4 * i, 1);
    for (int i = 0; i < 16; ++i) store(to + i * point + lane, all[i]);
  }
}

template <class T>
int filters(const fg_winograd_pair_filters_args *a) {
  const int64_t groups = (a->outputs + GROUP - 1) / GROUP, pairs = (a->inputs + 1) / 2, point = pairs * LANES;
  const int64_t parts = (pairs + AT_ONCE - 1) / AT_ONCE;
  return parallel_for(groups * parts, 1, [&](int64_t item) {
    const int64_t group = item / parts, begin = item % parts * AT_ONCE;
    bf16 *to = static_cast<bf16 *>(a->out) + group * 16 * point;
    for (int64_t k = begin; k < pairs && k < begin + AT_ONCE; ++k) pair<T>(a, group * GROUP, k, point, to + k * LANES);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(winograd_pair_filters)(const fg_winograd_pair_filters_args *a) {
  switch (a->dtype) {
    case FG_FLOAT32: return filters<float>(a);
    case FG_BFLOAT16: return filters<bf16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
