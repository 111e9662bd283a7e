// levels: scalar avx2 avx512 avx512_bf16 neon
// act(x W^T + bias + residual) * multiplier for few rows of x: W is read once, as it lies.
//
// A dot product runs along a row of W and one of x in the lanes of one vector, which are added up at the end.  A tile of
// them is done at a time, kTile rows of W by one of x, half as many by two, a quarter by four: an element is the same sum
// in each, so that its bits do not depend on the other rows.
#include "abi.h"
#include "quantized.h"

namespace {

#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_NEON)
constexpr int kTile = 16;  // what registers hold
#elif defined(FG_LEVEL_AVX2)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif
constexpr int kPanel = 16;         // rows of W that are done before the next
constexpr int64_t kRun = 1024;      // elements added up one after the other; the sums of such runs are then
constexpr int64_t kItem = 1 << 16;  // bytes of W that are worth a thread

// One step of a dot product: STEP elements of both rows.
template <class T>
struct Dot {
  using V = vf;
  static constexpr int STEP = W;
  FG_INLINE V get(const T *p) { return load(p); }
  FG_INLINE V get_n(const T *p, int n) { return load_n(p, n); }
  FG_INLINE vf step(vf sum, V w, V x) { return fma(w, x, sum); }
};
#if defined(FG_HAS_AVX512_BF16)
template <>
struct Dot<bf16> {
  using V = __m512i;
  static constexpr int STEP = 32;
  FG_INLINE V get(const bf16 *p) { return _mm512_loadu_si512(p); }
  FG_INLINE V get_n(const bf16 *p, int n) { return _mm512_maskz_loadu_epi16((1ull << n) - 1, p); }
  FG_INLINE vf step(vf sum, V w, V x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
#endif

// to[i] = the lanes of v[i] added up, each in the same order.
FG_INLINE void totals(const vf (&v)[kTile], float *to) {
#if defined(FG_HAS_AVX512)
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)  // lanes 0 + 2 and 1 + 3 of every four
    a[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  store(to, add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd)));
#else
  for (int i = 0; i < kTile; ++i) to[i] = hsum(v[i]);
#endif
}

// acc += rows w + i * down of the weight by row x[r], for elements [at, end) of each; kTile / ROWS rows of the weight.
template <class T, int ROWS>
FG_INLINE void steps(const T *w, int64_t down, const T *const (&x)[ROWS], int64_t at, int64_t end, vf (&acc)[kTile]) {
  constexpr int DOWN = kTile / ROWS, STEP = Dot<T>::STEP;
  for (; at + STEP <= end; at += STEP) {
    typename Dot<T>::V right[ROWS];
    for (int r = 0; r < ROWS; ++r) right[r] = Dot<T>::get(x[r] + at);
#pragma GCC unroll 16
    for (int i = 0; i < DOWN; ++i) {
      const typename Dot<T>::V left = Dot<T>::get(w + i * down + at);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r * DOWN + i] = Dot<T>::step(acc[r * DOWN + i], left, right[r]);
    }
  }
  if (at == end) return;
  const int n = static_cast<int>(end - at);
  for (int i = 0; i < DOWN; ++i)
    for (int r = 0; r < ROWS; ++r)
      acc[r * DOWN + i] =
          Dot<T>::step(acc[r * DOWN + i], Dot<T>::get_n(w + i * down + at, n), Dot<T>::get_n(x[r] + at, n));
}

// sums[r * kPanel + i] = rows w + i * down of the weight by row x[r].
template <class T, int ROWS>
inline void dots(const T *w, int64_t down, const T *const (&x)[ROWS], int64_t k, float *sums) {
  constexpr int DOWN = kTile / ROWS;
  int64_t at = 0;
  do {
    const int64_t end = k < at + kRun ? k : at + kRun;
    vf acc[kTile];
    for (int i = 0; i < kTile; ++i) acc[i] = set1(0.0f);
    steps<T, ROWS>(w, down, x, at, end, acc);
    float found[kTile];
    totals(acc, found);
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < DOWN; ++i) {
        float &sum = sums[r * kPanel + i];
        sum = at ? sum + found[r * DOWN + i] : found[r * DOWN + i];
      }
    at = end;
  } while (at < k);
}

