// The logistic function and SiLU, as exact as the element type that they are rounded to.
#pragma once
#include "exp2.h"

namespace {

// Functions of several vectors go step by step through all of them: one vector alone is a chain of twenty operations, and
// the processor cannot look past many such chains.  As many as its registers hold:
#if defined(FG_HAS_AVX512)
constexpr int kAtOnce = 8;
#elif defined(FG_LEVEL_AVX2) || defined(FG_LEVEL_NEON)
constexpr int kAtOnce = 4;
#else
constexpr int kAtOnce = 2;
#endif

// t = 2^t for -126 <= t < 127, for an output of type T; NaN stays NaN.
template <class T, int N>
FG_INLINE void fast_exp2(vf (&t)[N]) {
  constexpr int degree = kPowerDegree<T>;
  vf f[N], whole[N], p[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) f[v] = fraction(t[v], whole[v]);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) p[v] = set1(PowerOfTwo<degree>::terms[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= degree; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) p[v] = fma(p[v], f[v], set1(PowerOfTwo<degree>::terms[i]));
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = scaled(p[v], whole[v]);
}
template <class T>
FG_INLINE vf fast_exp2(vf t) {
  vf one[] = {t};
  fast_exp2<T>(one);
  return one[0];
}

// 1 / x for x in [1, 2^127).
#if defined(FG_HAS_AVX512)
FG_INLINE vf reciprocal(vf x, const bf16 *) { return _mm512_rcp14_ps(x); }  // relative error 2^-14
template <class T>
FG_INLINE vf reciprocal(vf x, const T *) {
  vf r = _mm512_rcp14_ps(x);
  return mul(r, _mm512_fnmadd_ps(x, r, set1(2.0f)));  // one step of Newton's method
}
#else
template <class T>
FG_INLINE vf reciprocal(vf x, const T *) {
  return div(set1(1.0f), x);
}
#endif

// t = 1 / (1 + 2^t), for an output of type T.  The bounds keep 2^n a normal number; NaN stays NaN.
template <class T, int N>
FG_INLINE void logistic2(vf (&t)[N]) {
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = min(set1(126.0f), max(set1(-126.0f), t[v]));
  fast_exp2<T>(t);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = reciprocal(add(set1(1.0f), t[v]), static_cast<const T *>(nullptr));
}
template <class T>
FG_INLINE vf logistic2(vf t) {
  vf one[] = {t};
  logistic2<T>(one);
  return one[0];
}

// y = y / (1 + e^-y), for an output of type T.
template <class T, int N>
FG_INLINE void silu(vf (&y)[N]) {
  vf t[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = mul(y[v], set1(-1.44269504088896341f));
  logistic2<T>(t);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) y[v] = mul(y[v], t[v]);
}
template <class T>
FG_INLINE vf silu(vf y) {
  vf one[] = {y};
  silu<T>(one);
  return one[0];
}

}  // namespace
