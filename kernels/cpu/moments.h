// Mean and centred sum of squares, in an order fixed by the count alone.
#pragma once
#include "simd.h"

namespace {

// `m2` is the sum of (x - mean)^2 over the elements.
struct Moments {
  double mean, m2;
};

// The first `n` lanes of x, zeros after them.
FG_INLINE vf first_lanes(vf x, int n) {
  float lanes[W] = {};
  store_n(lanes, x, n);
  return load(lanes);
}

template <class T>
FG_INLINE float sum_of(const T *x, int64_t n) {
  vf a = set1(0.0f), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = add(a, load(x + i));
    b = add(b, load(x + i + W));
    c = add(c, load(x + i + 2 * W));
    d = add(d, load(x + i + 3 * W));
  }
  for (; i + W <= n; i += W) a = add(a, load(x + i));
  if (i < n) b = add(b, load_n(x + i, static_cast<int>(n - i)));
  return hsum(add(add(a, b), add(c, d)));
}

// The sums of d = x - centre and of d^2 in one pass, where the centre is the mean of the first sixteenth.  Its distance
// from the mean of all costs at most sixteen roundings of m2: the elements it was taken from belong to the whole.
template <class T>
FG_INLINE Moments moments_of(const T *x, int64_t n) {
  int64_t head = n / 16 / (4 * W) * (4 * W);
  head = head > 4 * W ? head : 4 * W < n ? 4 * W : n;
  const float centre = sum_of(x, head) / static_cast<float>(head);
  const vf m = set1(centre);
  vf sa = set1(0.0f), sb = sa, sc = sa, sd = sa, qa = sa, qb = sa, qc = sa, qd = sa;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vf a = sub(load(x + i), m), b = sub(load(x + i + W), m);
    vf c = sub(load(x + i + 2 * W), m), d = sub(load(x + i + 3 * W), m);
    sa = add(sa, a);
    sb = add(sb, b);
    sc = add(sc, c);
    sd = add(sd, d);
    qa = fma(a, a, qa);
    qb = fma(b, b, qb);
    qc = fma(c, c, qc);
    qd = fma(d, d, qd);
  }
  for (; i + W <= n; i += W) {
    vf a = sub(load(x + i), m);
    sa = add(sa, a);
    qa = fma(a, a, qa);
  }
  if (i < n) {
    int rest = static_cast<int>(n - i);
    vf a = first_lanes(sub(load_n(x + i, rest), m), rest);
    sb = add(sb, a);
    qb = fma(a, a, qb);
  }
  double s = hsum(add(add(sa, sb), add(sc, sd))), q = hsum(add(add(qa, qb), add(qc, qd)));
  double count = static_cast<double>(n), m2 = q - s * s / count;
  return {centre + s / count, m2 > 0 ? m2 : 0};
}

// The moments of all chunks together (Chan, Golub & LeVeque 1979): `full` elements each, `last` in the last one.
FG_INLINE Moments merged(const Moments *chunk, int64_t chunks, int64_t stride, double full, double last) {
  double total = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    double n = i + 1 < chunks ? full : last;
    total += n;
    sum += n * chunk[i * stride].mean;
  }
  double mean = sum / total;
  for (int64_t i = 0; i < chunks; ++i) {
    double d = chunk[i * stride].mean - mean;
    m2 += chunk[i * stride].m2 + (i + 1 < chunks ? full : last) * d * d;
  }
  return {mean, m2};
}

// weight or bias `i`, or `absent` where there is none.
FG_INLINE float parameter(const void *p, int64_t dtype, int64_t i, float absent) {
  if (!p) return absent;
  float lanes[W] = {};
  if (dtype == FG_FLOAT32) return static_cast<const float *>(p)[i];
  if (dtype == FG_BFLOAT16) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const bf16 *>(p)[i].bits) << 16;
    __builtin_memcpy(lanes, &bits, sizeof(bits));
  } else {
    store(lanes, load_n(static_cast<const fp16 *>(p) + i, 1));
  }
  return lanes[0];
}

}  // namespace
