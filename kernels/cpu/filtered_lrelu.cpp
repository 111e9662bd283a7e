// levels: scalar avx2 avx512 avx512_bf16 neon
// Bias, upsampling, leaky ReLU, clamp, downsampling; see fir.h.
//
// The second resampling asks the first for one upsampled row at a time: of the upsampled picture there are never more
// rows than the second filter is high.  A work item is a strip of rows and a window of columns of one plane.
#include <cstdlib>

#include "fir.h"
#include "threads.h"

namespace {

constexpr int64_t kStrip = 64;      // rows of outputs of an item
constexpr int64_t kWindow = 2048;   // floats of a row of outputs of an item, about

struct Lrelu {
  vf slope, gain, clamp;
  inline __attribute__((always_inline)) vf operator()(vf x) const {
    vf y = mul(select_gt(x, set1(0.0f), x, mul(x, slope)), gain);
    return min(clamp, max(sub(set1(0.0f), clamp), y));
  }
};

template <class T>
int strip(const fg_filtered_lrelu_args *a, const Filter &rise, const Filter &fall, const float *biases, int64_t plane,
          int64_t o0, int64_t o1, int64_t c0, int64_t c1) {
  const Axis ux = {a->size_x, a->mid_x, a->up, 1, a->before_x, a->up_taps_x};
  const Axis uy = {a->size_y, a->mid_y, a->up, 1, a->before_y, a->up_taps_y};
  const Axis dx = {a->mid_x, a->out_x, 1, a->down, 0, a->down_taps_x};
  const Axis dy = {a->mid_y, a->out_y, 1, a->down, 0, a->down_taps_y};
  Stage high, low;
  const int64_t floats = low.plan(dx, dy, fall, a->pixel, c0, c1);
  const int64_t q0 = low.from() / a->up, end = least(low.from() + low.count(), a->mid_x);
  const int64_t more = high.plan(ux, uy, rise, a->pixel, q0, (end + a->up - 1) / a->up), first = q0 * a->up;
  const int64_t line = (end - first) * a->pixel + kSlack, spare = high.width() + kSlack;
  float *memory = static_cast<float *>(fg_scratch(static_cast<size_t>(floats + more + line + spare) * sizeof(float)));
  if (!memory) return FG_NO_MEMORY;
  low.use(memory);
  high.use(memory + floats);
  float *between = memory + floats + more;
  const int64_t channel = plane % a->channels;
  const T *in = static_cast<const T *>(a->x) + plane / a->channels * a->x_batch + channel * a->x_channel;
  T *out = static_cast<T *>(a->out) + (plane * a->out_y * a->out_x + c0) * a->pixel;
  const float *bias = a->bias ? biases + channel : nullptr;
  const Lrelu lrelu = {set1(static_cast<float>(a->slope)), set1(static_cast<float>(a->gain)), set1(static_cast<float>(a->clamp))};
  auto read = [&](int64_t row, float *streams) {
    fill(in + row * a->x_row, a->size_x, high.from(), high.count(), 1, a->pixel, high.pitch(), bias, streams);
  };
  auto upsampled = [&](int64_t row, float *streams) {
    high.row(row, read);
    emit(high, a->up, a->pixel, end - first, between + line, between, lrelu);
    fill(between, end - first, low.from() - first, low.count(), a->down, a->pixel, low.pitch(), static_cast<const float *>(nullptr), streams);
  };
  for (int64_t o = o0; o < o1; ++o) {
    low.row(o, upsampled);
    emit(low, 1, a->pixel, c1 - c0, between, out + o * a->out_x * a->pixel);
  }
  return FG_OK;
}

template <class T>
int resample(const fg_filtered_lrelu_args *a, const Filter &rise, const Filter &fall, const float *biases) {
  const int64_t window = most(1, least(a->out_x, kWindow / a->pixel)), windows = (a->out_x + window - 1) / window;
  const int64_t strips = (a->out_y + kStrip - 1) / kStrip;
  return parallel_for(a->batch * a->channels * strips * windows, 1, [&](int64_t item) {
    const int64_t c0 = item % windows * window, o0 = item / windows % strips * kStrip;
    return strip<T>(a, rise, fall, biases, item / windows / strips, o0, least(o0 + kStrip, a->out_y), c0,
                    least(c0 + window, a->out_x));
  });
}

}  // namespace

extern "C" int FG_EXPORT(filtered_lrelu)(const fg_filtered_lrelu_args *a) {
  if (!a->batch || !a->channels || !a->pixel) return FG_OK;
  const int64_t channels = a->channels * a->pixel;
  float *biases = static_cast<float *>(std::malloc(static_cast<size_t>(channels) * sizeof(float)));
  if (!biases) return FG_NO_MEMORY;
  for (int64_t c = 0; c < channels; ++c) biases[c] = parameter(a->bias, a->bias_dtype, c, 0.0f);
  float taps[4 * kMostTaps];
  const Filter rise = read_filter(a->up_filter, a->up_dtype, a->up_separable, a->up_filter_y, a->up_filter_x,
                                  a->up_taps_y, a->up_taps_x, a->flip, static_cast<float>(a->up * a->up),
                                  fewer_apart(a->up_taps_y, a->up_taps_x, a->up, 1), taps);
  const Filter fall = read_filter(a->down_filter, a->down_dtype, a->down_separable, a->down_filter_y, a->down_filter_x,
                                  a->down_taps_y, a->down_taps_x, a->flip, 1.0f,
                                  fewer_apart(a->down_taps_y, a->down_taps_x, 1, a->down), taps + 2 * kMostTaps);
  int code = FG_BAD_ARGUMENT;
  if (a->dtype == FG_FLOAT32) code = resample<float>(a, rise, fall, biases);
  if (a->dtype == FG_BFLOAT16) code = resample<bf16>(a, rise, fall, biases);
  if (a->dtype == FG_FLOAT16) code = resample<fp16>(a, rise, fall, biases);
  std::free(biases);
  return code;
}
