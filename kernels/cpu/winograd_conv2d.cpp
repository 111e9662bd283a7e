// levels: scalar avx2 avx512 neon
// A 3x3 convolution by Winograd's F(4 x 4, 3 x 3): blocks of tiles are transformed, multiplied by the 36 matrices of
// filters, and transformed back, all while the block is in the cache.
//
// A tile's sums run over the input channels in order, whatever block it is in: neither threads nor batch change a bit.
#include "abi.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t kBlock = 24;     // tiles of a block: a multiple of every MR below
constexpr int POINTS = 36, PANEL = 16, VP = PANEL / W;  // vectors of a panel of outputs

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

// m[MR][NP panels] = v[MR][inputs] . u, whose panels are `inputs` * PANEL apart.
template <int MR, int NP>
FG_INLINE void product(const float *v, int64_t inputs, int64_t step, const float *u, float *m, int64_t columns) {
  vf sum[MR][NP * VP];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) sum[i][j] = set1(0.0f);
  for (int64_t k = 0; k < inputs; ++k) {
    vf f[NP * VP];
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) f[j] = load(u + j / VP * inputs * PANEL + k * PANEL + j % VP * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vf x = set1(v[i * step + k]);
#pragma GCC unroll 16
      for (int j = 0; j < NP * VP; ++j) sum[i][j] = fma(x, f[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NP * VP; ++j) store(m + i * columns + j * W, sum[i][j]);
}

template <int MR, int NP>
void products(int64_t tiles, const float *v, int64_t inputs, int64_t step, const float *u, float *m, int64_t columns) {
  for (int64_t t = 0; t < tiles; t += MR) product<MR, NP>(v + t * step, inputs, step, u, m + t * columns, columns);
}

struct Problem {
  const fg_winograd_conv2d_args *a;
  int64_t down, across, tiles;  // of a sample, of the batch
  int64_t panels, step, columns, block;

  explicit Problem(const fg_winograd_conv2d_args *args) : a(args) {
    down = (a->height + 3) / 4, across = (a->width + 3) / 4, tiles = a->batch * down * across;
    panels = (a->outputs + PANEL - 1) / PANEL;
    step = (a->inputs + W - 1) / W * W;
    columns = panels * PANEL;
    const int64_t share = (tiles + fg_threads() - 1) / fg_threads();
    block = share >= kBlock ? kBlock : share;
  }

  // The tile's pixels, transformed, as row `t` of each of the 36 matrices.
  void load_tile(int64_t tile, int64_t t, float *v) const {
    const int64_t sample = tile / (down * across), y = tile / across % down * 4 - 1, x = tile % across * 4 - 1;
    const float *image = static_cast<const float *>(a->x) + sample * a->height * a->width * a->inputs;
    const float *pixel[POINTS];
    for (int i = 0; i < POINTS; ++i) {
      const int64_t row = y + i / 6, column = x + i % 6;
      const bool inside = row >= 0 && row < a->height && column >= 0 && column < a->width;
      pixel[i] = inside ? image + (row * a->width + column) * a->inputs : nullptr;
    }
    for (int64_t c = 0; c < a->inputs; c += W) {
      const int some = a->inputs - c < W ? static_cast<int>(a->inputs - c) : W;
      vf d[POINTS], e[POINTS];
      for (int i = 0; i < POINTS; ++i)
        d[i] = !pixel[i] ? set1(0.0f) : some == W ? load(pixel[i] + c) : load_n(pixel[i] + c, some);
      for (int i = 0; i < 6; ++i) spread(d + i, e + i, 6);
      for (int i = 0; i < 6; ++i) spread(e + 6 * i, d + 6 * i, 1);
      for (int i = 0; i < POINTS; ++i) store(v + (i * kBlock + t) * step + c, d[i]);
    }
  }

  // Row `t` of the 36 products, transformed back, with bias and residual.
  void store_tile(int64_t tile, int64_t t, const float *m) const {
    const int64_t sample = tile / (down * across), y = tile / across % down * 4, x = tile % across * 4;
    const int64_t start = ((sample * a->height + y) * a->width + x) * a->outputs;
    const int64_t rows = a->height - y < 4 ? a->height - y : 4, wide = a->width - x < 4 ? a->width - x : 4;
    float *out = static_cast<float *>(a->out) + start;
    const float *bias = static_cast<const float *>(a->bias), *residual = static_cast<const float *>(a->residual);
    for (int64_t o = 0; o < a->outputs; o += W) {
      const int some = a->outputs - o < W ? static_cast<int>(a->outputs - o) : W;
      const vf offset = bias ? load_n(bias + o, some) : set1(0.0f);
      vf d[POINTS], e[24], z[16];
      for (int i = 0; i < POINTS; ++i) d[i] = load(m + (i * kBlock + t) * columns + o);
      for (int i = 0; i < 6; ++i) gather(d + i, 6, e + i, 6);
      for (int i = 0; i < 4; ++i) gather(e + 6 * i, 1, z + 4 * i, 1);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < wide; ++j) {
          const int64_t at = (i * a->width + j) * a->outputs + o;
          vf value = add(z[4 * i + j], offset);
          if (residual) value = add(value, load_n(residual + start + at, some));
          store_n(out + at, value, some);
        }
    }
  }

  // `count` rows of one of the 36 matrices by all panels of its filters.
  void multiply(int64_t count, const float *v, const float *u, float *m) const {
    const int64_t k = a->inputs, panel = k * PANEL;
#if defined(FG_HAS_AVX512)
    for (int64_t p = 0; p < panels;) {
      const int64_t left = panels - p, n = left == 5 || left == 6 || left == 9 ? 3 : left < 4 ? left : 4;
      float *to = m + p * PANEL;
      if (n == 4)
        products<6, 4>(count, v, k, step, u + p * panel, to, columns);
      else if (n == 3)
        products<8, 3>(count, v, k, step, u + p * panel, to, columns);
      else if (n == 2)
        products<12, 2>(count, v, k, step, u + p * panel, to, columns);
      else
        products<12, 1>(count, v, k, step, u + p * panel, to, columns);
      p += n;
    }
#else
    constexpr int MR = W == 1 ? 2 : 6;
    for (int64_t p = 0; p < panels; ++p)
      products<MR, 1>(count, v, k, step, u + p * panel, m + p * PANEL, columns);
#endif
  }

  int convolve(int64_t item) const {
    const int64_t first = item * block, count = tiles - first < block ? tiles - first : block;
    const int64_t words = POINTS * kBlock * (step + columns);
    float *v = static_cast<float *>(fg_scratch(static_cast<size_t>(words) * sizeof(float)));
    if (!v) return FG_NO_MEMORY;
    float *m = v + POINTS * kBlock * step;
    for (int64_t t = 0; t < count; ++t) load_tile(first + t, t, v);
    const float *filters = static_cast<const float *>(a->filters);
    for (int64_t i = 0; i < POINTS; ++i)
      multiply(count, v + i * kBlock * step, filters + i * panels * a->inputs * PANEL, m + i * kBlock * columns);
    for (int64_t t = 0; t < count; ++t) store_tile(first + t, t, m);
    return FG_OK;
  }
};

}  // namespace

extern "C" int FG_EXPORT(winograd_conv2d)(const fg_winograd_conv2d_args *args) {
  if (!args->batch || !args->outputs || !args->height || !args->width) return FG_OK;
  const Problem problem(args);
  return parallel_for((problem.tiles + problem.block - 1) / problem.block, 1,
                      [&](int64_t item) { return problem.convolve(item); });
}
