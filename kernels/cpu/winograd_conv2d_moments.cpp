// levels: scalar avx2 avx512 avx512_bf16 neon
// winograd_conv2d, and the moments of what it writes, taken from its registers band by band of tiles.
//
// A sample's bands depend on its size alone, each is of one thread, and they are merged in order: neither threads nor
// batch change a bit.
#include <algorithm>
#include <cstdlib>

#include "channel_moments.h"
#include "winograd_conv2d.h"

namespace {

// The bands of images of tiles of `side` x `side` pixels, `band` tiles each.
struct Bands {
  int64_t samples, height, width, channels, side, band;
  int64_t across, tiles, bands;
  float *partial;  // [sample][kColumns channels][band]: centres, sums and squares

  Bands(const fg_winograd_conv2d_args *a, int64_t side, int64_t band)
      : samples(a->batch), height(a->height), width(a->width), channels(a->outputs), side(side), band(band) {
    across = (width + side - 1) / side, tiles = (height + side - 1) / side * across, bands = (tiles + band - 1) / band;
  }

  int64_t strips() const { return (channels + kColumns - 1) / kColumns; }
  float *at(int64_t strip, int64_t i) const { return partial + (strip * bands + i) * kBand; }
  float *of(int64_t tile, int64_t o) const { return at(o / kColumns, tile / band) + o % kColumns; }
  Bands sample(int64_t b) const {
    Bands own = *this;
    own.partial += b * strips() * bands * kBand;
    return own;
  }

  // The pixels of the tiles before one.
  int64_t before(int64_t tile) const {
    const int64_t y = tile / across * side, rows = height - y < side ? height - y : side;
    return y < height ? y * width + rows * (tile % across * side) : height * width;
  }
  int64_t pixels(int64_t i) const {
    const int64_t end = (i + 1) * band;
    return before(end < tiles ? end : tiles) - before(i * band);
  }

  // The mean and variance of each channel of a strip, from all bands in order.
  template <bool PAIRS>
  void merge(int64_t strip, double *mean, double *variance) const {
    const int64_t o = strip * kColumns;
    const auto count = [this](int64_t i) { return pixels(i); };
    merge_bands<PAIRS>(at(strip, 0), kBand, bands, count, channels - o, mean + o, variance + o);
  }
};

// One tile of W channels more; a band's first tile is its centre.
void add_tile(const Bands &bands, int64_t y, int64_t x, int64_t o, const vf *z) {
  const int64_t side = bands.side, tile = y / side * bands.across + x / side;
  const int64_t rows = bands.height - y < side ? bands.height - y : side;
  const int64_t wide = bands.width - x < side ? bands.width - x : side;
  float *to = bands.of(tile, o), *sum = to + kColumns, *square = sum + kColumns;
  Sums own = {load(to), set1(0.0f), set1(0.0f)};
  if (tile % bands.band == 0) {
    own.centre = set1(0.0f);
    for (int64_t i = 0; i < rows * wide; ++i) own.centre = add(own.centre, z[i / wide * side + i % wide]);
    own.centre = mul(own.centre, set1(1.0f / static_cast<float>(rows * wide)));
    store(to, own.centre);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < wide; ++j) own.add_one(z[side * i + j]);
  store(sum, add(load(sum), own.sum)), store(square, add(load(square), own.square));
}

#if defined(FG_HAS_AVX512_BF16)
// A band of tiles of 2 x 2 pixels.
struct TileSums : PairSums {
  const Bands *bands;
  explicit TileSums(const Bands *bands) : bands(bands) {}
  inline __attribute__((always_inline)) void leave(int64_t tile, int64_t o) const { PairSums::leave(bands->of(tile, o)); }
};
#endif

int convolve(const fg_winograd_conv2d_args *a, Bands bands) {
  const int64_t strips = bands.strips(), floats = bands.samples * strips * bands.bands * kBand;
  bands.partial = static_cast<float *>(std::calloc(static_cast<size_t>(floats), sizeof(float)));
  if (!bands.partial) return FG_NO_MEMORY;
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32)
    code = convolve_floats(a, [&](int64_t sample, int64_t y, int64_t x, int64_t o, const vf *z) {
      add_tile(bands.sample(sample), y, x, o, z);
    });
#if defined(FG_HAS_AVX512_BF16)
  if (a->dtype == FG_BFLOAT16) code = convolve_pairs(a, TileSums(&bands));
#endif
  double *moments = static_cast<double *>(a->moments);
  if (!code)
    parallel_for(bands.samples * strips, 1, [&](int64_t item) {
      const int64_t sample = item / strips, strip = item % strips;
      const Bands own = bands.sample(sample);
      double *mean = moments + sample * 2 * a->outputs;
      if (a->dtype == FG_BFLOAT16) return own.merge<true>(strip, mean, mean + a->outputs), 0;
      return own.merge<false>(strip, mean, mean + a->outputs), 0;
    });
  std::free(bands.partial);
  return code;
}

Bands bands_of(const fg_winograd_conv2d_args *a) {
#if defined(FG_HAS_AVX512_BF16)
  if (a->dtype == FG_BFLOAT16) return Bands(a, 2, kBlock);
#endif
  if (a->taps) return a->taps == 2 ? Bands(a, 2, 4 * kRows) : Bands(a, 4, kRows);
  return Bands(a, 4, Winograd(a->filters, 1, a->inputs, a->outputs, a->height, a->width, false).block);
}

}  // namespace

extern "C" int FG_EXPORT(winograd_conv2d_moments)(const fg_winograd_conv2d_moments_args *a) {
  const int64_t pixels = a->height * a->width, element = a->dtype == FG_BFLOAT16 ? 2 : 4;
  const int64_t read = pixels / (a->doubled ? 4 : 1) * a->inputs * element, written = pixels * a->outputs * element;
  double *moments = static_cast<double *>(a->moments);
  if (!pixels) std::fill_n(moments, a->batch * 2 * a->outputs, __builtin_nan(""));
  if (!pixels || !a->outputs || !a->batch) return FG_OK;
  if (a->taps) return convolve(a, bands_of(a));  // filters are made for all samples
  for (int64_t b = 0; b < a->batch; ++b) {
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
