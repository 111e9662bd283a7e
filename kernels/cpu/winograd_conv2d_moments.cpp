// levels: scalar avx2 avx512 avx512_bf16 neon
// winograd_conv2d, and the moments of what it writes, taken from its registers band by band of tiles.
//
// A sample is convolved by itself and its bands depend on its size alone, and they are merged in order: neither threads
// nor batch change a bit.
#include <algorithm>
#include <cstdlib>

#include "winograd_conv2d.h"

namespace {

constexpr int64_t kColumns = 32;  // channels whose sums lie together

// What a band has of some channels: a value that is near theirs, the sums of what is apart from it, and of its square.
// The centre is of the band itself: its distance from the mean costs no more roundings than the band has pixels for each
// that it was taken from (moments.h).
struct Sums {
  vf centre, sum, square;
  inline __attribute__((always_inline)) void add_one(vf x) {
    const vf d = sub(x, centre);
    sum = add(sum, d), square = fma(d, d, square);
  }
};

// The bands of an image of tiles of `side` x `side` pixels, `band` tiles each.
struct Bands {
  int64_t height, width, channels, side, band;
  int64_t across, tiles, bands;
  float *partial;  // [kColumns channels][band]: centres, sums and squares

  Bands(const fg_winograd_conv2d_args *a, int64_t side, int64_t band)
      : height(a->height), width(a->width), channels(a->outputs), side(side), band(band) {
    across = (width + side - 1) / side, tiles = (height + side - 1) / side * across, bands = (tiles + band - 1) / band;
  }

  int64_t strips() const { return (channels + kColumns - 1) / kColumns; }
  float *at(int64_t strip, int64_t i) const { return partial + (strip * bands + i) * 3 * kColumns; }
  float *of(int64_t tile, int64_t o) const { return at(o / kColumns, tile / band) + o % kColumns; }

  // The pixels of the tiles before one.
  int64_t before(int64_t tile) const {
    const int64_t y = tile / across * side, rows = height - y < side ? height - y : side;
    return y < height ? y * width + rows * (tile % across * side) : height * width;
  }
  double pixels(int64_t i) const {
    const int64_t end = (i + 1) * band;
    return static_cast<double>(before(end < tiles ? end : tiles) - before(i * band));
  }

  // The mean and variance of each channel of a strip, from all bands in order (Chan, Golub & LeVeque 1979).
  void merge(int64_t strip, double *mean, double *variance) const {
    double middle[kColumns] = {}, m2[kColumns] = {};
    const double all = static_cast<double>(height * width);
    for (int64_t i = 0; i < bands; ++i) {
      const float *centre = at(strip, i), *sum = centre + kColumns;
      const double n = pixels(i);
      for (int64_t c = 0; c < kColumns; ++c) middle[c] += n * static_cast<double>(centre[c]) + static_cast<double>(sum[c]);
    }
    for (int64_t c = 0; c < kColumns; ++c) middle[c] /= all;
    for (int64_t i = 0; i < bands; ++i) {
      const float *centre = at(strip, i), *sum = centre + kColumns, *square = sum + kColumns;
      const double n = pixels(i), share = 1 / n;
      for (int64_t c = 0; c < kColumns; ++c) {
        const double s = static_cast<double>(sum[c]), apart = static_cast<double>(centre[c]) + s * share - middle[c];
        m2[c] += static_cast<double>(square[c]) - s * s * share + n * apart * apart;
      }
    }
    for (int64_t c = 0; c < kColumns && strip * kColumns + c < channels; ++c)
      mean[strip * kColumns + c] = middle[c], variance[strip * kColumns + c] = m2[c] < 0 ? 0 : m2[c] / all;
  }
};

// One tile of 4 x 4 pixels of W channels more; a band's first tile is its centre.
void add_tile(const Bands &bands, int64_t y, int64_t x, int64_t o, const vf *z) {
  const int64_t tile = y / 4 * bands.across + x / 4;
  const int64_t rows = bands.height - y < 4 ? bands.height - y : 4, wide = bands.width - x < 4 ? bands.width - x : 4;
  float *to = bands.of(tile, o), *sum = to + kColumns, *square = sum + kColumns;
  Sums own = {load(to), set1(0.0f), set1(0.0f)};
  if (tile % bands.band == 0) {
    own.centre = set1(0.0f);
    for (int64_t i = 0; i < rows * wide; ++i) own.centre = add(own.centre, z[i / wide * 4 + i % wide]);
    own.centre = mul(own.centre, set1(1.0f / static_cast<float>(rows * wide)));
    store(to, own.centre);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < wide; ++j) own.add_one(z[4 * i + j]);
  store(sum, add(load(sum), own.sum)), store(square, add(load(square), own.square));
}

#if defined(FG_HAS_AVX512_BF16)
// A band of tiles of 2 x 2 pixels; the first pixel is its centre, near enough for values of eight bits.
struct PairSums {
  const Bands *bands;
  Sums even{}, odd{};
  bool begun = false;

