// Some rows of x by int8 weights with VNNI, 64 at a time: too few to pay for packing the weight.
//
// x is packed instead, sixteen rows a vector of four columns, and the weight's rows are read as they lie, 4 bytes for
// all lanes, 128 added since the instruction wants one operand unsigned.  Sums begin at -128 times those of x's codes,
// which takes that back; they stand with x's rows in lanes and are turned before they are written.
#pragma once
#include "linear_int8.h"

namespace {

constexpr int64_t kSome = 128;     // rows of x
constexpr int64_t kTogether = 48;  // rows of the weight whose sums are turned together: whole tiles of any kind

using Sums = int32_t[4][kTogether][16];  // (vector of x's rows, weight row, x row)

// The sums of DOWN rows of the weight by 16 ACROSS rows of x; 24 at most, or 16 where loads are the limit.  Of eight rows
// by one vector there are two sums each, PARTS, which take the steps in turn: eight would not hide how long a product
// takes, and sixteen rows of 4096 bytes lie in one set of the first-level cache, which has room for twelve.
template <int ACROSS, int DOWN, int PARTS>
inline void tile(const Job &job, const int8_t *const (&w)[DOWN], int64_t at, int64_t m, Sums &sums) {
  const int8_t *x_at = job.packed + m * job.padded;
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i acc[PARTS][DOWN][ACROSS];
#pragma GCC unroll 4
  for (int v = 0; v < ACROSS; ++v) {
    const __m512i begin = _mm512_slli_epi32(_mm512_cvtps_epi32(load(job.sum + m + v * 16)), 7);
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; ++part)
#pragma GCC unroll 16
      for (int i = 0; i < DOWN; ++i) acc[part][i][v] = part ? zero_i() : _mm512_sub_epi32(zero_i(), begin);
  }
  auto step = [&](int64_t k, int part, auto word) __attribute__((always_inline)) {
    __m512i x[ACROSS];
#pragma GCC unroll 4
    for (int v = 0; v < ACROSS; ++v) x[v] = _mm512_load_si512(x_at + (v * job.padded + k) * 16);
#pragma GCC unroll 16
    for (int i = 0; i < DOWN; ++i) {
      const __m512i codes = _mm512_xor_si512(word(w[i] + k), flip);
#pragma GCC unroll 4
      for (int v = 0; v < ACROSS; ++v) acc[part][i][v] = _mm512_dpbusd_epi32(acc[part][i][v], codes, x[v]);
    }
  };
  int64_t k = 0;
  for (; k + 4 * PARTS <= job.a->width; k += 4 * PARTS) {
    // A line of each of the rows that come next, while sixteen steps go through one; by one vector loads are the limit.
    const int64_t row = k / 4 % 16;
    if (ACROSS > 1 && row < DOWN) __builtin_prefetch(w[0] + (DOWN + row) * job.a->width + k / 64 * 64, 0, 2);
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; ++part) step(k + 4 * part, part, four);
  }
  for (; k + 4 <= job.a->width; k += 4) step(k, 0, four);
  if (k < job.a->width)  // x's codes are 0 there; the weight's row ends
    step(k, 0, [&](const int8_t *p) {
      int32_t last = 0;
      memcpy(&last, p, static_cast<size_t>(job.a->width - k));
      return _mm512_set1_epi32(last);
    });
#pragma GCC unroll 16
  for (int i = 0; i < DOWN; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < ACROSS; ++v) {
      if (PARTS == 2) acc[0][i][v] = _mm512_add_epi32(acc[0][i][v], acc[PARTS - 1][i][v]);
      _mm512_store_si512(sums[v][at + i], acc[0][i][v]);
    }
}

template <int ACROSS, int DOWN, int PARTS = 1>
inline void tiles(const Job &job, int64_t n, int64_t m, Sums &sums) {
  for (int64_t i = 0; i < kTogether && n + i < job.a->out_features; i += DOWN) {
    const int8_t *w[DOWN];
    for (int j = 0; j < DOWN; ++j)
      w[j] = weight_row(job, n + i + j < job.a->out_features ? n + i + j : job.a->out_features - 1);
    tile<ACROSS, DOWN, PARTS>(job, w, i, m, sums);
  }
}

// Rows [first, first + 64) of the output in columns [n, n + 48).
template <class T>
void block_of(const Job &job, int64_t n, int64_t first) {
  alignas(64) Sums sums;
  const int64_t last = job.rows - first < 64 ? job.rows : first + 64;
  switch ((last - first + 15) / 16) {
    case 1: tiles<1, 8, 2>(job, n, first, sums); break;
    case 2: tiles<2, 12>(job, n, first, sums); break;
    case 3: tiles<3, 8>(job, n, first, sums); break;
    default: tiles<4, 6>(job, n, first, sums);
  }
  for (int64_t m = first; m < last; m += 16)
    for (int64_t i = 0; i < kTogether && n + i < job.a->out_features; i += 16) {
      const int64_t left = job.a->out_features - n - i;
      __m512i x[16];
      for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(sums[(m - first) / 16][i + r]);
      transpose(x);
      for (int r = 0; r < 16 && m + r < last; ++r)
        write<T>(job, n + i, m + r, x[r], static_cast<int>(left < 16 ? left : 16));
    }
}

template <class T>
int some(const Job &job) {
  const int64_t blocks = (job.a->out_features + kTogether - 1) / kTogether;
  return parallel_for(blocks, 1, [&](int64_t block) {
    for (int64_t m = 0; m < job.rows; m += 64) block_of<T>(job, block * kTogether, m);
    return 0;
  });
}

}  // namespace
