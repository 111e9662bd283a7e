// Images to uint8, each sample by its own scale and zero point; kernels/quantize_uint8.py says by which arithmetic.
#pragma once
#include "abi.h"
#include "dot.h"
#include "threads.h"

namespace {

constexpr int64_t kPiece = 1 << 15;  // elements that one work item takes

struct Range {
  float low, high;  // of the elements and zero
  bool broken;      // whether one of them is not finite

  void join(const Range &other) {
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
    broken |= other.broken;
  }
};

// How a sample's codes are made: round(x rate) + zero, of which each stands for `scale`.
struct Coding {
  float rate, scale;
  int64_t zero;

  Coding() = default;
  explicit Coding(const Range &range) {
    const float span = range.high - range.low;
    const bool finite = !range.broken && span - span == 0.0f, served = finite && span >= 0x1p-100f;
    rate = served ? 255.0f / span : 0.0f;
    scale = served ? span * (1.0f / 255.0f) : finite ? 0.0f : __builtin_nanf("");
    zero = served ? static_cast<int64_t>(__builtin_rintf(-range.low * rate)) : 0;
  }
};

#if defined(FG_HAS_AVX512)

// As integers magnitudes are ordered like what they stand for, NaN behind infinity: of numbers with a sign the largest
// signed one is the highest, the largest unsigned one the lowest.
FG_INLINE Range range_of(const float *x, int64_t n) {
  __m512i high = _mm512_setzero_si512(), low = high;
  for (int64_t i = 0; i < n; i += W) {
    const __m512i v = _mm512_castps_si512(n - i < W ? load_n(x + i, static_cast<int>(n - i)) : load(x + i));
    high = _mm512_max_epi32(high, v), low = _mm512_max_epu32(low, v);
  }
  const float top = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(high))));
  const unsigned bits = _mm512_reduce_max_epu32(low);
  const float least = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits))));
  return {bits >> 31 ? least : 0.0f, top, top - top != 0.0f || least - least != 0.0f};
}

FG_INLINE float wide(const bf16 *, uint16_t bits) {
  const bf16 one[1] = {{bits}};
  return _mm512_cvtss_f32(load_n(one, 1));
}
FG_INLINE float wide(const fp16 *, uint16_t bits) {
  const fp16 one[1] = {{bits}};
  return _mm512_cvtss_f32(load_n(one, 1));
}

template <class T>
FG_INLINE Range range_of(const T *x, int64_t n) {
  __m512i high = _mm512_setzero_si512(), low = high;
  for (int64_t i = 0; i < n; i += 2 * W) {
    const __m512i v = _mm512_maskz_loadu_epi16(halves_below(n - i), x + i);
    high = _mm512_max_epi16(high, v), low = _mm512_max_epu16(low, v);
  }
  uint16_t tops[2 * W], lows[2 * W], top = 0, least = 0;
  _mm512_storeu_si512(tops, high), _mm512_storeu_si512(lows, low);
  for (uint16_t bits : tops) top = bits > top ? bits : top;
  for (uint16_t bits : lows) least = bits > least ? bits : least;
  const float up = wide(x, top), down = wide(x, least);
  return {least >> 15 ? down : 0.0f, up, up - up != 0.0f || down - down != 0.0f};
}

// The codes of 64 numbers, in their order: integers saturate where codes end.
FG_INLINE __m512i codes_of(vf a, vf b, vf c, vf d, vf rate, __m512i zero) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto whole = [&](vf v) { return _mm512_add_epi32(_mm512_cvtps_epi32(mul(v, rate)), zero); };
  const __m512i low = _mm512_packs_epi32(whole(a), whole(b)), high = _mm512_packs_epi32(whole(c), whole(d));
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

