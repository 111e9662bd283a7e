// Rotary embedding of rows, after an RMS norm of each where asked: what rope.cpp and qk_norm_rope.cpp share.
//
// The tables of a block of positions are spread once into float factors, so that every row, whatever the layout, is
//   out[e] = scale (x[e] keep[e] + x[partner of e] cross[e]),
// with the sign of the sine and the norm's weight in the factors; the heads that share a position share them.
#pragma once
#include "moments.h"
#include "stream.h"

namespace {

constexpr int64_t kBuffer = 1 << 13;  // bytes of a row that is turned before it goes past the caches
constexpr int64_t kTable = 1 << 14;  // bytes of factors that a work item spreads, at least one row
constexpr int64_t kTogether = 8;     // rows whose norms are worked out at once, at most
constexpr int64_t kRows = 1 << 16;   // bytes of x that a work item takes, at least one row of each position

// A row of a table as float.
template <class T>
FG_INLINE void widened(const T *row, int64_t step, float *out, int64_t n) {
  int64_t i = 0;
  if (step == 1)
    for (; i + W <= n; i += W) store(out + i, load(row + i));
  for (; i < n; ++i) store_n(out + i, load_n(row + i * step, 1), 1);
}

FG_INLINE void widened_row(const void *table, int64_t dtype, int64_t at, int64_t step, float *out, int64_t n) {
  if (dtype == FG_FLOAT32) return widened(static_cast<const float *>(table) + at, step, out, n);
  if (dtype == FG_BFLOAT16) return widened(static_cast<const bf16 *>(table) + at, step, out, n);
  return widened(static_cast<const fp16 *>(table) + at, step, out, n);
}

// The factors of one position from its cosines and sines, times the weight w (null: ones).
template <bool kPairs>
FG_INLINE void spread(const float *cos, const float *sin, const float *w, int64_t half, bool full, float *keep,
                      float *cross) {
  for (int64_t i = 0; i < half; ++i) {
    const int64_t a = kPairs ? 2 * i : i, b = kPairs ? 2 * i + 1 : half + i;
    const int64_t ta = full ? a : i, tb = full ? b : i;
    const float wa = w ? w[a] : 1.0f, wb = w ? w[b] : 1.0f;
    keep[a] = cos[ta] * wa;
    cross[a] = -sin[ta] * wb;
    keep[b] = cos[tb] * wb;
    cross[b] = sin[tb] * wa;
  }
}

template <class T>
FG_INLINE float inverse_rms(const T *x, int64_t n, double eps) {
  vf a = set1(0.0f), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf p = load(x + i), q = load(x + i + W);
    a = fma(p, p, a);
    b = fma(q, q, b);
  }
  for (; i < n; i += W) {
    vf p = load_n(x + i, static_cast<int>(n - i < W ? n - i : W));
    a = fma(p, p, a);
  }
  return 1.0f / __builtin_sqrtf(hsum(add(a, b)) / static_cast<float>(n) + static_cast<float>(eps));
}

template <bool kNorm>
FG_INLINE vf turned(vf x, vf partner, vf keep, vf cross, vf scale) {
  vf y = fma(x, keep, mul(partner, cross));
  return kNorm ? mul(y, scale) : y;
}

// Pairs (i, half + i).
template <class T, bool kNorm>
FG_INLINE void turn_halves(const T *x, T *out, int64_t half, const float *keep, const float *cross, vf scale) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i), b = load(x + half + i);
    store(out + i, turned<kNorm>(a, b, load(keep + i), load(cross + i), scale));
    store(out + half + i, turned<kNorm>(b, a, load(keep + half + i), load(cross + half + i), scale));
  }
  if (i < half) {
    int n = static_cast<int>(half - i);
    vf a = load_n(x + i, n), b = load_n(x + half + i, n);
    store_n(out + i, turned<kNorm>(a, b, load_n(keep + i, n), load_n(cross + i, n), scale), n);
    vf k = load_n(keep + half + i, n), c = load_n(cross + half + i, n);
    store_n(out + half + i, turned<kNorm>(b, a, k, c, scale), n);
  }
}

