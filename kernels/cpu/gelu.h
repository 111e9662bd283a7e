// Gaussian error linear units, exact, by tanh and by the logistic function, beside SiLU and its kin of silu.h.
#pragma once
#include "silu.h"

namespace {

// e^(w^2) erfc(w) / 2 for w = z / sqrt(2), by Abramowitz & Stegun 7.1.26 (erfc within 1.5e-7) and 7.1.25 (2.5e-5).
template <class T>
FG_INLINE vf half_erfcx(vf z, const T *type) {
  vf t = reciprocal(fma(set1(0.231641888f), z, set1(1.0f)), type);
  vf p = fma(set1(0.5307027145f), t, set1(-0.7265760135f));
  p = fma(p, t, set1(0.7107068705f));
  p = fma(p, t, set1(-0.142248368f));
  return mul(fma(p, t, set1(0.127414796f)), t);
}
FG_INLINE vf half_erfcx(vf z, const bf16 *type) {
  vf t = reciprocal(fma(set1(0.33267253f), z, set1(1.0f)), type);
  vf p = fma(set1(0.3739278f), t, set1(-0.0479399f));
  return mul(fma(p, t, set1(0.1740121f)), t);
}

// y = y Phi(y) = max(y, 0) - |y| erfc(|y| / sqrt(2)) / 2.
template <class T, int N>
FG_INLINE void gelu(vf (&y)[N]) {
  vf z[N], e[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    z[v] = min(set1(13.0f), max(sub(set1(0.0f), y[v]), y[v]));  // beyond it the second term is below 1e-36
    e[v] = mul(mul(z[v], z[v]), set1(-0.72134752044448170f));
  }
  fast_exp2<T>(e);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) e[v] = mul(mul(z[v], e[v]), half_erfcx(z[v], static_cast<const T *>(nullptr)));
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) y[v] = sub(max(set1(0.0f), y[v]), e[v]);
}

// y = y / (1 + e^(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3): y (1 + tanh u) / 2.
template <class T, int N>
FG_INLINE void gelu_tanh(vf (&y)[N]) {
  vf t[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = mul(y[v], fma(set1(-0.10294324f), mul(y[v], y[v]), set1(-2.3022082f)));
  logistic2<T>(t);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) y[v] = mul(y[v], t[v]);
}

// y = y / (1 + e^(-1.702 y)), as CLIP has it.
template <class T, int N>
FG_INLINE void quick_gelu(vf (&y)[N]) {
  vf t[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) t[v] = mul(y[v], set1(-2.4554669f));  // 1.702 log2(e)
  logistic2<T>(t);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) y[v] = mul(y[v], t[v]);
}

template <class T>
FG_INLINE vf gelu(vf y) {
  vf one[] = {y};
  gelu<T>(one);
  return one[0];
}
template <class T>
FG_INLINE vf gelu_tanh(vf y) {
  vf one[] = {y};
  gelu_tanh<T>(one);
  return one[0];
}
template <class T>
FG_INLINE vf quick_gelu(vf y) {
  vf one[] = {y};
  quick_gelu<T>(one);
  return one[0];
}

}  // namespace
