// Layer norm and RMS norm of rows, of x or of x + gate * branch: a row stays in the first-level caches between its passes.
#pragma once
#include "abi.h"
#include "moments.h"
#include "stream.h"
#include "vectors.h"

namespace {

constexpr int64_t kItem = 1 << 17;   // bytes of x that one work item takes, at least one row
constexpr int64_t kSmall = 1 << 15;  // bytes of x below which one thread is enough
constexpr int64_t kHeld = 1 << 14;   // bytes of a row of x + gate * branch that are kept until they are normalized

// A tensor of x's shape, broadcast or not: row (outer, inner) starts at outer * far + inner * near.
template <class S>
struct Spread {
  const S *at;
  int64_t far, near;
  FG_INLINE Spread of(const void *p, int64_t far, int64_t near, const void *absent) {
    return p ? Spread{static_cast<const S *>(p), far, near} : Spread{static_cast<const S *>(absent), 0, 0};
  }
  const S *row(int64_t outer, int64_t inner) const { return at + outer * far + inner * near; }
};

// The sum of x^2.
template <class T>
FG_INLINE float square_sum_of(const T *x, int64_t n) {
  vf a = set1(0.0f), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vf p = load(x + i), q = load(x + i + W), r = load(x + i + 2 * W), s = load(x + i + 3 * W);
    a = fma(p, p, a);
    b = fma(q, q, b);
    c = fma(r, r, c);
    d = fma(s, s, d);
  }
  for (; i < n; i += W) {
    vf p = n - i < W ? load_n(x + i, static_cast<int>(n - i)) : load(x + i);
    a = fma(p, p, a);
  }
  return hsum(add(add(a, b), add(c, d)));
}

// out = norm(x) * weight + bias, times 1 + scale, plus shift where kModulated.  Memory would be idle while a row that is
// in the cache is normalized: `next` and `more`, what will be read after it, are prefetched meanwhile.
template <bool kRms, bool kModulated, class T, class S>
FG_INLINE void norm_row(const T *x, T *out, int64_t width, const float *weight, const float *bias, const S *scale,
                        const S *shift, double eps, const T *next, const T *more, bool streaming) {
  const Moments moments = kRms ? Moments{0, square_sum_of(x, width)} : moments_of(x, width);
  const float mean = static_cast<float>(moments.mean);
  const float deviation = 1.0f / __builtin_sqrtf(static_cast<float>(moments.m2 / static_cast<double>(width) + eps));
  const vf m = set1(mean), k = set1(deviation), one = set1(1.0f);
  const vf rest = set1(static_cast<float>(static_cast<double>(mean) - moments.mean) * deviation);
  leaving(out, streaming, [&](auto past) {
    vectors(width, [&](int64_t i, int n) {
      __builtin_prefetch(next + i);
      if (more) __builtin_prefetch(more + i);
      vf y = kRms ? mul(part(x + i, n), k) : fma(sub(part(x + i, n), m), k, rest);
      y = fma(y, part(weight + i, n), part(bias + i, n));
      if (kModulated) y = fma(y, add(one, part(scale + i, n)), part(shift + i, n));
      if (n == W)
        leave(out + i, y, past);
      else
        store_n(out + i, y, n);
    });
  });
}

// What is multiplied with and added to a normalized row, in float32: weight and bias, modulated where the modulation is
// that of all rows of an outer step (then `step` is where the next one's begin, else 0).
struct Affine {
  const float *weight, *bias;
  int64_t step;
};
template <class S>
FG_INLINE Affine affine_of(const fg_row_norm_args *a, bool folded, Spread<S> scale, Spread<S> shift, float *scratch) {
  const int64_t width = a->width, step = folded ? 2 * width : 0;
  const float offset = a->weight ? static_cast<float>(a->offset) : 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    scratch[i] = parameter(a->weight, a->weight_dtype, i, 1.0f) + offset;
    scratch[width + i] = parameter(a->bias, a->bias_dtype, i, 0.0f);
  }
  for (int64_t o = folded ? a->outer - 1 : -1; o >= 0; --o)  // the first, which the others are made of, comes last
    vectors(width, [&](int64_t i, int n) {
      const vf gain = add(set1(1.0f), part(scale.row(o, 0) + i, n));
      put(scratch + o * step + i, mul(part(scratch + i, n), gain), n);
      put(scratch + o * step + width + i, fma(part(scratch + width + i, n), gain, part(shift.row(o, 0) + i, n)), n);
    });
  return {scratch, scratch + width, step};
}