// Pairs (2 i, 2 i + 1).
template <class T, bool kNorm>
FG_INLINE void turn_pairs(const T *x, T *out, int64_t half, const float *keep, const float *cross, vf scale) {
#if defined(FG_LEVEL_SCALAR)
  for (int64_t i = 0; i < 2 * half; i += 2) {
    vf a = load(x + i), b = load(x + i + 1);
    store(out + i, turned<kNorm>(a, b, keep[i], cross[i], scale));
    store(out + i + 1, turned<kNorm>(b, a, keep[i + 1], cross[i + 1], scale));
  }
#else
  int64_t i = 0;
  for (; i + W <= 2 * half; i += W) {
    vf a = load(x + i);
    store(out + i, turned<kNorm>(a, swap_pairs(a), load(keep + i), load(cross + i), scale));
  }
  if (i < 2 * half) {
    int n = static_cast<int>(2 * half - i);
    vf a = load_n(x + i, n);
    store_n(out + i, turned<kNorm>(a, swap_pairs(a), load_n(keep + i, n), load_n(cross + i, n), scale), n);
  }
#endif
}

template <bool kNorm>
FG_INLINE vf passed(vf x, vf weight, vf scale) {
  return kNorm ? mul(mul(x, scale), weight) : x;
}

// The features that do not turn; `weight` may be null.
template <class T, bool kNorm>
FG_INLINE void pass(const T *x, T *out, int64_t n, const float *weight, vf scale) {
  const vf one = set1(1.0f);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, passed<kNorm>(load(x + i), weight ? load(weight + i) : one, scale));
  if (i < n) {
    int m = static_cast<int>(n - i);
    store_n(out + i, passed<kNorm>(load_n(x + i, m), weight ? load_n(weight + i, m) : one, scale), m);
  }
}

// Rows of x and out, and their factors, each a stride after the one before; no weight where `weight` is null.
template <class T>
struct Run {
  const T *x;
  T *out;
  const float *factors, *weight;
  int64_t rows, x_step, out_step, factors_step;
  bool streaming;
};

template <class T, bool kNorm, bool kPairs, class Args>
FG_INLINE void turn_run(const Args *a, const Run<T> &run, double eps) {
  const int64_t width = a->width, turning = 2 * a->half, kept = turning / W * W;
  const int64_t together = kTogether * 2 / static_cast<int64_t>(sizeof(T));
  float scale[kTogether] = {};
  alignas(64) T buffer[kBuffer / sizeof(T)];
  for (int64_t first = 0; first < run.rows; first += together) {
    const int64_t last = first + together < run.rows ? first + together : run.rows;
    if (kNorm)  // of several rows at once: each ends in a chain of slow operations
      for (int64_t r = first; r < last; ++r) {
        const T *x = run.x + r * run.x_step;
        scale[r - first] = inverse_rms(x, width, eps);
        for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(x + together * run.x_step + i);
      }
    for (int64_t r = first; r < last; ++r) {
      const T *x = run.x + r * run.x_step;
      T *out = run.streaming ? buffer : run.out + r * run.out_step;
      const float *f = run.factors + r * run.factors_step, *w = run.weight;
      const vf by = set1(scale[r - first]);
      // From a whole vector on, and overwritten by what turns: stores that stay in a cache line.
      if (width > turning) pass<T, kNorm>(x + kept, out + kept, width - kept, w ? w + kept : nullptr, by);
      if (kPairs)
        turn_pairs<T, kNorm>(x, out, a->half, f, f + turning, by);
      else
        turn_halves<T, kNorm>(x, out, a->half, f, f + turning, by);
      if (run.streaming) stream<T>(buffer, run.out + r * run.out_step, width);
    }
  }
  if (run.streaming) streamed();
}

// The table row of position r (of rows_0 x rows_1), counted in elements; -1 where it lies outside the table.
template <class Args>
FG_INLINE int64_t table_row(const Args *a, int64_t r) {
  const int64_t i0 = r / a->rows_1, i1 = r % a->rows_1;
  if (!a->positions) return i0 * a->table_0 + i1 * a->table_1;
  const int64_t at = i0 * a->positions_0 + i1 * a->positions_1;
  const int64_t row = a->positions_dtype == FG_INT64 ? static_cast<const int64_t *>(a->positions)[at]
                                                     : static_cast<const int32_t *>(a->positions)[at];
  return row >= 0 && row < a->entries ? row * a->table_0 : -1;
}

// keep and cross of the positions [first, last), one after the other.
template <bool kPairs, class Args>
FG_INLINE void spread_block(const Args *a, int64_t first, int64_t last, const float *w, float *raw, float *factors) {
  const int64_t width = 2 * a->half, n = a->full ? width : a->half;
  for (int64_t r = first; r < last; ++r, factors += 2 * width) {
    const int64_t at = table_row(a, r);
    if (at < 0) {
      for (int64_t i = 0; i < 2 * width; ++i) factors[i] = __builtin_nanf("");
      continue;
    }
    widened_row(a->cos, a->table_dtype, at, a->table_step, raw, n);
    widened_row(a->sin, a->table_dtype, at, a->table_step, raw + n, n);
    spread<kPairs>(raw, raw + n, w, a->half, a->full, factors, factors + width);
  }
}