// Those of the first n of x, of 64 at the most.
template <class T>
FG_INLINE __m512i codes_of(const T *x, int64_t n, vf rate, __m512i zero) {
  if (n >= 4 * W) return codes_of(load(x), load(x + W), load(x + 2 * W), load(x + 3 * W), rate, zero);
  const auto part = [&](int64_t i) { return load_n(x + i, static_cast<int>(n <= i ? 0 : n - i < W ? n - i : W)); };
  return codes_of(part(0), part(W), part(2 * W), part(3 * W), rate, zero);
}

template <class T>
FG_INLINE void put_codes(const T *x, int64_t n, const Coding &by, uint8_t *codes) {
  const vf rate = set1(by.rate);
  const __m512i zero = _mm512_set1_epi32(static_cast<int>(by.zero));
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) _mm512_storeu_si512(codes + i, codes_of(x + i, 4 * W, rate, zero));
  if (i < n) _mm512_mask_storeu_epi8(codes + i, (1ull << (n - i)) - 1, codes_of(x + i, n - i, rate, zero));
}

#else

template <class T>
FG_INLINE Range range_of(const T *x, int64_t n) {
  constexpr int WAYS = 4;
  vf high[WAYS], low[WAYS], bad[WAYS];  // low is kept negated; bad: NaN where one was not finite
  for (int j = 0; j < WAYS; ++j) high[j] = low[j] = bad[j] = set1(0.0f);
  auto look = [&](int j, vf v) {
    high[j] = max(v, high[j]);
    low[j] = max(sub(set1(0.0f), v), low[j]);
    bad[j] = fma(v, set1(0.0f), bad[j]);
  };
  int64_t i = 0;
  for (; i + WAYS * W <= n; i += WAYS * W)
    for (int j = 0; j < WAYS; ++j) look(j, load(x + i + j * W));
  for (; i < n; i += W) look(0, load_n(x + i, static_cast<int>(n - i < W ? n - i : W)));
  const float broken = hsum(add(add(bad[0], bad[1]), add(bad[2], bad[3])));
  return {-hmax(max(max(low[0], low[1]), max(low[2], low[3]))), hmax(max(max(high[0], high[1]), max(high[2], high[3]))),
          broken != 0.0f};
}

constexpr int64_t kBlock = 1 << 10;  // codes made at a time, before their first bits are turned

template <class T>
FG_INLINE void put_codes(const T *x, int64_t n, const Coding &coding, uint8_t *codes) {
  const vf by = set1(coding.rate), least = set1(-128.0f), most = set1(127.0f);
  const vf shift = set1(static_cast<float>(coding.zero) - 128.0f);
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = from + kBlock < n ? from + kBlock : n;
    for (int64_t i = from; i < to; i += W) {
      const int left = static_cast<int>(to - i < W ? to - i : W);
      const vf v = add(round(mul(left == W ? load(x + i) : load_n(x + i, left), by)), shift);
      to_codes(reinterpret_cast<int8_t *>(codes) + i, min(max(v, least), most), left);
    }
    for (int64_t i = from; i < to; ++i) codes[i] ^= 128;
  }
}

#endif

// Where samples of `elements` each are cut into pieces.
struct Pieces {
  int64_t elements, each;

  explicit Pieces(int64_t elements) : elements(elements), each((elements + kPiece - 1) / kPiece) {}
  int64_t from(int64_t item) const { return item % each * kPiece; }
  int64_t size(int64_t item) const { return elements - from(item) < kPiece ? elements - from(item) : kPiece; }
  int64_t start(int64_t item) const { return item / each * elements + from(item); }
};

// How each sample of x is coded, to `to`; `found`: room for the range of every piece.
template <class T>
void find_codings(const T *x, int64_t batch, const Pieces &pieces, Range *found, Coding *to) {
  parallel_for(batch * pieces.each, 1, [&](int64_t item) {
    found[item] = range_of(x + pieces.start(item), pieces.size(item));
    return 0;
  });
  for (int64_t b = 0; b < batch; ++b) {
    Range all = found[b * pieces.each];
    for (int64_t i = 1; i < pieces.each; ++i) all.join(found[b * pieces.each + i]);
    to[b] = Coding(all);
  }
}

}  // namespace
