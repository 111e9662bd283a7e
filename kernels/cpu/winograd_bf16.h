// A 3x3 convolution in bfloat16 by Winograd's F(2 x 2, 3 x 3): 16 products of channels for four pixels, not 36.
//
// Tiles are transformed in float32 and rounded once; then each block of them is multiplied by 32 outputs' filters of all
// 16 points with vdpbf16ps, and what comes out is transformed back.  Words are pairs of input channels.  A tile's sums run
// over the channels in order in float32, whatever block it is in: neither threads nor batch change a bit.
//
// Filters come as the nine TAPS they are made of, in 9/16 of their memory: for all blocks of a chunk those of some inputs are
// made in a core's own cache; where there are many tiles, all are made once.
//
// What becomes of a tile's pixels is the caller's, as is a factor for each channel of a sample.
#pragma once
#include "winograd_small.h"

namespace {

constexpr int TAPS = 9;
constexpr int64_t kPairs = 64;       // pairs of inputs whose filters are made at a time: 128 KiB
constexpr int64_t kManyTiles = 512;  // tiles beyond which all filters are made once

// Lines of memory that are wanted later, `each` of them at a time: asked for all at once, they would keep products waiting.
struct Ahead {
  const uint32_t *at, *end;
  int64_t each;
};

FG_INLINE void fetch_some(Ahead &ahead) {
  for (int64_t i = 0; i < ahead.each && ahead.at < ahead.end; ++i, ahead.at += LINE) __builtin_prefetch(ahead.at, 0, 2);
}

// m[MR][NV vectors] = v . u, or `more` to what is there; a tile's row of m `row` floats on; v: lines of ROWS tiles, u:
// pairs of GROUP outputs.  With PARTS of the inputs, what v will be `next` is fetched: short streams are not foreseen.
template <int MR, int NV, bool PARTS>
FG_INLINE void pair_product(const uint32_t *v, int64_t pairs, const uint32_t *u, float *m, int64_t row, bool more,
                            const uint32_t *next, Ahead &ahead) {
  __m512 sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sum[i][j] = PARTS && more ? load(m + i * row + 16 * j) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k += LINE, v += (ROWS - 1) * LINE) {
    const uint32_t *end = v + (pairs - k < LINE ? pairs - k : LINE);
    if (PARTS) {
      fetch_some(ahead);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(next + k * ROWS + i * LINE);
    }
    for (; v < end; ++v, u += GROUP) {
      __m512bh f[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) f[j] = (__m512bh)_mm512_loadu_si512(u + 16 * j);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(v[i * LINE]));
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, f[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(m + i * row + 16 * j, sum[i][j]);
}

FG_INLINE vf wide_halves(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Adds the 32 elements at p, those that the mask has.
FG_INLINE void plus(const bf16 *p, __mmask32 mask, vf &low, vf &high) {
  const __m512i more = _mm512_maskz_loadu_epi16(mask, p);
  low = add(low, wide_halves(_mm512_castsi512_si256(more)));
  high = add(high, wide_halves(_mm512_extracti64x4_epi64(more, 1)));
}

// Two float vectors as one of pairs: lane i holds (low[i], high[i]), rounded to nearest even.
FG_INLINE __m512i pair_up(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// A row of points: those of row P of the pixels less those of row Q, or plus where these are 1 and 2, by `even` and `odd`,
// a factor for each channel.
template <int P, int Q, bool SCALED, bool DOUBLED, class F>
FG_INLINE void spread_row(const F &load_at, vf even, vf odd, uint32_t *to, int64_t part) {
  vf low[4], high[4], d[4], e[4];
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i p = load_at(4 * P + j), q = load_at(4 * Q + j);
    const vf a = _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)), b = _mm512_castsi512_ps(_mm512_slli_epi32(q, 16));
    const vf c = _mm512_castsi512_ps(_mm512_and_si512(p, upper)), g = _mm512_castsi512_ps(_mm512_and_si512(q, upper));
    low[j] = P == 1 && Q == 2 ? add(a, b) : sub(a, b);
    high[j] = P == 1 && Q == 2 ? add(c, g) : sub(c, g);
  }
  spread_small(low, d, 1);
  spread_small(high, e, 1);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (vanishes<DOUBLED>(j)) continue;
    const __m512i made = SCALED ? pair_up(mul(d[j], even), mul(e[j], odd)) : pair_up(d[j], e[j]);
    _mm512_storeu_si512(to + j * part, made);
  }
}

