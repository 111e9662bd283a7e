// A 3x3 convolution by Winograd's F(4 x 4, 3 x 3): blocks of tiles are transformed, multiplied by the 36 matrices of
// filters, and transformed back, all while the block is in the cache.
//
// A tile's sums run over the input channels in order, whatever block it is in: neither threads nor batch change a bit.
// What fills a tile and what becomes of its pixels are the caller's.
#pragma once
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t kRows = 24;  // a multiple of every MR below
constexpr int POINTS = 36, PANEL = 16, VP = PANEL / W;  // vectors of a panel of outputs

constexpr int64_t kFew = 4 << 20, kMany = 16 << 20;  // bytes of filters

// B^T d for six vectors, `s` apart in d and in o.
FG_INLINE void spread(const vf *d, vf *o, int s) {
  const vf two = set1(2.0f), four = set1(4.0f), five = set1(-5.0f);
  const vf a = fma(set1(-4.0f), d[2 * s], d[4 * s]), b = fma(set1(-4.0f), d[s], d[3 * s]);
  const vf c = sub(d[4 * s], d[2 * s]), e = mul(two, sub(d[3 * s], d[s]));
  const vf first = fma(four, d[0], fma(five, d[2 * s], d[4 * s]));
  const vf last = fma(four, d[s], fma(five, d[3 * s], d[5 * s]));
  o[0] = first;
  o[s] = add(a, b);
  o[2 * s] = sub(a, b);
  o[3 * s] = add(c, e);
  o[4 * s] = sub(c, e);
  o[5 * s] = last;
}

// A^T m for six vectors `s` apart; four come out, `t` apart.
FG_INLINE void gather(const vf *m, int s, vf *o, int t) {
  const vf a = add(m[s], m[2 * s]), b = sub(m[s], m[2 * s]), c = add(m[3 * s], m[4 * s]), d = sub(m[3 * s], m[4 * s]);
  o[0] = add(add(m[0], a), c);
  o[t] = fma(set1(2.0f), d, b);
  o[2 * t] = fma(set1(4.0f), c, a);
  o[3 * t] = add(fma(set1(8.0f), d, b), m[5 * s]);
}

// Of F(2 x 2, 3 x 3): B^T d for four vectors, `s` apart in d and in o.
FG_INLINE void spread_small(const vf *d, vf *o, int s) {
  const vf first = sub(d[0], d[2 * s]), second = add(d[s], d[2 * s]), third = sub(d[2 * s], d[s]);
  o[3 * s] = sub(d[s], d[3 * s]);
  o[0] = first, o[s] = second, o[2 * s] = third;
}

// Of it: A^T m for four vectors `s` apart; two come out, `t` apart.
FG_INLINE void gather_small(const vf *m, int s, vf *o, int t) {
  o[0] = add(add(m[0], m[s]), m[2 * s]);
  o[t] = sub(sub(m[s], m[2 * s]), m[3 * s]);
}

// Some panels of filters, one after the other.
struct Panels {
  const float *filters;
  int64_t panels;
};

// Where the tiles of a product lie, in floats apart: what is multiplied; its sums, panels of them too.
struct Layout {
  int64_t step, row, panel;
};

