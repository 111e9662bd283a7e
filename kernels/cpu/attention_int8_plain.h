// Queries of attention_int8 one by one, without vectors of words: the twin that attention_int8_vnni.h is read against.
#pragma once
#include <cmath>

#include "attention_int8_sides.h"
#include "attention_tile.h"

namespace {

constexpr int64_t SPAN = TQ;  // queries of an item

// A block's weights of one query, and their sum.
struct Weighed {
  int32_t codes[NB], sum, top;
};

inline Weighed weigh_block(const int32_t *high, int n, float rate) {
  static const double kStep = -1.0 / FINE;
  Weighed made{};
  made.top = high[0];
  for (int i = 1; i < n; ++i) made.top = high[i] > made.top ? high[i] : made.top;
  int exponent = 0;
  std::frexp(rate * FINE, &exponent);
  exponent = exponent < 0 ? 0 : exponent > 15 ? 15 : exponent;
  const float whole = std::ldexp(rate * FINE, 15 - exponent);
  const int32_t factor = whole >= 32767.0f ? 32767 : whole > 0.0f ? static_cast<int32_t>(std::nearbyint(whole)) : 0;
  for (int i = 0; i < n; ++i) {
    int32_t far = made.top - high[i];
    far = far < 32767 >> exponent ? far : 32767 >> exponent;
    const int32_t steps = ((far << exponent) * factor + (1 << 14)) >> 15, octaves = steps / 32;
    const int32_t fraction = static_cast<int32_t>(std::nearbyint(16320.0 * std::exp2(kStep * (steps % 32))));
    made.codes[i] = (fraction * (octaves < 10 ? 512 >> octaves : 0) + (1 << 14)) >> 15;
    made.sum += made.codes[i];
  }
  return made;
}

template <class T>
void query(const Head &h, const Sides &sides, const Sizes &s, int shift, float factor, int64_t at) {
  alignas(64) int8_t q[MOST_DIM + 64];
  const Scaled found = quantize(reinterpret_cast<const T *>(h.q) + at * h.a->q_row, s.dim, s.words * 4, q);
  float o[MOST_DIM] = {}, sum = 0.0f, maximum = -infinity();
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int n = static_cast<int>(s.keys - block * NB < NB ? s.keys - block * NB : NB);
    int32_t high[NB];
    for (int i = 0; i < n; ++i) {
      int32_t score = 1 << shift >> 1;
      const uint8_t *k = sides.k + (block * NB + i) * s.words * 4;
      for (int64_t d = 0; d < s.dim; ++d) score += q[d] * (k[d] - 128);
      high[i] = score >> shift;
    }
    const float rate = min(found.scale * sides.k_scale[block] * factor, 0x1p64f);
    const Weighed w = weigh_block(high, n, rate);
    const float here = static_cast<float>(w.top) * rate, now = max(here, maximum);
    const float grow = exp2_falling<5>(sub(maximum, now)), more = exp2_falling<5>(sub(here, now));
    maximum = now;
    sum = fma(static_cast<float>(w.sum), more, sum * grow);
    for (int64_t d = 0; d < s.dim; ++d) {
      int32_t total = 0;
      for (int i = 0; i < n; ++i) total += w.codes[i] * sides.v[value_at(s, block * NB + i, d)];
      o[d] = fma(static_cast<float>(total), more, o[d] * grow);
    }
  }
  T *out = reinterpret_cast<T *>(h.out) + at * h.a->out_row;
  const float bad = found.scale * 0.0f + *sides.broken, inverse = sum > 0.0f ? 1.0f / sum : sum;
  for (int64_t d = 0; d < s.dim; ++d) store(out + d, (o[d] * sides.v_scale[d] + bad) * inverse);
}

}  // namespace
