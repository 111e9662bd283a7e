// Transcendental functions over the vector operations of simd.h: included by it, after a level's own header.
#pragma once

namespace {

// e^r for |r| <= ln(2)/2, by its Taylor polynomial of degree 7: the first term left out is below 2^-28.
FG_INLINE vf exp_reduced(vf r) {
  vf p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  return fma(p, r, set1(1.0f));
}

FG_INLINE vf exp(vf x) {
  // Past these bounds the result is infinite or 0 in float32; the vector comes second so that NaN stays.
  x = min(set1(89.0f), max(set1(-104.5f), x));
  vf n = round(mul(x, set1(1.44269504088896341f)));
  // ln 2 in two parts; the first has 12 bits, so that n times it is exact.
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440054690583e-4f), r);
  return scale2(exp_reduced(r), n);
}

FG_INLINE vf exp2(vf x) {
  x = min(set1(129.0f), max(set1(-151.0f), x));
  vf n = round(x);
  return scale2(exp_reduced(mul(sub(x, n), set1(0.693147180559945309f))), n);
}

}  // namespace
