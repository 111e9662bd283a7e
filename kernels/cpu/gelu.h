// Gaussian error linear units, exact and by tanh, beside SiLU and its kin of silu.h.
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

// y Phi(y) = max(y, 0) - |y| erfc(|y| / sqrt(2)) / 2.
template <class T>
FG_INLINE vf gelu(vf y) {
  vf z = max(sub(set1(0.0f), y), y);
  z = min(set1(13.0f), z);  // the second term is below 1e-36 there, and infinity times 0 would be NaN
  vf e = fast_exp2<T>(mul(mul(z, z), set1(-0.72134752044448170f)));
  return sub(max(set1(0.0f), y), mul(mul(z, e), half_erfcx(z, static_cast<const T *>(nullptr))));
}

// y / (1 + e^(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3): y (1 + tanh u) / 2.
template <class T>
FG_INLINE vf gelu_tanh(vf y) {
  vf t = mul(y, fma(set1(-0.10294324f), mul(y, y), set1(-2.3022082f)));
  return mul(y, logistic2<T>(t));
}

}  // namespace
