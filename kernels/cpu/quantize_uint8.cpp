// levels: scalar avx2 avx512 neon
// Images to uint8, each sample by its own scale and zero point; kernels/quantize_uint8.py says by which arithmetic.
//
// A sample's elements are one run of memory, taken in pieces: a first pass finds the extremes, which no order changes,
// a second one makes the codes.
#include "abi.h"
#include "dot.h"
#include "threads.h"

namespace {

constexpr int64_t kPiece = 1 << 15;  // elements that one work item takes
constexpr int64_t kBlock = 1 << 10;  // codes made at a time, before their first bits are turned

struct Range {
  float low, high, broken;  // broken: NaN where one of them is not finite, else 0
};

template <class T>
Range range_of(const T *x, int64_t n) {
  constexpr int WAYS = 4;
  vf high[WAYS], low[WAYS], bad[WAYS];  // low is kept negated
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
  return {-hmax(max(max(low[0], low[1]), max(low[2], low[3]))), hmax(max(max(high[0], high[1]), max(high[2], high[3]))),
          hsum(add(add(bad[0], bad[1]), add(bad[2], bad[3])))};
}

template <class T>
void codes_of(const T *x, int64_t n, float rate, float zero, uint8_t *codes) {
  const vf by = set1(rate), least = set1(-128.0f), most = set1(127.0f), shift = set1(zero - 128.0f);
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

template <class T>
int quantize(const fg_quantize_uint8_args *a) {
  const T *x = static_cast<const T *>(a->x);
  uint8_t *codes = static_cast<uint8_t *>(a->codes);
  float *scale = static_cast<float *>(a->scale);
  int64_t *zero = static_cast<int64_t *>(a->zero);
  const int64_t pieces = (a->elements + kPiece - 1) / kPiece;
  Range *found = static_cast<Range *>(fg_scratch(static_cast<size_t>(a->batch * pieces) * sizeof(Range)));
  if (!found) return FG_NO_MEMORY;
  auto part = [&](int64_t item) {
    const int64_t from = item % pieces * kPiece;
    return a->elements - from < kPiece ? a->elements - from : kPiece;
  };
  auto start = [&](int64_t item) { return item / pieces * a->elements + item % pieces * kPiece; };
  parallel_for(a->batch * pieces, 1, [&](int64_t item) {
    found[item] = range_of(x + start(item), part(item));
    return 0;
  });
  for (int64_t b = 0; b < a->batch; ++b) {
    Range all = found[b * pieces];
    for (int64_t i = 1; i < pieces; ++i) {
      const Range &other = found[b * pieces + i];
      all.low = other.low < all.low ? other.low : all.low;
      all.high = other.high > all.high ? other.high : all.high;
      all.broken += other.broken;
    }
    const float span = all.high - all.low;
    const bool finite = all.broken == 0.0f && span - span == 0.0f, served = finite && span >= 0x1p-100f;
    const float rate = served ? 255.0f / span : 0.0f;
    scale[b] = served ? span * (1.0f / 255.0f) : finite ? 0.0f : __builtin_nanf("");
    zero[b] = served ? static_cast<int64_t>(__builtin_rintf(-all.low * rate)) : 0;
    found[b * pieces].high = rate;
  }
  return parallel_for(a->batch * pieces, 1, [&](int64_t item) {
    const int64_t b = item / pieces, at = start(item);
    const float rate = found[b * pieces].high;
    if (rate == 0.0f)
      memset(codes + at, 0, static_cast<size_t>(part(item)));
    else
      codes_of(x + at, part(item), rate, static_cast<float>(zero[b]), codes + at);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(quantize_uint8)(const fg_quantize_uint8_args *a) {
  if (!a->batch) return FG_OK;
  if (!a->elements) {
    memset(a->scale, 0, static_cast<size_t>(a->batch) * sizeof(float));
    memset(a->zero, 0, static_cast<size_t>(a->batch) * sizeof(int64_t));
    return FG_OK;
  }
  switch (a->dtype) {
    case FG_FLOAT32: return quantize<float>(a);
    case FG_BFLOAT16: return quantize<bf16>(a);
    case FG_FLOAT16: return quantize<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