// `weight` (null: ones) of dtype weight_dtype and eps are the norm's.
template <class T, bool kNorm, bool kPairs, class Args>
int rotate(const Args *a, const void *weight, int64_t weight_dtype, double eps) {
  const int64_t rows = a->rows_0 * a->rows_1, turning = 2 * a->half, size = sizeof(T);
  // Whichever of the loops has the shorter stride is the inner one, and whole, so that x is read as it lies.
  const bool heads_inside = a->out_repeat < a->out_1;
  int64_t step = kTable / (turning * 8 + 1), most = kRows / (a->width * size * (heads_inside ? a->repeat : 1));
  step = step < most ? step : most;
  step = step < 1 ? 1 : step > rows ? rows : step;
  int64_t heads = kRows / (step * a->width * size);
  heads = heads < 1 ? 1 : heads > a->repeat ? a->repeat : heads;
  const int64_t across = (a->repeat + heads - 1) / heads, down = (rows + step - 1) / step;
  const bool streaming = a->width * size <= kBuffer && streams(2 * rows * a->repeat * a->width * size);
  return parallel_for(down * across, 1, [&](int64_t item) {
    float *scratch = static_cast<float *>(fg_scratch(static_cast<size_t>(a->width + 2 * turning * (step + 1)) * 4));
    if (!scratch) return static_cast<int>(FG_NO_MEMORY);
    if (weight) widened_row(weight, weight_dtype, 0, 1, scratch, a->width);
    const float *w = weight ? scratch : nullptr;
    float *factors = scratch + a->width;
    const int64_t first = item / across * step, last = first + step < rows ? first + step : rows;
    const int64_t from = item % across * heads, to = from + heads < a->repeat ? from + heads : a->repeat;
    spread_block<kPairs>(a, first, last, w, factors + 2 * turning * step, factors);
    auto run = [&](int64_t r, int64_t h) {
      const int64_t i0 = r / a->rows_1, i1 = r % a->rows_1;
      const T *x = static_cast<const T *>(a->x) + i0 * a->x_0 + i1 * a->x_1 + h * a->x_repeat;
      T *out = static_cast<T *>(a->out) + i0 * a->out_0 + i1 * a->out_1 + h * a->out_repeat;
      return Run<T>{x, out, factors + (r - first) * 2 * turning, w, 1, a->x_1, a->out_1, 2 * turning, streaming};
    };
    if (heads_inside) {
      for (int64_t r = first; r < last; ++r) {
        Run<T> heads_of = run(r, from);
        heads_of.rows = to - from, heads_of.x_step = a->x_repeat, heads_of.out_step = a->out_repeat;
        heads_of.factors_step = 0;
        turn_run<T, kNorm, kPairs>(a, heads_of, eps);
      }
      return static_cast<int>(FG_OK);
    }
    for (int64_t h = from; h < to; ++h)
      for (int64_t r = first; r < last;) {  // as far as one stride goes
        Run<T> positions = run(r, h);
        const int64_t end = r - r % a->rows_1 + a->rows_1;
        positions.rows = (end < last ? end : last) - r;
        turn_run<T, kNorm, kPairs>(a, positions, eps);
        r += positions.rows;
      }
    return static_cast<int>(FG_OK);
  });
}

template <bool kNorm, class Args>
int rotate_any(const Args *a, const void *weight, int64_t weight_dtype, double eps) {
  if (!a->rows_0 || !a->rows_1 || !a->repeat || !a->width) return FG_OK;
  const bool pairs = a->interleaved;
  switch (a->dtype) {
    case FG_FLOAT32:
      return pairs ? rotate<float, kNorm, true>(a, weight, weight_dtype, eps)
                   : rotate<float, kNorm, false>(a, weight, weight_dtype, eps);
    case FG_BFLOAT16:
      return pairs ? rotate<bf16, kNorm, true>(a, weight, weight_dtype, eps)
                   : rotate<bf16, kNorm, false>(a, weight, weight_dtype, eps);
    case FG_FLOAT16:
      return pairs ? rotate<fp16, kNorm, true>(a, weight, weight_dtype, eps)
                   : rotate<fp16, kNorm, false>(a, weight, weight_dtype, eps);
    default:
      return FG_BAD_ARGUMENT;
  }
}

}  // namespace
