// A 3x3 convolution in bfloat16 by Winograd's F(2 x 2, 3 x 3): 16 products of channels for four pixels, not 36.
//
// Tiles are transformed in float32 and rounded once; then each block of them is multiplied by 32 outputs' filters of all
// 16 points with vdpbf16ps, and what comes out is transformed back.  Words are pairs of input channels.  A tile's sums run
// over the channels in order in float32, whatever block it is in: neither threads nor batch change a bit.
//
// What becomes of a tile's pixels is the caller's, as is a factor for each channel of a sample.
#pragma once
#include "winograd_small.h"

namespace {

FG_INLINE __mmask32 halves_below(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u; }

// m[MR][NV vectors] = v . u, a tile's row of m `row` floats on; v: lines of ROWS tiles, u: pairs of GROUP outputs.
template <int MR, int NV>
FG_INLINE void pair_product(const uint32_t *v, int64_t pairs, const uint32_t *u, float *m, int64_t row) {
  __m512 sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k += LINE, v += (ROWS - 1) * LINE) {
    const uint32_t *end = v + (pairs - k < LINE ? pairs - k : LINE);
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

// Looks at no output; see PairWinograd::run.
struct Unseen {
  void add(__m512i) {}
  void leave(int64_t, int64_t) {}
};

struct PairWinograd : SmallTiles {
  const bf16 *image;
  const uint32_t *filters;
  const float *scales;  // null, or LINE even channels, LINE odd ones, ...: `lines` times for each sample
  bf16 *zeros;          // a pixel outside of the image
  const bf16 *beside = nullptr;  // null, or what `take` reads beside the sums, laid out as the outputs are

  PairWinograd(const void *x, const void *filters, const float *scales, int64_t batch, int64_t inputs, int64_t outputs,
               int64_t height, int64_t width)
      : SmallTiles(batch, inputs, outputs, height, width, 2), image(static_cast<const bf16 *>(x)),
        filters(static_cast<const uint32_t *>(filters)), scales(scales) {}

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

  template <int NV>
  void multiply(int64_t count, const uint32_t *v, const uint32_t *u, float *m) const {
    for (int64_t t = 0; t < count; t += ROWS, v += ROWS * lines * LINE, m += ROWS * kSums) {
      const int64_t left = count - t;
      if (left > 8)
        pair_product<12, NV>(v, words, u, m, kSums);
      else if (left > 4)
        pair_product<8, NV>(v, words, u, m, kSums);
      else
        pair_product<4, NV>(v, words, u, m, kSums);
    }
  }

  // One block of the chunk that begins at tile `first`, by one group of outputs.
  template <bool DOUBLED, class Take, class Seen>
  void convolve(int64_t first, int64_t t, int64_t count, int64_t group, float *m, const Take &take, Seen seen) const {
    const uint32_t *u = filters + group * SPOTS * words * GROUP, *v = spread + t * lines * LINE;
    const int64_t o = group * GROUP;
    for (int i = 0; i < SPOTS; ++i, u += words * GROUP, v += part) {
      if (beside) fetch(beside, first + t + count * i / SPOTS, first + t + count * (i + 1) / SPOTS, o);
      if (vanishes<DOUBLED>(i)) continue;
      if (outputs - o > W)
        multiply<2>(count, v, u, m + i * GROUP);
      else
        multiply<1>(count, v, u, m + i * GROUP);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Place at = place(first + t + i);
      vf z[2][4];
      gather_tile<DOUBLED>(m + i * kSums, z[0]);
      gather_tile<DOUBLED>(m + i * kSums + W, z[1]);
      for (int j = 0; j < 4; ++j) {
        const int64_t y = at.y + j / 2, x = at.x + j % 2;
        if (y < height && x < width) seen.add(take(at.sample, y * width + x, o, z[0][j], z[1][j]));
      }
    }
    seen.leave(first + t, o);
  }

  // take(sample, pixel, o, low, high) has the sums of the outputs [o, o + 16) and [o + 16, o + 32) of that pixel, and
  // returns what it made of them: 32 elements.  A copy of `seen` for each block of tiles is told them, then leave(tile, o)
  // with the first tile of the block.
  template <bool DOUBLED = false, class Take, class Seen = Unseen>
  int run(const Take &take, const Seen &seen = {}) {
    zeros = reinterpret_cast<bf16 *>(reserve(lines * LINE));
    if (!zeros) return FG_NO_MEMORY;
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
