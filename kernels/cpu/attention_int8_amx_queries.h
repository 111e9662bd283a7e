// Sixteen queries of attention_int8 on AMX tiles: their codes, their sums, and their rows of the output.
#pragma once
#include "attention_int8_amx_sides.h"
#include "attention_tile.h"

namespace {

constexpr int SIDE = 16;  // rows of a tile, and words of one of them

struct alignas(64) Queries {
  int32_t q[MOST_DIM / 4][SIDE];  // words of four codes
  float by[SIDE];                 // what a code stands for
  float maximum[SIDE];            // octaves that the sums are relative to
  float o[MOST_DIM + SIDE][SIDE];  // sums of channels and, behind them, of weights
};

// The first `rows` of sixteen rows of q, which have met no key yet; the others are zeros.
template <class T>
inline void start(const T *q, int64_t row, int64_t rows, const Sizes &s, Queries *to) {
  __m512i x[SIDE];
#pragma GCC unroll 16
  for (int r = 0; r < SIDE; ++r) {
    x[r] = _mm512_setzero_si512();
    for (int64_t part = 0; r < rows && part * W < s.dim; ++part) x[r] = larger(x[r], row_part(q + r * row, s, part));
  }
  transpose(x);
#pragma GCC unroll 16
  for (int i = 1; i < SIDE; ++i) x[0] = _mm512_max_epi32(x[0], x[i]);
  const Rates found = rates_of(x[0]);
  alignas(64) float rate[SIDE];
  store(rate, found.rate), store(to->by, found.scale);
  for (int64_t d = 0; d < s.words; d += 16) {
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; ++r) {
      auto part = [&](int64_t i) __attribute__((always_inline)) { return row_part(q + r * row, s, d / 4 + i); };
      const bool there = r < rows && rate[r] > 0.0f;  // what is not finite would be no code
      x[r] = there ? codes_of(part(0), part(1), part(2), part(3), set1(rate[r])) : _mm512_setzero_si512();
    }
    transpose(x);
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; ++r) _mm512_store_si512(to->q[d + r], x[r]);
  }
  if (has_room(s))
    for (int r = 0; r < SIDE; ++r) reinterpret_cast<int8_t *>(&to->q[s.dim / 4][r])[s.dim % 4] = 1;
  memset(to->o, 0, static_cast<size_t>(s.wide) * sizeof to->o[0]);
  store(to->maximum, set1(-infinity()));
}

// Their first `rows` rows of the output.
template <class T>
inline void finish(const Queries &of, const Sides &sides, const Sizes &s, int64_t rows, T *out, int64_t row) {
  const vf bad = fma(load(of.by), set1(0.0f), set1(*sides.broken)), sum = load(of.o[s.dim]);
  const vf inverse = select_gt(sum, set1(0.0f), div(set1(1.0f), sum), sum);
  for (int64_t d = 0; d < s.dim; d += W) {
    __m512i x[SIDE];
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; ++r) {  // before the division by the sum: NaN stays
      const vf made = mul(load(of.o[d + r]), set1(sides.v_scale[d + r]));
      x[r] = _mm512_castps_si512(mul(add(made, bad), inverse));
    }
    transpose(x);
    const int64_t n = s.dim - d;
    for (int64_t r = 0; r < rows; ++r)
      n >= W ? store(out + r * row + d, _mm512_castsi512_ps(x[r]))
             : store_n(out + r * row + d, _mm512_castsi512_ps(x[r]), static_cast<int>(n));
  }
}

}  // namespace
