// A 3x3 convolution in int8 by Winograd's F(2 x 2, 3 x 3), by the arithmetic of kernels/winograd_conv2d_int8.py.
//
// A tile's points are made in float32, a row of four points at a time; once the largest magnitude of a point's channels
// is known they are quantized by it.  Words are four codes of input channels.  Sums are exact integers, so that blocks of
// any size give the same bits at every level; they become floats where they are stored.
//
// With VNNI filters are the unsigned operand, 128 added: sums begin at -128 times the sum of a tile's codes.
#pragma once
#include "quantized.h"
#include "winograd_small.h"

namespace {

constexpr int64_t WORD = 4, WIDE = LINE * WORD;  // channels of a word, of a line
constexpr int64_t kGroupBytes = GROUP * WORD;    // of a word's filters

// The codes of `n` floats at p, by `rate`, to the lines of `to`; returns their sum, at levels that ask for it.
FG_INLINE int32_t put_codes(const float *p, int64_t n, float rate, uint32_t *to) {
  const vf by = set1(rate);
#if defined(FG_HAS_AVX512_BF16)
  __m512i total = zero_i();
  for (int64_t c = 0; c < n; c += WIDE, to += ROWS * LINE) {
    const __m512i codes = codes_of(load(p + c), load(p + c + W), load(p + c + 2 * W), load(p + c + 3 * W), by);
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), codes);
    _mm512_storeu_si512(to, codes);
  }
  return _mm512_reduce_add_epi32(total);
#else
  for (int64_t c = 0; c < n; c += W) {
    const int some = lanes_left(n - c);
    int8_t *codes = reinterpret_cast<int8_t *>(to + c / WIDE * ROWS * LINE) + c % WIDE;
    to_codes(codes, round(mul(load(p + c), by)), some);
  }
  return 0;
#endif
}

#if defined(FG_HAS_AVX512_BF16)
// m[MR][NV vectors] = `by` scale (v . u), a tile's row of m kSums floats on; v: lines of ROWS tiles, u: words of GROUP
// outputs; `total`: the sums of the tiles' codes.
template <int MR, int NV>
FG_INLINE void code_product(const uint32_t *v, int64_t words, const uint8_t *u, const int32_t *total, const float *by,
                            const float *scale, float *m) {
  __m512i sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_set1_epi32(-128 * total[i]);
  for (int64_t k = 1; k <= words; ++k, u += kGroupBytes) {
    __m512i f[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) f[j] = _mm512_loadu_si512(u + 64 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(v[i * LINE]));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], f[j], x);
    }
    v += k % LINE ? 1 : (ROWS - 1) * LINE + 1;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) asm("" : "+v"(sum[i][j]));  // GCC 12 would keep each sum twice, and spill
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j)
      store(m + i * kSums + j * W, mul(mul(to_float(sum[i][j]), set1(by[i])), load(scale + j * W)));
}
#else
// The same for one tile and all outputs of a group.
FG_INLINE void code_product(const uint32_t *v, int64_t words, const uint8_t *u, float by, const float *scale, float *m) {
  int32_t sum[GROUP] = {};
  for (int64_t k = 0; k < words; ++k, u += kGroupBytes) {
    int8_t x[WORD];
    memcpy(x, v + k / LINE * ROWS * LINE + k % LINE, WORD);
    for (int64_t o = 0; o < GROUP; ++o)
      for (int64_t j = 0; j < WORD; ++j) sum[o] += (static_cast<int32_t>(u[o * WORD + j]) - 128) * x[j];
  }
  for (int64_t o = 0; o < GROUP; o += W) store(m + o, mul(mul(to_float(load_i(sum + o)), set1(by)), load(scale + o)));
}
#endif

template <class T>
struct CodeWinograd : SmallTiles {
  const T *image;
  const uint8_t *filters;
  const float *scale;          // (group, point, output)
  int64_t stride, tall;        // floats of a point in the making; tiles of a chunk, up to whole ROWS
  float *by;                   // (point, tile): of a tile's codes
  int32_t *total;              // the sums of those
  T *zeros;                    // a pixel outside of the image
  const T *beside = nullptr;   // null, or what `take` reads beside the sums, laid out as the outputs are

