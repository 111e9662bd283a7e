// G g: the three taps of a line of a filter as points of Winograd's domain; twice, they make a 3x3 filter's.
#pragma once
#include "simd.h"

namespace {

// F(4 x 4, 3 x 3); F(2 x 2, 3 x 3); the phases of a transposed convolution.  See kernels/winograd_filters.py.
enum Domain { BY_FOUR, BY_TWO, PHASES };
template <Domain D>
constexpr int kSide = D == BY_TWO ? 4 : 6;  // points of a line

// Of three vectors, `s` apart; kSide come out, `t` apart.
template <Domain D>
FG_INLINE void extend(const vf *g, int s, vf *o, int t) {
  if constexpr (D == BY_FOUR) {
    const vf a = mul(add(g[0], g[2 * s]), set1(-1.0f / 6)), b = mul(g[s], set1(-1.0f / 6));
    const vf c = fma(g[0], set1(1.0f / 24), mul(g[2 * s], set1(1.0f / 6))), d = mul(g[s], set1(1.0f / 12));
    o[0] = mul(g[0], set1(0.25f));
    o[t] = add(a, b);
    o[2 * t] = sub(a, b);
    o[3 * t] = add(c, d);
    o[4 * t] = sub(c, d);
    o[5 * t] = g[2 * s];
  } else if constexpr (D == BY_TWO) {
    const vf a = mul(add(g[0], g[2 * s]), set1(0.5f)), b = mul(g[s], set1(0.5f));
    o[0] = g[0];
    o[t] = add(a, b);
    o[2 * t] = sub(a, b);
    o[3 * t] = g[2 * s];
  } else {
    o[0] = g[0];
    o[t] = mul(fma(g[0], set1(2.0f), g[2 * s]), set1(1.0f / 36));
    o[2 * t] = mul(sub(g[0], g[2 * s]), set1(1.0f / 9));
    o[3 * t] = mul(fma(g[2 * s], set1(2.0f), g[0]), set1(1.0f / 36));
    o[4 * t] = g[2 * s];
    o[5 * t] = g[s];
  }
}

// The points of a vector of filters, whose nine taps are `step` elements apart.
template <Domain D, class T>
FG_INLINE void extend_taps(const T *taps, int64_t step, vf (&f)[kSide<D> * kSide<D>]) {
  constexpr int SIDE = kSide<D>;
  vf g[9], e[3 * SIDE];
  for (int i = 0; i < 9; ++i) g[i] = load(taps + i * step);
  for (int i = 0; i < 3; ++i) extend<D>(g + i, 3, e + i, 3);
  for (int i = 0; i < SIDE; ++i) extend<D>(e + 3 * i, 1, f + SIDE * i, 1);
}

}  // namespace
