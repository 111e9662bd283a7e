// The logistic function and SiLU, as exact as the element type that they are rounded to.
#pragma once
#include "simd.h"

namespace {

// 2^f on [0, 1] by least relative error: 1.5e-7 (float32), 2.7e-6 (fp16), 7.6e-5 (bf16).
FG_INLINE vf power_of_two(vf f, const float *) {
  vf p = fma(set1(1.8775705e-3f), f, set1(8.989335e-3f));
  p = fma(p, f, set1(5.5826344e-2f));
  p = fma(p, f, set1(0.2401536f));
  p = fma(p, f, set1(0.6931531f));
  return fma(p, f, set1(0.99999994f));
}
FG_INLINE vf power_of_two(vf f, const fp16 *) {
  vf p = fma(set1(1.3534094e-2f), f, set1(5.2011397e-2f));
  p = fma(p, f, set1(0.24144296f));
  p = fma(p, f, set1(0.6930037f));
  return fma(p, f, set1(1.0000026f));
}
FG_INLINE vf power_of_two(vf f, const bf16 *) {
  vf p = fma(set1(7.802375e-2f), f, set1(0.22606643f));
  p = fma(p, f, set1(0.6958348f));
  return fma(p, f, set1(0.99992496f));
}

// 2^t for -126 <= t < 127, for an output of type T; NaN stays NaN.
template <class T>
FG_INLINE vf fast_exp2(vf t) {
  const T *type = nullptr;
#if defined(FG_HAS_AVX512)
  return _mm512_scalef_ps(power_of_two(_mm512_reduce_ps(t, 9), type), t);  // t - floor(t); scalef takes the floor itself
#else
  vf n = floor(t);
  return scale2(power_of_two(sub(t, n), type), n);
#endif
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

// 1 / (1 + 2^t), for an output of type T.  The bounds keep 2^n a normal number; NaN stays NaN.
template <class T>
FG_INLINE vf logistic2(vf t) {
  vf e = fast_exp2<T>(min(set1(126.0f), max(set1(-126.0f), t)));
  return reciprocal(add(set1(1.0f), e), static_cast<const T *>(nullptr));
}

// y / (1 + e^-y), for an output of type T.
template <class T>
FG_INLINE vf silu(vf y) {
  return mul(y, logistic2<T>(mul(y, set1(-1.44269504088896341f))));
}

}  // namespace
