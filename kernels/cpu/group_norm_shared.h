// What group_norm.h and the sweeps of each memory order share.
#pragma once
#include "abi.h"
#include "moments.h"
#include "silu.h"
#include "stream.h"
#include "vectors.h"

namespace {

constexpr int64_t kChunk = 4096;         // elements of a contiguous chunk
constexpr int64_t kRows = 256;           // pixels of a channels-last chunk

// N vectors of x, `step` elements apart, normalized.
template <class T, bool kSilu, int N>
FG_INLINE void normalized(const T *x, int64_t step, vf mean, vf scale, vf shift, vf (&y)[N]) {
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) y[v] = fma(sub(load(x + v * step), mean), scale, shift);
  if (kSilu) silu<T>(y);
}
// The first n lanes of one.
template <class T, bool kSilu>
FG_INLINE void normalized_part(const T *x, int n, vf mean, vf scale, vf shift, T *out) {
  vf y = fma(sub(load_n(x, n), mean), scale, shift);
  store_n(out, kSilu ? silu<T>(y) : y, n);
}

// What all work items share.  `channel` holds, per sample, three rows of C: the mean's float32 part, scale, shift.
struct Shared {
  const fg_group_norm_args *a;
  int64_t width, chunks, chunk;  // channels a group; chunks a sample or slab, and their pixels or elements
  Moments *partial;              // [batch][chunk][group]
  float *channel;                // [batch][3][C]
  float *added;                  // [batch][C], or null where nothing is added
  int64_t ahead;                 // elements from those being normalized to those to be prefetched, or 0
  bool streaming;                // whether the output is written past the caches
  Moments *at(int64_t b, int64_t chunk_index, int64_t group) const {
    return partial + (b * chunks + chunk_index) * a->groups + group;
  }
};

// What is normalized: x, or what was joined.
template <class T>
FG_INLINE const T *input(const fg_group_norm_args *a, int64_t b) {
  if (a->other) return static_cast<const T *>(a->joined) + b * a->channels * a->pixels;
  return static_cast<const T *>(a->x) + b * a->x_batch;
}
template <class T>
FG_INLINE T *output(const fg_group_norm_args *a, int64_t b) {
  return static_cast<T *>(a->out) + b * a->channels * a->pixels;
}

// Joins columns [c0, c0 + n) of rows [r0, r0 + rows) of a sample: a row is a pixel's channels where these are innermost,
// else the whole sample.
template <class T>
void join(const fg_group_norm_args *a, int64_t b, int64_t r0, int64_t rows, int64_t c0, int64_t n, int64_t unit) {
  const int64_t left = a->split * unit, width = a->channels * unit, right = a->concat ? width - left : width;
  const T *x = static_cast<const T *>(a->x) + b * a->x_batch, *other = static_cast<const T *>(a->other) + b * a->other_batch;
  T *joined = static_cast<T *>(a->joined) + b * a->channels * a->pixels;
  for (int64_t r = r0; r < r0 + rows; ++r) {
    T *out = joined + r * width + c0;
    if (!a->concat) {
      add_row<T, T>(x + r * left + c0, other + r * right + c0, nullptr, out, n);
      continue;
    }
    const int64_t first = c0 >= left ? 0 : c0 + n <= left ? n : left - c0;  // columns that are x's
    __builtin_memcpy(out, x + r * left + c0, static_cast<size_t>(first) * sizeof(T));
    __builtin_memcpy(out + first, other + r * right + c0 + first - left, static_cast<size_t>(n - first) * sizeof(T));
  }
}

}  // namespace