  CodeWinograd(const void *x, const void *filters, const void *scale, int64_t batch, int64_t inputs, int64_t outputs,
               int64_t height, int64_t width)
      : SmallTiles(batch, inputs, outputs, height, width, WORD), image(static_cast<const T *>(x)),
        filters(static_cast<const uint8_t *>(filters)), scale(static_cast<const float *>(scale)) {
    stride = lines * WIDE + LINE, tall = (chunk + ROWS - 1) / ROWS * ROWS;
    room = room < 4 * stride ? 4 * stride : room;
  }

  // Points 4 R to 4 R + 3 of a tile whose pixels are `pixel`, those of row P less those of row Q, or plus where these are 1
  // and 2; `work` has room for four points' channels.
  template <bool DOUBLED, int R, int P, int Q>
  void fill_row(const T *const *pixel, int64_t t, float *work) const {
    Largest largest[4];
    const int64_t channels = inputs;  // stores of vectors might be to members: what loops read is their own
    const T *upper[4], *lower[4];
    float *to[4];
    for (int j = 0; j < 4; ++j) upper[j] = pixel[4 * P + j], lower[j] = pixel[4 * Q + j], to[j] = work + j * stride;
    const auto points = [&](int64_t c, const auto &load_at) __attribute__((always_inline)) {
      vf d[4], e[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf a = load_at(upper[j] + c), b = load_at(lower[j] + c);
        d[j] = P == 1 && Q == 2 ? add(a, b) : sub(a, b);
      }
      spread_small(d, e, 1);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (vanishes<DOUBLED>(j)) continue;
        store(to[j] + c, e[j]);
        largest[j].see(e[j]);
      }
    };
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      if (R % 3 == 0 && c * static_cast<int64_t>(sizeof(T)) % 64 == 0)
        for (int64_t next = channels + c; next <= 2 * channels + c; next += channels) {  // of the tile to the right
          __builtin_prefetch(upper[3] + next);
          __builtin_prefetch(lower[3] + next);
        }
      points(c, [](const T *p) __attribute__((always_inline)) { return load(p); });
    }
    const int left = static_cast<int>(channels - c);
    if (left) points(c, [&](const T *p) __attribute__((always_inline)) { return load_n(p, left); });
    for (int j = 0; j < 4; ++j)
      if (!vanishes<DOUBLED>(j)) finish_point(4 * R + j, t, largest[j].value(), work + j * stride);
  }

  // The codes of a point, by their largest magnitude.
  void finish_point(int point, int64_t t, float absmax, const float *values) const {
    const bool finite = absmax <= 0x1.fffffep127f, served = finite && absmax >= 0x1p-100f;
    uint32_t *to = point_of(t) + point * part;
    const int64_t at = point * tall + t;
    by[at] = served ? absmax * (1.0f / 127.0f) : finite ? 0.0f : __builtin_nanf("");
    total[at] = 0;
    if (served)
      total[at] = put_codes(values, inputs, 127.0f / absmax, to);
    else
      for (int64_t i = 0; i < lines; ++i) memset(to + i * ROWS * LINE, 0, LINE * 4);
  }

  // The 16 points of tile `tile` of the images, the `t`-th of its chunk.
  template <bool DOUBLED>
  void fill(int64_t tile, int64_t t, float *work) const {
    const Place at = place(tile);
    const T *pixel[SPOTS];
    pixels_of<DOUBLED>(image, at, pixel);
    for (int i = 0; i < SPOTS; ++i) pixel[i] = pixel[i] ? pixel[i] : zeros;
    for (int j = 0; j < 4; ++j)  // codes are made a line at a time
      for (int64_t c = inputs / W * W; c < lines * WIDE; c += W) store(work + j * stride + c, set1(0.0f));
    fill_row<DOUBLED, 0, 0, 2>(pixel, t, work);
    fill_row<DOUBLED, 1, 1, 2>(pixel, t, work);
    if (!DOUBLED) fill_row<DOUBLED, 2, 2, 1>(pixel, t, work);
    fill_row<DOUBLED, 3, 1, 3>(pixel, t, work);
  }

  // `count` tiles by one point of a group's filters.
  void multiply(int64_t count, const uint32_t *v, const uint8_t *u, const int32_t *sums, const float *tile_scale,
                const float *filter_scale, bool half, float *m) const {
#if defined(FG_HAS_AVX512_BF16)
    for (int64_t t = 0; t < count; t += ROWS, v += ROWS * lines * LINE, m += ROWS * kSums) {
      const int64_t left = count - t;
      if (half)
        code_product<12, 1>(v, words, u, sums + t, tile_scale + t, filter_scale, m);
      else if (left > 8)
        code_product<12, 2>(v, words, u, sums + t, tile_scale + t, filter_scale, m);
      else if (left > 4)
        code_product<8, 2>(v, words, u, sums + t, tile_scale + t, filter_scale, m);
      else
        code_product<4, 2>(v, words, u, sums + t, tile_scale + t, filter_scale, m);
    }
#else
    (void)sums, (void)half;
    for (int64_t t = 0; t < count; ++t) {
      const uint32_t *own = v + t / ROWS * ROWS * lines * LINE + t % ROWS * LINE;
      code_product(own, words, u, tile_scale[t], filter_scale, m + t * kSums);
    }
#endif
  }

  // One block of the chunk that begins at tile `first`, by one group of outputs.
  template <bool DOUBLED, class Take>
  void convolve(int64_t first, int64_t t, int64_t count, int64_t group, float *m, const Take &take) const {
    const uint8_t *u = filters + group * SPOTS * words * kGroupBytes;
    const uint32_t *v = spread + t * lines * LINE;
    const int64_t o = group * GROUP, end = outputs - o < GROUP ? outputs - o : GROUP;
    for (int i = 0; i < SPOTS; ++i, u += words * kGroupBytes, v += part) {
      if (beside) fetch(beside, first + t + count * i / SPOTS, first + t + count * (i + 1) / SPOTS, o);
      if (!vanishes<DOUBLED>(i))
        multiply(count, v, u, total + i * tall + t, by + i * tall + t, scale + (group * SPOTS + i) * GROUP, end <= W,
                 m + i * GROUP);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Place at = place(first + t + i);
      const int64_t begin = (at.sample * height + at.y) * width + at.x;
      const bool right = at.x + 1 < width, under = at.y + 1 < height;
      for (int64_t p = 0; p < end; p += W) {
        vf z[4];
        gather_tile<DOUBLED>(m + i * kSums + p, z);
        take(begin, o + p, z[0]);
        if (right) take(begin + 1, o + p, z[1]);
        if (under) take(begin + width, o + p, z[2]);
        if (right && under) take(begin + width + 1, o + p, z[3]);
      }
    }
  }

  // take(pixel, o, z) has the sums of the outputs [o, o + W) of that pixel of all images.
  template <bool DOUBLED, class Take>
  int run(const Take &take) {
    const int64_t points = SPOTS * tall;
    uint32_t *own = reserve(2 * points + lines * WIDE * static_cast<int64_t>(sizeof(T)) / 4);
    if (!own) return FG_NO_MEMORY;
    by = reinterpret_cast<float *>(own), total = reinterpret_cast<int32_t *>(own + points);
    zeros = reinterpret_cast<T *>(own + 2 * points);
    SmallTiles::run([&](int64_t tile, int64_t t, float *work) { fill<DOUBLED>(tile, t, work); },
                    [&](int64_t first, int64_t t, int64_t count, int64_t group, float *m) {
                      convolve<DOUBLED>(first, t, count, group, m, take);
                    });
    return FG_OK;
  }
};

}  // namespace