// G w for three vectors `s` apart in w; four come out, `t` apart.
FG_INLINE void widen(const vf *w, int s, vf *o, int t) {
  const vf outer = mul(set1(0.5f), add(w[0], w[2 * s]));
  o[0] = w[0];
  o[t] = fma(set1(0.5f), w[s], outer);
  o[2 * t] = fma(set1(-0.5f), w[s], outer);
  o[3 * t] = w[2 * s];
}

// Row i of a filter's points from a row of G w, for 32 lanes, a point `apart` words after the one before.
template <bool DOUBLED>
FG_INLINE void put_points(int i, const vf (&low)[3], const vf (&high)[3], uint32_t *to, int64_t apart) {
  if (vanishes<DOUBLED>(4 * i)) return;
  vf a[4], b[4];
  widen(low, 1, a, 1), widen(high, 1, b, 1);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    if (!vanishes<DOUBLED>(j)) _mm512_storeu_si512(to + (4 * i + j) * apart, (__m512i)_mm512_cvtne2ps_pbh(b[j], a[j]));
}

// The same of 32 lanes of weights `w`, TAPS rows of 2 GROUP, those first that need the fewest registers.
template <bool DOUBLED>
FG_INLINE void put_filters(const bf16 *w, uint32_t *to, int64_t apart) {
  const auto row = [&](int i, int high, vf (&three)[3]) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) three[j] = load(w + (3 * i + j) * 2 * GROUP + high * W);
  };
  vf first[2][3], last[2][3], middle[2][3];
  row(0, 0, first[0]), row(0, 1, first[1]);
  put_points<DOUBLED>(0, first[0], first[1], to, apart);
  row(2, 0, last[0]), row(2, 1, last[1]);
  put_points<DOUBLED>(3, last[0], last[1], to, apart);
  row(1, 0, middle[0]), row(1, 1, middle[1]);
#pragma GCC unroll 2
  for (int l = 0; l < 2; ++l)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const vf outer = mul(set1(0.5f), add(first[l][j], last[l][j]));
      first[l][j] = fma(set1(0.5f), middle[l][j], outer), last[l][j] = fma(set1(-0.5f), middle[l][j], outer);
    }
  put_points<DOUBLED>(1, first[0], first[1], to, apart);
  put_points<DOUBLED>(2, last[0], last[1], to, apart);
}

// The filters of all points of `pairs` pairs of inputs.
template <bool DOUBLED>
void make_filters(const uint32_t *weights, int64_t pairs, uint32_t *to, int64_t apart) {
  const bf16 *w = reinterpret_cast<const bf16 *>(weights);
  for (int64_t k = 0; k < pairs; ++k, w += TAPS * 2 * GROUP, to += GROUP)
    put_filters<DOUBLED>(w, to, apart), put_filters<DOUBLED>(w + GROUP, to + W, apart);
}

// Looks at no output; see PairWinograd::run.
struct Unseen {
  void add(__m512i) {}
  void leave(int64_t, int64_t) {}
};

struct PairWinograd : SmallTiles {
  const bf16 *image;
  const uint32_t *taps;  // [group][pair][TAPS][GROUP outputs]
  const float *scales;  // null, or LINE even channels, LINE odd ones, ...: `lines` times for each sample
  bf16 *zeros;          // a pixel outside of the image
  const uint32_t *all = nullptr;  // where there are many tiles, all filters: [group][point][pair][GROUP], points ...
  int64_t apart;                  // ... so many words apart, as they are where some are made at a time
  const bf16 *beside = nullptr;  // null, or what `take` reads beside the sums, laid out as the outputs are

  PairWinograd(const void *x, const void *taps, const float *scales, int64_t batch, int64_t inputs, int64_t outputs,
               int64_t height, int64_t width)
      : SmallTiles(batch, inputs, outputs, height, width, 2), image(static_cast<const bf16 *>(x)),
        taps(static_cast<const uint32_t *>(taps)), scales(scales),
        apart((tiles > kManyTiles ? words : kPairs) * GROUP + LINE) {  // in other sets of a cache
    if (tiles > kManyTiles) return;
    if (groups >= 2 * fg_threads()) span = (chunk + kBlock - 1) / kBlock;
    room = span * kBlock * kSums + SPOTS * apart;
  }