// What follows the products, at n <= W columns of one row of the output.
template <class T>
FG_INLINE void put(const fg_linear_args *a, vf y, int64_t row, int64_t column, int n) {
  const int64_t at = row * a->out_features + column;
  if (a->bias)
    y = add(y, a->bias_dtype == FG_FLOAT32 ? load_n(static_cast<const float *>(a->bias) + column, n)
                                           : load_n(static_cast<const T *>(a->bias) + column, n));
  if (a->residual) y = add(y, load_n(static_cast<const T *>(a->residual) + at, n));
  y = activate<T>(y, a->activation);
  if (a->multiplier) y = mul(y, load_n(static_cast<const T *>(a->multiplier) + at, n));
  store_n(static_cast<T *>(a->out) + at, y, n);
}

// ROWS rows of x from `m` on by the sixteen rows of W from `n` on.
template <class T, int ROWS>
void some(const fg_linear_args *a, int64_t n, int64_t m) {
  constexpr int DOWN = kTile / ROWS;
  const int64_t k = a->width, left = a->out_features - n;
  const T *x[ROWS], *w = static_cast<const T *>(a->weight);
  for (int r = 0; r < ROWS; ++r)
    x[r] = static_cast<const T *>(a->x) + (m + r) / a->inner * a->x_outer + (m + r) % a->inner * a->x_inner;
  float sums[ROWS * kPanel];
  int64_t done = 0;  // columns of the panel that the one before it had
  if (a->out_features < kPanel) {
    for (int64_t i = 0; i < left; ++i) {
      float same[ROWS * kPanel];
      dots<T, ROWS>(w + i * k, 0, x, k, same);
      for (int r = 0; r < ROWS; ++r) sums[r * kPanel + i] = same[r * kPanel];
    }
  } else {
    if (left < kPanel) done = kPanel - left;
    for (int i = 0; i < kPanel; i += DOWN) dots<T, ROWS>(w + (n - done + i) * k, k, x, k, sums + i);
  }
  const int64_t end = left < kPanel ? left : kPanel;
  for (int r = 0; r < ROWS; ++r)
    for (int64_t i = 0; i < end; i += W) {
      const int most = static_cast<int>(end - i < W ? end - i : W);
      put<T>(a, load_n(sums + r * kPanel + done + i, most), m + r, n + i, most);
    }
}

template <class T>
int linear(const fg_linear_args *a) {
  const int64_t rows = a->outer * a->inner, panels = (a->out_features + kPanel - 1) / kPanel;
  const int64_t bytes = kPanel * a->width * static_cast<int64_t>(sizeof(T)), most = 2 * fg_threads();
  int64_t step = (panels + most - 1) / most;
  step = step < 1 ? 1 : step;
  const int64_t items = (panels + step - 1) / step;
  return parallel_for(items, 1 + kItem / (step * bytes * (1 + rows / 4) + 1), [&](int64_t item) {
    for (int64_t p = item * step; p < (item + 1) * step && p < panels; ++p)
      for (int64_t m = 0; m < rows;) {
        if (rows - m >= 4)
          some<T, 4>(a, p * kPanel, m), m += 4;
        else if (rows - m >= 2)
          some<T, 2>(a, p * kPanel, m), m += 2;
        else
          some<T, 1>(a, p * kPanel, m), m += 1;
      }
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(linear)(const fg_linear_args *a) {
  if (!a->outer || !a->inner || !a->out_features) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return linear<float>(a);
    case FG_BFLOAT16: return linear<bf16>(a);
    case FG_FLOAT16: return linear<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
