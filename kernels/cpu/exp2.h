// 2^t as its whole part and a polynomial of the rest, as exact as the element type that the result is rounded to.
#pragma once
#include "simd.h"

namespace {

// Coefficients of 2^f of a degree, the highest power first, by least relative error (3: 8e-5, 4: 2.6e-6, 5: 2e-7): for
// 0 <= f < 1 where a vector scales by the floor of another, else for |f| <= 1/2.
template <int DEGREE>
struct PowerOfTwo;
#if defined(FG_HAS_AVX512)
template <>
struct PowerOfTwo<3> {
  static constexpr float terms[] = {0.07802452147f, 0.22606717050f, 0.69583350420f, 0.99992519617f};
};
template <>
struct PowerOfTwo<4> {
  static constexpr float terms[] = {1.3534094e-2f, 5.2011397e-2f, 0.24144296f, 0.6930037f, 1.0000026f};
};
template <>
struct PowerOfTwo<5> {
  static constexpr float terms[] = {0.00187757669f, 0.00898934063f, 0.05582631752f,
                                    0.24015361071f, 0.69315308332f, 0.99999994040f};
};
#else
template <>
struct PowerOfTwo<3> {
  static constexpr float terms[] = {0.05517166234f, 0.24261112245f, 0.69326098851f, 0.99992807552f};
};
template <>
struct PowerOfTwo<4> {
  static constexpr float terms[] = {0.0095701037076f, 0.055917860466f, 0.24024744795f, 0.69312181489f, 0.99999926145f};
};
template <>
struct PowerOfTwo<5> {
  static constexpr float terms[] = {0.00132764736f, 0.00967554129f, 0.05550713277f,
                                    0.24022119729f, 0.69314696705f, 1.0f};
};
#endif

// The degree for an output of type T.
template <class T>
constexpr int kPowerDegree = 5;
template <>
constexpr int kPowerDegree<fp16> = 4;
template <>
constexpr int kPowerDegree<bf16> = 3;

// The fraction of t that the polynomial takes; `whole` is for scaled().
FG_INLINE vf fraction(vf t, vf &whole) {
#if defined(FG_HAS_AVX512)
  whole = t;  // of which scaled() takes the floor
  return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 at -inf
#else
  // A sum past 2^23 has no fraction: its last bits are round(t) plus the bias of an exponent.
  const vf past = set1(12582912.0f + 127.0f);
  whole = add(t, past);
  return sub(t, sub(whole, past));
#endif
}
// p times two to the whole part of t: where not at avx512, for -126 <= t < 127.5 alone.
FG_INLINE vf scaled(vf p, vf whole) {
#if defined(FG_HAS_AVX512)
  return _mm512_scalef_ps(p, whole);
#else
  return mul(p, power2_in(whole));
#endif
}

}  // namespace