  // The 16 points of tile `tile` of the images, the `t`-th of its chunk.
  template <bool SCALED, bool DOUBLED>
  void fill(int64_t tile, int64_t t) const {
    const Place at = place(tile);
    const bf16 *pixel[SPOTS];
    pixels_of<DOUBLED>(image, at, pixel);
    for (int i = 0; i < SPOTS; ++i) pixel[i] = pixel[i] ? pixel[i] : zeros;
    const bf16 *next[4];  // the tile to the right has two columns of pixels more
    for (int i = 0; i < 4; ++i) next[i] = pixel[4 * i + 3] + inputs;
    uint32_t *to = point_of(t);
    const float *scale = SCALED ? scales + at.sample * lines * 2 * LINE : nullptr;
    const int64_t apart = part, channels = inputs;
    for (int64_t c = 0; c < channels; c += 2 * LINE, to += ROWS * LINE) {
      const __mmask32 mask = halves_below(channels - c);
      const auto load_at = [&](int i) { return _mm512_maskz_loadu_epi16(mask, pixel[i] + c); };
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(next[i] + c);
        __builtin_prefetch(next[i] + channels + c);
      }
      const vf even = SCALED ? load(scale + c) : set1(0.0f), odd = SCALED ? load(scale + c + LINE) : even;
      spread_row<0, 2, SCALED, DOUBLED>(load_at, even, odd, to, apart);
      spread_row<1, 2, SCALED, DOUBLED>(load_at, even, odd, to + 4 * apart, apart);
      if (!DOUBLED) spread_row<2, 1, SCALED, DOUBLED>(load_at, even, odd, to + 8 * apart, apart);
      spread_row<1, 3, SCALED, DOUBLED>(load_at, even, odd, to + 12 * apart, apart);
    }
  }

  template <int NV, bool PARTS>
  void multiply(int64_t count, const uint32_t *v, int64_t pairs, const uint32_t *u, float *m, bool more,
                const uint32_t *next, Ahead &ahead) const {
    const int64_t across = ROWS * lines * LINE;
    for (int64_t t = 0; t < count; t += ROWS, v += across, m += ROWS * kSums, next += across) {
      const int64_t left = count - t;
      if (left > 8)
        pair_product<12, NV, PARTS>(v, pairs, u, m, kSums, more, next, ahead);
      else if (left > 4)
        pair_product<8, NV, PARTS>(v, pairs, u, m, kSums, more, next, ahead);
      else
        pair_product<4, NV, PARTS>(v, pairs, u, m, kSums, more, next, ahead);
    }
  }

  // The sums m of one block, whose `count` tiles are the `t`-th and on of the chunk that begins at tile `first`, by filters
  // u of pairs [k, k + pairs) for the outputs from o on.  Meanwhile what lies beside the outputs is fetched with the last
  // pairs, and what is wanted after these.
  template <bool DOUBLED, bool PARTS>
  void sum_up(int64_t first, int64_t t, int64_t count, int64_t o, int64_t k, int64_t pairs, const uint32_t *u, float *m,
              Ahead &ahead) const {
    const uint32_t *v = spread + t * lines * LINE + k * ROWS;
    for (int i = 0; i < SPOTS; ++i, u += apart, v += part) {
      if (beside && k + pairs == words)
        fetch(beside, first + t + count * i / SPOTS, first + t + count * (i + 1) / SPOTS, o);
      if (vanishes<DOUBLED>(i)) continue;
      const uint32_t *after = i + 1 < SPOTS ? v + part : v;
      if (outputs - o > W)
        multiply<2, PARTS>(count, v, pairs, u, m + i * GROUP, k > 0, after, ahead);
      else
        multiply<1, PARTS>(count, v, pairs, u, m + i * GROUP, k > 0, after, ahead);
    }
  }

  // The outputs of one block from its sums.
  template <bool DOUBLED, class Take, class Seen>
  void finish(int64_t tile, int64_t count, int64_t o, const float *m, const Take &take, Seen seen) const {
    for (int64_t i = 0; i < count; ++i) {
      const Place at = place(tile + i);
      vf z[2][4];
      gather_tile<DOUBLED>(m + i * kSums, z[0]);
      gather_tile<DOUBLED>(m + i * kSums + W, z[1]);
      for (int j = 0; j < 4; ++j) {
        const int64_t y = at.y + j / 2, x = at.x + j % 2;
        if (y < height && x < width) seen.add(take(at.sample, y * width + x, o, z[0][j], z[1][j]));
      }
    }
    seen.leave(tile, o);
  }

  // The weights that a thread takes after those of a group's pairs below k: its next pairs, or another group's first.
  template <bool DOUBLED>
  Ahead wanted(int64_t group, int64_t k, int64_t count) const {
    if (k == words) group += fg_threads(), k = 0;
    if (group >= groups) return {taps, taps, 0};
    const uint32_t *at = taps + (group * words + k) * TAPS * GROUP;
    const int64_t pairs = words - k < kPairs ? words - k : kPairs, lines_of = TAPS * GROUP;  // those of LINE pairs
    const int64_t steps = (DOUBLED ? 9 : SPOTS) * ((count + ROWS - 1) / ROWS);
    return {at, at + pairs * TAPS * GROUP, (lines_of + steps - 1) / steps};
  }

  // The sums m of some blocks by one group of outputs, whose filters are made some pairs of inputs at a time.
  template <bool DOUBLED>
  void sum_parts(int64_t first, int64_t t, int64_t count, int64_t group, float *m) const {
    uint32_t *made = reinterpret_cast<uint32_t *>(m + span * kBlock * kSums);
    for (int64_t k = 0; k < words || k == 0; k += kPairs) {
      const int64_t pairs = words - k < kPairs ? words - k : kPairs;
      make_filters<DOUBLED>(taps + (group * words + k) * TAPS * GROUP, pairs, made, apart);
      Ahead ahead = wanted<DOUBLED>(group, k + pairs, count);
      for (int64_t b = 0; b < count; b += kBlock)
        sum_up<DOUBLED, true>(first, t + b, count - b < kBlock ? count - b : kBlock, group * GROUP, k, pairs, made,
                              m + b * kSums, ahead);
    }
  }

  // One item of the chunk that begins at tile `first`, by one group of outputs.
  template <bool DOUBLED, class Take, class Seen>
  void convolve(int64_t first, int64_t t, int64_t count, int64_t group, float *m, const Take &take, const Seen &seen) const {
    Ahead none = {taps, taps, 0};
    if (all)
      sum_up<DOUBLED, false>(first, t, count, group * GROUP, 0, words, all + group * SPOTS * apart, m, none);
    else
      sum_parts<DOUBLED>(first, t, count, group, m);
    for (int64_t b = 0; b < count; b += kBlock)
      finish<DOUBLED>(first + t + b, count - b < kBlock ? count - b : kBlock, group * GROUP, m + b * kSums, take, seen);
  }

  // All filters, in memory that is reserved for them.
  template <bool DOUBLED>
  void make_all(uint32_t *to) {
    const int64_t parts = (words + kPairs - 1) / kPairs;
    parallel_for(groups * parts, 1, [&](int64_t item) {
      const int64_t group = item / parts, k = item % parts * kPairs, pairs = words - k < kPairs ? words - k : kPairs;
      make_filters<DOUBLED>(taps + (group * words + k) * TAPS * GROUP, pairs, to + group * SPOTS * apart + k * GROUP, apart);
      return 0;
    });
    all = to;
  }

  // take(sample, pixel, o, low, high) has the sums of the outputs [o, o + 16) and [o + 16, o + 32) of that pixel, and
  // returns what it made of them: 32 elements.  A copy of `seen` for each block of tiles is told them, then leave(tile, o)
  // with the first tile of the block.
  template <bool DOUBLED = false, class Take, class Seen = Unseen>
  int run(const Take &take, const Seen &seen = {}) {
    const bool once = tiles > kManyTiles;
    uint32_t *own = reserve(lines * LINE, once ? groups * SPOTS * apart : 0);
    if (!own) return FG_NO_MEMORY;
    zeros = reinterpret_cast<bf16 *>(own);
    if (once) make_all<DOUBLED>(own + lines * LINE);
    const auto fill_one = [&](int64_t tile, int64_t t, float *) {
      scales ? fill<true, DOUBLED>(tile, t) : fill<false, DOUBLED>(tile, t);
    };
    SmallTiles::run(fill_one, [&](int64_t first, int64_t t, int64_t count, int64_t group, float *m) {
      convolve<DOUBLED>(first, t, count, group, m, take, seen);
    });
    return FG_OK;
  }
};

}  // namespace
