// Loops over a row of any length, vector by vector.
#pragma once
#include "simd.h"

namespace {

FG_INLINE int lanes_left(int64_t n) { return n < W ? static_cast<int>(n) : W; }

// body(i, n) for each vector of a row: n is W but for the last.
template <class F>
FG_INLINE void vectors(int64_t width, const F &body) {
  int64_t i = 0;
  for (; i + W <= width; i += W) body(i, W);
  if (i < width) body(i, static_cast<int>(width - i));
}
template <class T>
FG_INLINE vf part(const T *p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
FG_INLINE void put(T *p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store_n(p, x, n);
}

// sum = x + gate * branch; gate may be null.
template <class T, class S>
FG_INLINE void add_row(const T *x, const T *branch, const S *gate, T *sum, int64_t width) {
  if (gate)
    vectors(width, [&](int64_t i, int n) { put(sum + i, fma(part(gate + i, n), part(branch + i, n), part(x + i, n)), n); });
  else
    vectors(width, [&](int64_t i, int n) { put(sum + i, add(part(x + i, n), part(branch + i, n)), n); });
}

}  // namespace