  inline __attribute__((always_inline)) void add(__m512i x) {
    const vf low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    const vf high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    if (!begun) even = {low, set1(0.0f), set1(0.0f)}, odd = {high, set1(0.0f), set1(0.0f)}, begun = true;
    even.add_one(low), odd.add_one(high);
  }
  inline __attribute__((always_inline)) void leave(int64_t tile, int64_t o) const {
    float *to = bands->of(tile, o);
    const vf low[3] = {even.centre, even.sum, even.square}, high[3] = {odd.centre, odd.sum, odd.square};
    for (int i = 0; i < 3; ++i) {
      vf first, second;
      interleave(low[i], high[i], first, second);
      store(to + i * kColumns, first), store(to + i * kColumns + W, second);
    }
  }
};
#endif

// One sample.
int convolve(const fg_winograd_conv2d_args *a, Bands bands) {
  const int64_t floats = bands.strips() * bands.bands * 3 * kColumns;
  bands.partial = static_cast<float *>(std::calloc(static_cast<size_t>(floats), sizeof(float)));
  if (!bands.partial) return FG_NO_MEMORY;
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32)
    code = convolve_floats(a, [&](int64_t y, int64_t x, int64_t o, const vf *z) { add_tile(bands, y, x, o, z); });
#if defined(FG_HAS_AVX512_BF16)
  if (a->dtype == FG_BFLOAT16) code = convolve_pairs(a, PairSums{&bands});
#endif
  double *moments = static_cast<double *>(a->moments);
  if (!code)
    parallel_for(bands.strips(), 1, [&](int64_t strip) { return bands.merge(strip, moments, moments + a->outputs), 0; });
  std::free(bands.partial);
  return code;
}

Bands bands_of(const fg_winograd_conv2d_args *a) {
#if defined(FG_HAS_AVX512_BF16)
  if (a->dtype == FG_BFLOAT16) return Bands(a, 2, kBlock);
#endif
  return Bands(a, 4, Winograd(a->filters, 1, a->inputs, a->outputs, a->height, a->width, false).block);
}

}  // namespace

extern "C" int FG_EXPORT(winograd_conv2d_moments)(const fg_winograd_conv2d_moments_args *a) {
  const int64_t pixels = a->height * a->width, element = a->dtype == FG_BFLOAT16 ? 2 : 4;
  const int64_t read = pixels / (a->doubled ? 4 : 1) * a->inputs * element, written = pixels * a->outputs * element;
  double *moments = static_cast<double *>(a->moments);
  if (!pixels) std::fill_n(moments, a->batch * 2 * a->outputs, __builtin_nan(""));
  for (int64_t b = 0; pixels && a->outputs && b < a->batch; ++b) {
    fg_winograd_conv2d_args one = *a;
    one.batch = 1;
    one.x = static_cast<const char *>(a->x) + b * read;
    one.residual = a->residual ? static_cast<const char *>(a->residual) + b * written : nullptr;
    one.out = static_cast<char *>(a->out) + b * written;
    one.moments = moments + b * 2 * a->outputs;
    if (int code = convolve(&one, bands_of(&one))) return code;
  }
  return FG_OK;
}
