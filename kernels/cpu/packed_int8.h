// Many rows of x, quantized row by row, by an int8 weight in panels (kernels/linear_panels.py): exact sums in int32.
//
// kernels/linear_int8.py says by which arithmetic.  With AMX on tiles, packed_int8_amx.h; elsewhere plainly.
#pragma once
#include "panel.h"
#include "quantized.h"

namespace {

#if defined(FG_LEVEL_AMX)
constexpr int kRows = 8;
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kStep = 64;         // columns that a panel has whole numbers of
constexpr int64_t kAhead = 4;         // rows between the one that is quantized and the one that is asked for
constexpr int64_t kItem = 1 << 21;    // multiply-adds that are worth a thread

using Sums = vf[kRows * kParts];  // row by row

// Rows of x as codes, `stride` bytes apart, and their scales; `first` is their number in x.
struct Coded {
  int8_t *codes;
  float *scale;
  int64_t stride, first;
};

// The bytes of so many rows' codes, which are made whole tiles of, and scales; where both are in `memory`.
inline int64_t bytes_of(int64_t rows, int64_t stride) { return (rows + 31) / 32 * 32 * (stride + 4); }
inline Coded coded_at(void *memory, int64_t rows, int64_t stride, int64_t first) {
  int8_t *codes = static_cast<int8_t *>(memory);
  return {codes, reinterpret_cast<float *>(codes + (rows + 31) / 32 * 32 * stride), stride, first};
}

// Bytes from a row of codes to the next: not a power of two, lest rows fall in few sets of a cache.
inline int64_t stride_of(int64_t width) { return (width + kStep - 1) / kStep * kStep + 64; }

// Quantizes rows [from, to) of x, the ones that come asked for ahead.
template <class T, class A>
inline void quantize_rows(const A *a, int64_t from, int64_t to, const Coded &coded) {
  for (int64_t r = from; r < to; ++r) {
    const T *x = static_cast<const T *>(a->x) + r / a->inner * a->x_outer + r % a->inner * a->x_inner;
    if (r + kAhead < to)
      for (int64_t k = 0; k < a->width; k += 64 / sizeof(T)) __builtin_prefetch(x + kAhead * a->x_inner + k);
    const int64_t at = r - coded.first;
    coded.scale[at] = quantize(x, a->width, coded.stride - 64, coded.codes + at * coded.stride).scale;
  }
}

// n columns' floats from `at` on.
template <int PARTS>
FG_INLINE void get_scale(const void *scale, int64_t at, int64_t n, vf (&to)[PARTS]) {
  for (int v = 0; v < PARTS; ++v) to[v] = load_n(static_cast<const float *>(scale) + at + v * W, columns(n, v));
}

// One row's columns of the output: 64 bytes at once where they are whole.
template <class T>
FG_INLINE void put_row(T *out, const vf *y, int parts, int64_t n) {
  for (int v = 0; v < parts; ++v) store_n(out + v * W, y[v], columns(n, v));
}
#if defined(FG_HAS_AVX512_BF16)
FG_INLINE void put_row(bf16 *out, const vf *y, int parts, int64_t n) {
  if (parts == 2 && n >= 2 * W)
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
  else
    for (int v = 0; v < parts; ++v) store_n(out + v * W, y[v], columns(n, v));
}
#endif

#if defined(FG_LEVEL_AMX)
}  // namespace
#include "packed_int8_amx.h"
namespace {
#else
constexpr int64_t kTall = 32;  // rows of x at a time

// sums = a row of codes by a panel.
inline void multiply(const int8_t *codes, const int8_t *panel, int64_t width, int32_t (&sums)[kPanel]) {
  memset(sums, 0, sizeof sums);
  for (int64_t k = 0; k < width; k += 4, panel += 4 * kPanel)
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t j = 0; j < 4; ++j) sums[n] += codes[k + j] * panel[n * 4 + j];
}

// Tail says how many COLUMNS of the output a panel makes, of which Element, and puts the sums there.
template <class Tail, class A>
int product(const A *a) {
  const int64_t rows = a->outer * a->inner, stride = stride_of(a->width), padded = stride - 64;
  const int64_t grain = 1 + kItem / (kTall * a->out_features * a->width + 1);
  return parallel_for((rows + kTall - 1) / kTall, grain, [&](int64_t item) {
    const int64_t first = item * kTall, last = first + kTall < rows ? first + kTall : rows;
    void *memory = fg_scratch(static_cast<size_t>(bytes_of(kTall, stride)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    const Coded coded = coded_at(memory, kTall, stride, first);
    quantize_rows<typename Tail::Element>(a, first, last, coded);
    const int8_t *panel = static_cast<const int8_t *>(a->panels);
    for (int64_t column = 0; column < a->out_features; column += Tail::COLUMNS, panel += padded * kPanel)
      for (int64_t r = first; r < last; ++r) {
        int32_t whole[kPanel];
        multiply(coded.codes + (r - first) * stride, panel, padded, whole);
        Sums sums;
        for (int v = 0; v < kParts; ++v) sums[v] = to_float(load_i(whole + v * W));
        Tail::put(a, sums, coded.scale + r - first, 1, r * a->out_features + column, column, a->out_features - column);
      }
    return static_cast<int>(FG_OK);
  });
}
#endif

}  // namespace