// m[MR][NP panels] = v[MR][inputs] . u, whose panels are `inputs` * PANEL apart.  FAR: v is not in a core's own cache.
template <int MR, int NP, bool FAR>
FG_INLINE void product(const float *v, int64_t inputs, const Layout &at, const float *u, float *m, Panels next) {
  vf sum[MR][NP * VP];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) sum[i][j] = set1(0.0f);
  for (int64_t k = 0; k < inputs; ++k) {
    for (int64_t j = 0; j < next.panels; ++j) __builtin_prefetch(next.filters + (j * inputs + k) * PANEL, 0, 2);
    if (FAR && k % 16 == 0)
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(v + (MR + i) * at.step + k);
    vf f[NP * VP];
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) f[j] = load(u + j / VP * inputs * PANEL + k * PANEL + j % VP * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vf x = set1(v[i * at.step + k]);
#pragma GCC unroll 16
      for (int j = 0; j < NP * VP; ++j) sum[i][j] = fma(x, f[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) store(m + i * at.row + j / VP * at.panel + j % VP * W, sum[i][j]);
}

template <int MR, int NP, bool FAR>
void products(int64_t tiles, const float *v, int64_t inputs, const Layout &at, const float *u, float *m, Panels next) {
  const int64_t parts = (tiles + MR - 1) / MR;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = next.panels * i / parts, end = next.panels * (i + 1) / parts;
    product<MR, NP, FAR>(v + i * MR * at.step, inputs, at, u, m + i * MR * at.row,
                         {next.filters + begin * inputs * PANEL, end - begin});
  }
}

// The filters of all points, and the products of transformed tiles by them, a few panels of one point at a time.
struct Filters {
  const float *filters;
  int64_t inputs, panels, groups;  // of panels, of a point
  int64_t step, columns;           // floats of a tile at a point: of inputs, of outputs

  Filters(const void *filters, int64_t inputs, int64_t outputs)
      : filters(static_cast<const float *>(filters)), inputs(inputs) {
    panels = (outputs + PANEL - 1) / PANEL;
    step = (inputs + W - 1) / W * W;
    columns = panels * PANEL;
    groups = 0;
    for (int64_t p = 0; p < panels; p += together(p)) ++groups;
  }

  // How many panels from `p` on are multiplied at a time.
  int64_t together(int64_t p) const {
#if defined(FG_HAS_AVX512)
    const int64_t left = panels - p;
    return left == 5 || left == 6 || left == 9 ? 3 : left < 4 ? left : 4;
#else
    (void)p;
    return 1;
#endif
  }

  int64_t first_panel(int64_t group) const {
    int64_t p = 0;
    for (; group; --group) p += together(p);
    return p;
  }

  // The panels of a group; none where there is no such point.
  Panels at(int64_t point, int64_t group) const {
    if (point < 0 || point >= POINTS) return {filters, 0};
    const int64_t p = first_panel(group);
    return {filters + (point * panels + p) * inputs * PANEL, together(p)};
  }

  // `count` tiles by a group of panels at a point; what is `next` is fetched meanwhile.
  template <bool FAR>
  void multiply(int64_t point, int64_t group, int64_t count, const float *v, float *m, const Layout &layout,
                Panels next) const {
    const Panels own = at(point, group);
    const float *u = own.filters;
    m += first_panel(group) * layout.panel;
#if defined(FG_HAS_AVX512)
    if (own.panels == 4)
      products<6, 4, FAR>(count, v, inputs, layout, u, m, next);
    else if (own.panels == 3)
      products<8, 3, FAR>(count, v, inputs, layout, u, m, next);
    else if (own.panels == 2)
      products<12, 2, FAR>(count, v, inputs, layout, u, m, next);
    else
      products<12, 1, FAR>(count, v, inputs, layout, u, m, next);
#else
    constexpr int MR = W == 1 ? 2 : 6;
    products<MR, 1, FAR>(count, v, inputs, layout, u, m, next);
#endif
  }
};

// The sizes of the output, and how its tiles of 4 x 4 pixels are shared out.
struct Winograd : Filters {
  int64_t height, width;
  int64_t down, across, tiles;  // of a sample, of the batch
  int64_t block, room;