template <bool kRms, class T, class S>
int rows(const fg_row_norm_args *a) {
  const int64_t total = a->outer * a->inner, width = a->width;
  const bool modulated = a->scale || a->shift;
  const bool folded = modulated && !a->scale_inner && !a->shift_inner && a->inner >= 16;  // else it would cost more
  const int64_t floats = (2 * (folded ? a->outer : 1) + 1) * width;
  float *zeros = static_cast<float *>(fg_scratch(static_cast<size_t>(floats) * sizeof(float)));
  if (!zeros) return FG_NO_MEMORY;
  for (int64_t i = 0; i < width; ++i) zeros[i] = 0;  // of any type: what a scale or shift that is not there adds
  const auto scale = Spread<S>::of(a->scale, a->scale_outer, a->scale_inner, zeros);
  const auto shift = Spread<S>::of(a->shift, a->shift_outer, a->shift_inner, zeros);
  const auto gate = Spread<S>::of(a->gate, a->gate_outer, a->gate_inner, nullptr);
  const auto x = Spread<T>::of(a->x, a->x_outer, a->x_inner, nullptr);
  const auto branch = Spread<T>::of(a->branch, a->branch_outer, a->branch_inner, nullptr);
  const Affine affine = affine_of(a, folded, scale, shift, zeros + width);
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T)), share = (total + 4 * fg_threads() - 1) / (4 * fg_threads());
  int64_t step = kItem / bytes < share ? kItem / bytes : share;
  step = total * bytes < kSmall ? total : step < 1 ? 1 : step;
  const bool streaming = streams((a->branch ? 4 : 2) * total * bytes), held = streaming && bytes <= kHeld;
  return parallel_for((total + step - 1) / step, 1, [&](int64_t item) {
    const int64_t last = (item + 1) * step < total ? (item + 1) * step : total;
    int64_t o = item * step / a->inner, i = item * step % a->inner;
    alignas(64) T room[kHeld / sizeof(T)];
    for (int64_t r = item * step; r < last; ++r) {
      const int64_t next_o = r + 1 == last || i + 1 < a->inner ? o : o + 1;
      const int64_t next_i = r + 1 == last ? i : next_o == o ? i + 1 : 0;
      const T *from = x.row(o, i), *next = x.row(next_o, next_i), *more = nullptr;
      T *out = static_cast<T *>(a->out) + r * width;
      if (a->branch) {
        T *sum = held ? room : static_cast<T *>(a->sum) + r * width;
        add_row<T, S>(from, branch.row(o, i), a->gate ? gate.row(o, i) : nullptr, sum, width);
        from = sum;
        more = branch.row(next_o, next_i);
      }
      const float *weight = affine.weight + o * affine.step, *bias = affine.bias + o * affine.step;
      if (modulated && !folded)
        norm_row<kRms, true, T, S>(from, out, width, weight, bias, scale.row(o, i), shift.row(o, i), a->eps, next, more,
                                   streaming);
      else
        norm_row<kRms, false, T, S>(from, out, width, weight, bias, nullptr, nullptr, a->eps, next, more, streaming);
      if (a->branch && held) stream<T>(room, static_cast<T *>(a->sum) + r * width, width);
      o = next_o;
      i = next_i;
    }
    if (streaming) streamed();
    return 0;
  });
}

// By the element type, and that of gate, scale and shift: x's or float32.
template <bool kRms>
int norm_rows(const fg_row_norm_args *a) {
  if (!a->outer || !a->inner || !a->width) return FG_OK;
  const bool wide = a->modulation_dtype == FG_FLOAT32;
  switch (a->dtype) {
    case FG_FLOAT32:
      return rows<kRms, float, float>(a);
    case FG_BFLOAT16:
      return wide ? rows<kRms, bf16, float>(a) : rows<kRms, bf16, bf16>(a);
    case FG_FLOAT16:
      return wide ? rows<kRms, fp16, float>(a) : rows<kRms, fp16, fp16>(a);
    default:
      return FG_BAD_ARGUMENT;
  }
}

}  // namespace
