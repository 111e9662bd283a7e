// The activations of bias_act, then its gain and clamp: for every kernel that ends in them.
#pragma once
#include "gelu.h"

namespace {

enum Activation { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kQuickGelu };

// e^x - 1 for x <= 0, without the loss of digits near 0: 2^n (e^r - 1) + (2^n - 1), e^r - 1 by its Taylor polynomial.
FG_INLINE vf expm1_negative(vf x) {
  x = max(set1(-104.5f), x);
  vf n = round(mul(x, set1(1.44269504088896341f)));
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440054690583e-4f), r);
  vf p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  return add(scale2(mul(p, r), n), sub(scale2(set1(1.0f), n), set1(1.0f)));
}

// log(1 + u) for 0 <= u <= 1, as 2 artanh(u / (2 + u)); the first term left out is below 2e-9 of it.
FG_INLINE vf log1p_unit(vf u) {
  vf z = div(u, add(set1(2.0f), u)), s = mul(z, z);
  vf p = fma(s, set1(1.0f / 15.0f), set1(1.0f / 13.0f));
  p = fma(s, p, set1(1.0f / 11.0f));
  p = fma(s, p, set1(1.0f / 9.0f));
  p = fma(s, p, set1(1.0f / 7.0f));
  p = fma(s, p, set1(1.0f / 5.0f));
  p = fma(s, p, set1(1.0f / 3.0f));
  z = add(z, z);
  return fma(mul(z, s), p, z);
}

// act(x), for an output of type T.  NaN stays NaN.
template <int kAct, class T>
FG_INLINE vf activated(vf x, vf alpha) {
  const vf zero = set1(0.0f);
  if (kAct == kRelu) return max(zero, x);
  if (kAct == kLrelu) return select_gt(x, zero, x, mul(x, alpha));
  if (kAct == kTanh) {
    vf size = max(sub(zero, x), x), e = expm1_negative(mul(size, set1(-2.0f)));
    vf t = div(e, add(set1(2.0f), e));  // minus tanh of |x|
    return select_gt(x, zero, sub(zero, t), t);
  }
  if (kAct == kSigmoid) return div(set1(1.0f), add(set1(1.0f), exp(sub(zero, x))));
  if (kAct == kElu) return select_gt(x, zero, x, expm1_negative(min(zero, x)));
  if (kAct == kSelu) {
    vf below = mul(set1(1.6732632423543772f), expm1_negative(min(zero, x)));
    return mul(set1(1.0507009873554805f), select_gt(x, zero, x, below));
  }
  if (kAct == kSoftplus) return add(max(zero, x), log1p_unit(exp(min(x, sub(zero, x)))));
  if (kAct == kSwish) return silu<T>(x);
  if (kAct == kQuickGelu) return quick_gelu<T>(x);
  return x;
}

// What comes after the bias.
struct Finish {
  float alpha, gain, clamp;
};

template <int kAct, class T>
FG_INLINE vf finished(vf x, const Finish &f) {
  vf y = mul(activated<kAct, T>(x, set1(f.alpha)), set1(f.gain));
  return min(set1(f.clamp), max(set1(-f.clamp), y));
}

template <int kValue>
struct Chosen {
  static constexpr int value = kValue;
};

// f(Chosen<act>) -> int for the activation of that number.
template <class F>
inline int with_activation(int64_t act, const F &f) {
  switch (act) {
    case kLinear:
      return f(Chosen<kLinear>());
    case kRelu:
      return f(Chosen<kRelu>());
    case kLrelu:
      return f(Chosen<kLrelu>());
    case kTanh:
      return f(Chosen<kTanh>());
    case kSigmoid:
      return f(Chosen<kSigmoid>());
    case kElu:
      return f(Chosen<kElu>());
    case kSelu:
      return f(Chosen<kSelu>());
    case kSoftplus:
      return f(Chosen<kSoftplus>());
    case kSwish:
      return f(Chosen<kSwish>());
    case kQuickGelu:
      return f(Chosen<kQuickGelu>());
    default:
      return FG_BAD_ARGUMENT;
  }
}

}  // namespace
