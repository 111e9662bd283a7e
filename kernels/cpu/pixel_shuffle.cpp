// levels: scalar avx2 avx512 neon
// Pixel shuffle: rows of pixels are woven out of channels, or pixels taken apart into them.  Elements are only moved, so
// the type is the element's width; out is dense and written in the order of its memory, or in `factor` streams.
#include "abi.h"
#include "interleave.h"
#include "threads.h"

namespace {

constexpr int64_t kItem = 1 << 16;  // bytes that one work item writes, at least one row of the coarse grid

// Row (n, c, h) of the coarse grid: `factor` rows of fine pixels.
template <int R, class T>
FG_INLINE void by_channel(const fg_pixel_shuffle_args *a, int64_t item) {
  const int64_t r = R ? R : a->factor, h = item % a->height, nc = item / a->height;
  const int64_t n = nc / a->channels, c = nc % a->channels;
  const T *x = static_cast<const T *>(a->x) + n * a->x_batch;
  T *out = static_cast<T *>(a->out);
  for (int64_t i = 0; i < r; ++i) {
    if (a->down) {
      const Streams s = {1, r, 0, a->height * a->width};
      unweave<1, R>(x + c * a->x_channel + (h * r + i) * a->x_row, s, a->width, out + ((nc * r + i) * r * a->height + h) * a->width);
    } else {
      const Streams s = {1, r, 0, a->x_channel};
      weave<1, R>(x + (c * r + i) * r * a->x_channel + h * a->x_row, s, a->width, out + ((nc * a->height + h) * r + i) * a->width * r);
    }
  }
}

// Row (n, h) of the coarse grid, channels-last.
template <int R, class T>
FG_INLINE void by_pixel(const fg_pixel_shuffle_args *a, int64_t item) {
  const int64_t r = R ? R : a->factor, h = item % a->height, n = item / a->height, c = a->channels;
  const T *x = static_cast<const T *>(a->x) + n * a->x_batch;
  T *out = static_cast<T *>(a->out);
  if (a->down) {
    const Streams s = {r, r, a->x_row, a->x_column};
    for (int64_t w = 0; w < a->width; ++w)
      weave<R, R>(x + h * r * a->x_row + w * r * a->x_column, s, c, out + (item * a->width + w) * c * r * r);
  } else {
    const Streams s = {r, r, a->width * r * c, c};
    for (int64_t w = 0; w < a->width; ++w)
      unweave<R, R>(x + h * a->x_row + w * a->x_column, s, c, out + (item * a->width * r + w) * r * c);
  }
}

template <int R, class T>
int rows(const fg_pixel_shuffle_args *a) {
  const int64_t total = a->batch * a->height * (a->channels_last ? 1 : a->channels);
  const int64_t all = a->batch * a->channels * a->height * a->width * a->factor * a->factor;
  const int64_t bytes = all / total * static_cast<int64_t>(sizeof(T)), step = bytes < kItem ? kItem / bytes : 1;
  return parallel_for((total + step - 1) / step, 1, [&](int64_t item) {
    const int64_t last = (item + 1) * step < total ? (item + 1) * step : total;
    for (int64_t row = item * step; row < last; ++row) {
      if (a->channels_last)
        by_pixel<R, T>(a, row);
      else
        by_channel<R, T>(a, row);
    }
    return 0;
  });
}

template <class T>
int factors(const fg_pixel_shuffle_args *a) {
  switch (a->factor) {
    case 2:
      return rows<2, T>(a);
    case 3:
      return rows<3, T>(a);
    case 4:
      return rows<4, T>(a);
    default:
      return rows<0, T>(a);
  }
}

}  // namespace

extern "C" int FG_EXPORT(pixel_shuffle)(const fg_pixel_shuffle_args *args) {
  if (!args->batch || !args->channels || !args->height || !args->width) return FG_OK;
  switch (args->element_bytes) {
    case 2:
      return factors<uint16_t>(args);
    case 4:
      return factors<uint32_t>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