  // `even`: blocks are cut so that every thread has as much to do; else by the sizes alone.
  Winograd(const void *filters, int64_t batch, int64_t inputs, int64_t outputs, int64_t height, int64_t width,
           bool even = true)
      : Filters(filters, inputs, outputs), height(height), width(width) {
    down = (height + 3) / 4, across = (width + 3) / 4, tiles = batch * down * across;
    // Every block reads all filters: where they are large, it takes more tiles.
    const int64_t share = even ? (tiles + fg_threads() - 1) / fg_threads() : tiles, bytes = POINTS * 4 * inputs * columns;
    const int64_t most = bytes <= kFew ? kRows : bytes <= kMany ? 2 * kRows : 6 * kRows, parts = (share + most - 1) / most;
    block = share >= most ? (share + parts - 1) / parts : share;
    room = (block + kRows - 1) / kRows * kRows | 1;  // points in other sets of a cache
  }

  // fill(sample, y, x, put) hands put(c, d) the 36 pixels d of channels from c on of the tile whose outputs begin at
  // pixel (y, x): those from (y - 1, x - 1) on.  take(sample, y, x, get) has get(o, z) set the 16 outputs z of channels
  // from o on.
  template <class Fill, class Take>
  int convolve(int64_t item, const Fill &fill, const Take &take) const {
    const int64_t first = item * block, count = tiles - first < block ? tiles - first : block;
    const int64_t words = POINTS * room * (step + columns);
    float *v = static_cast<float *>(fg_scratch(static_cast<size_t>(words) * sizeof(float)));
    if (!v) return FG_NO_MEMORY;
    float *m = v + POINTS * room * step;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t tile = first + t;
      fill(tile / (down * across), tile / across % down * 4, tile % across * 4, [&](int64_t c, vf *d) {
        vf e[POINTS];
        for (int i = 0; i < 6; ++i) spread(d + i, e + i, 6);
        for (int i = 0; i < 6; ++i) spread(e + 6 * i, d + 6 * i, 1);
        for (int i = 0; i < POINTS; ++i) store(v + (i * room + t) * step + c, d[i]);
      });
    }
    const Layout layout = {step, columns, PANEL};
    for (int64_t item = 0; item < POINTS * groups; ++item) {
      const int64_t i = item / groups;
      const float *from = v + i * room * step;
      float *to = m + i * room * columns;
      const Panels next = at((item + 1) / groups, (item + 1) % groups);
      if (count > 2 * kRows)
        multiply<true>(i, item % groups, count, from, to, layout, next);
      else
        multiply<false>(i, item % groups, count, from, to, layout, next);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t tile = first + t;
      take(tile / (down * across), tile / across % down * 4, tile % across * 4, [&](int64_t o, vf *z) {
        vf d[POINTS], e[24];
        for (int i = 0; i < POINTS; ++i) d[i] = load(m + (i * room + t) * columns + o);
        for (int i = 0; i < 6; ++i) gather(d + i, 6, e + i, 6);
        for (int i = 0; i < 4; ++i) gather(e + 6 * i, 1, z + 4 * i, 1);
      });
    }
    return FG_OK;
  }

  template <class Fill, class Take>
  int run(const Fill &fill, const Take &take) const {
    return parallel_for((tiles + block - 1) / block, 1, [&](int64_t item) { return convolve(item, fill, take); });
  }
};

// pixel[i * SIDE + j] is where pixel (y + i, x + j) of an image (height, width, channels) begins, null outside of it.
template <int SIDE, class T>
FG_INLINE void pixels_at(const T *image, int64_t height, int64_t width, int64_t channels, int64_t y, int64_t x,
                         const T **pixel) {
  for (int i = 0; i < SIDE * SIDE; ++i) {
    const int64_t row = y + i / SIDE, column = x + i % SIDE;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    pixel[i] = inside ? image + (row * width + column) * channels : nullptr;
  }
}

// The channels [c, c + some) of one pixel, zeros outside of the image; those `ahead` elements on are fetched.
template <class T>
FG_INLINE vf channels_of(const T *pixel, int64_t c, int some, int64_t ahead) {
  if (!pixel) return set1(0.0f);
  if (W > 1) __builtin_prefetch(pixel + c + ahead);
  return some == W ? load(pixel + c) : load_n(pixel + c, some);
}

}  // namespace
