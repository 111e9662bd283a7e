// y / (1 + e^-y), as exact as the element type that it is rounded to.
#pragma once
#include "simd.h"

namespace {

// 2^f on [-1/2, 1/2] by Chebyshev fits: relative errors 1.4e-7 (float32), 2.7e-6 (fp16), 7.7e-5 (bf16).
FG_INLINE vf power_of_two(vf f, const float *) {
  vf p = fma(set1(1.3266971e-3f), f, set1(9.67546e-3f));
  p = fma(p, f, set1(5.5507425e-2f));
  p = fma(p, f, set1(0.24022122f));
  p = fma(p, f, set1(0.69314694f));
  return fma(p, f, set1(1.0000001f));
}
FG_INLINE vf power_of_two(vf f, const fp16 *) {
  vf p = fma(set1(9.5605105e-3f), f, set1(5.591704e-2f));
  p = fma(p, f, set1(0.24024981f));
  p = fma(p, f, set1(0.69312197f));
  return fma(p, f, set1(0.99999917f));
}
FG_INLINE vf power_of_two(vf f, const bf16 *) {
  vf p = fma(set1(5.5088684e-2f), f, set1(0.24260405f));
  p = fma(p, f, set1(0.6932762f));
  return fma(p, f, set1(0.99992895f));
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

// For an output of type T.  The bounds keep 2^n a normal number; NaN stays NaN.
template <class T>
FG_INLINE vf silu(vf y) {
  const T *type = nullptr;
  vf t = mul(y, set1(-1.44269504088896341f));
  t = min(set1(126.0f), max(set1(-126.0f), t));
  vf n = round(t);
  vf e = scale2(power_of_two(sub(t, n), type), n);
  return mul(y, reciprocal(add(set1(1.0f), e), type));
}

}  // namespace
