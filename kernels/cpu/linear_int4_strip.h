// 4-bit weights by many rows of x in float32, where there is no AVX512_BF16 (linear_int4_block.h): a few panels are
// unpacked block by block, each for all rows of a strip, whose columns stay in the second-level cache meanwhile.
#pragma once
#include "linear_int4.h"

namespace {

constexpr int TALL = W == 1 ? 1 : W == 16 ? 12 : 6;  // rows of x at a time: as many sums as registers hold
constexpr int64_t kDeep = 128;                       // columns of a block, whole groups
constexpr int64_t kStrip = 192;                      // rows of a strip, whole tiles
constexpr int64_t kSame = 4;                         // panels that take a strip in turn

struct Strip {
  int64_t first, last;  // rows of x
  alignas(64) float w[kDeep][16];
  alignas(64) float acc[kSame][kStrip][16];
};

template <int J = 0>
FG_INLINE void unpack_words(vi words, vf zero, float (*to)[16]) {
  if constexpr (J < 8) {
    store(to[J], column<J>(words, zero));
    unpack_words<J + 1>(words, zero, to);
  }
}

// Columns [k, k + depth) of a panel, less their zero points.
inline void unpack_columns(const Job &job, int64_t panel, int64_t k, int64_t depth, float (*to)[16]) {
  const int64_t at = panel * job.a->groups * 16, group = job.a->group;
  const uint8_t *w = weights_at(job, panel, k);
  for (int64_t i = 0; i < depth; i += 8, w += 64) {
    ahead(w);
    for (int v = 0; v < PARTS; ++v)
      unpack_words(load_i(reinterpret_cast<const int32_t *>(w) + v * W), zeros_of(job, at + (k + i) / group * 16 + v * W),
                   reinterpret_cast<float(*)[16]>(to[i] + v * W));
  }
}

// Adds the products of a group's columns, from column i on, of TALL rows of x to their sums.  Not inlined: GCC 12 would
// keep what is summed in registers from one group to the next, and a group's own sums not.
template <class S>
__attribute__((noinline)) void multiply(const float (*w)[16], const float *const (&x)[TALL], int64_t i, int64_t group,
                                        const S *scale, float (*acc)[16]) {
  vf sum[TALL][PARTS];
#pragma GCC unroll 16
  for (int r = 0; r < TALL; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < PARTS; ++v) sum[r][v] = set1(0.0f);
  for (const int64_t end = i + group; i < end; ++i) {
    vf part[PARTS];
#pragma GCC unroll 16
    for (int v = 0; v < PARTS; ++v) part[v] = load(w[i] + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < TALL; ++r) {
      const vf one = set1(x[r][i]);
#pragma GCC unroll 16
      for (int v = 0; v < PARTS; ++v) sum[r][v] = fma(part[v], one, sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < TALL; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < PARTS; ++v) store(acc[r] + v * W, fma(sum[r][v], load(scale + v * W), load(acc[r] + v * W)));
}

// The strip's rows of the output in the columns of `count` panels.
template <class T, class S>
void strip_of(const Job &job, const float *x, Strip *strip, int64_t panel, int64_t count) {
  const fg_linear_int4_args *a = job.a;
  const int64_t tall = (strip->last - strip->first + TALL - 1) / TALL * TALL;
  for (int64_t p = 0; p < count; ++p) memset(strip->acc[p], 0, static_cast<size_t>(tall) * sizeof(strip->acc[p][0]));
  for (int64_t k = 0; k < job.padded; k += kDeep) {
    const int64_t depth = job.padded - k < kDeep ? job.padded - k : kDeep;
    for (int64_t p = 0; p < count; ++p) {
      unpack_columns(job, panel + p, k, depth, strip->w);
      const S *scales = static_cast<const S *>(a->scales) + ((panel + p) * a->groups + k / a->group) * 16;
      for (int64_t m = strip->first; m < strip->last; m += TALL) {
        const float *rows[TALL];
        for (int r = 0; r < TALL; ++r) rows[r] = x + (m + r < strip->last ? m + r : m) * (job.stride / 4) + k;
        for (int64_t i = 0, g = 0; i < depth; i += a->group, ++g)
          multiply(strip->w, rows, i, a->group, scales + g * 16, strip->acc[p] + (m - strip->first));
      }
    }
  }
  for (int64_t m = strip->first; m < strip->last; ++m)
    for (int64_t p = 0; p < count; ++p) write<T>(job, panel + p, m, strip->acc[p][m - strip->first]);
}

// x in float32: rows of job.stride bytes, zero past their ends.
template <class T, class S>
int in_strips(const Job &job, const float *x) {
  const int64_t panels = (job.a->out_features + 15) / 16, wide = (panels + kSame - 1) / kSame;
  const int64_t strips = (job.rows + kStrip - 1) / kStrip;
  return parallel_for(wide * strips, 1, [&](int64_t item) {
    Strip strip;
    strip.first = item / wide * kStrip;
    strip.last = strip.first + kStrip < job.rows ? strip.first + kStrip : job.rows;
    const int64_t panel = item % wide * kSame;
    strip_of<T, S>(job, x, &strip, panel, panel + kSame < panels ? kSame : panels - panel);
    return 0;
  });
}

}  // namespace
