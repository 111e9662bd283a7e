// Tiles of many rows of x by a weight in panels in float32; see packed_linear.h.
#pragma once
#include "panel.h"

namespace {

constexpr int64_t kChunk = 16;  // words of a panel between two requests: a line of x
constexpr int64_t kRun = 1024;  // columns added up one after the other; the sums of such runs are then

// A panel of float32: columns of 16 rows of the weight.
struct Floats {
  using T = float;
  // As many sums as two products a cycle of four cycles each need, and some more; with AVX2 all sixteen registers.
  static constexpr int ROWS = W == 1 ? 1 : W == 16 ? 12 : 6, PARTS = 16 / W, PER = 1;
  static constexpr int64_t BLOCK = 5 << 20;  // bytes of x in a block: its rows come a tile at a time, and panels are long

  // sums = rows x by the panel, in runs of kRun columns, so that long rows are rounded in two short chains.  Each kChunk
  // words, a line of x, ask for `lines` lines of memory from `next` on and for what lies `below` elements behind these of
  // x: the rows that come next, where they were not read before.
  FG_INLINE void multiply(const float *panel, const float *const (&x)[ROWS], int64_t width, int64_t below,
                          const float *next, int64_t lines, vf (&sums)[ROWS * PARTS]) {
#pragma GCC unroll 32
    for (vf &sum : sums) sum = set1(0.0f);
    for (int64_t at = 0; at < width; at += kRun) {
      vf run[ROWS * PARTS];
#pragma GCC unroll 32
      for (vf &sum : run) sum = set1(0.0f);
      for (int64_t from = at; from < width && from < at + kRun; from += kChunk) {
        for (int64_t line = 0; line < lines; ++line, next += 16) __builtin_prefetch(next, 0, 2);
        for (int r = 0; below && r < ROWS; ++r) __builtin_prefetch(x[r] + from + below);
        step(panel + from * 16, x, from, from + kChunk < width ? kChunk : width - from, run);
      }
#pragma GCC unroll 32
      for (int i = 0; i < ROWS * PARTS; ++i) sums[i] = at ? add(sums[i], run[i]) : run[i];
    }
  }

 private:
  // Adds the products of n columns, those of x from `from` on.
  FG_INLINE void step(const float *panel, const float *const (&x)[ROWS], int64_t from, int64_t n,
                      vf (&sums)[ROWS * PARTS]) {
    for (int64_t k = 0; k < n; ++k) {
      vf w[PARTS];
#pragma GCC unroll 16
      for (int v = 0; v < PARTS; ++v) w[v] = load(panel + k * 16 + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf one = set1(x[r][from + k]);
#pragma GCC unroll 16
        for (int v = 0; v < PARTS; ++v) sums[r * PARTS + v] = fma(one, w[v], sums[r * PARTS + v]);
      }
    }
  }
};

}  // namespace
