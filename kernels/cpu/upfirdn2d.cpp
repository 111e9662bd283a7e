// levels: scalar avx2 avx512 avx512_bf16 neon
// Upsample, pad, filter, downsample; see fir.h.  A work item is a strip of rows and a window of columns of one plane.
#include "fir.h"
#include "stream.h"

namespace {

constexpr int64_t kStrip = 32;      // rows of outputs of an item
constexpr int64_t kWindow = 4096;   // floats of a phase of its rows, about

template <class T>
int resample(const fg_upfirdn2d_args *a, const Filter &filter) {
  const Axis x = {a->size_x, a->out_x, a->up_x, a->down_x, a->before_x, a->taps_x};
  const Axis y = {a->size_y, a->out_y, a->up_y, a->down_y, a->before_y, a->taps_y};
  const int64_t quarter = (x.out + x.up - 1) / x.up, window = most(1, least(quarter, kWindow / a->pixel));
  const int64_t windows = (quarter + window - 1) / window, strips = (y.out + kStrip - 1) / kStrip;
  const int64_t elements = a->channels * a->batch * a->pixel * (y.out * x.out + y.size * x.size);
  const bool streaming = streams(elements * static_cast<int64_t>(sizeof(T)));
  const int64_t small = a->channels * a->batch * y.out * x.out * a->pixel < (1 << 14) ? INT64_MAX : 1;
  return parallel_for(a->batch * a->channels * strips * windows, small, [&](int64_t item) {
    const int64_t q0 = item % windows * window, q1 = least(q0 + window, quarter), plane = item / windows / strips;
    const int64_t o0 = item / windows % strips * kStrip, o1 = least(o0 + kStrip, y.out);
    const int64_t columns = least(x.out, q1 * x.up) - q0 * x.up;
    Stage stage;
    const int64_t floats = stage.plan(x, y, filter, a->pixel, q0, q1), spare = stage.width() + kSlack;
    const int64_t line = streaming ? columns * a->pixel : 0;
    float *memory = static_cast<float *>(fg_scratch(static_cast<size_t>(floats + spare + line) * sizeof(float)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    stage.use(memory);
    const T *in = static_cast<const T *>(a->x) + plane / a->channels * a->x_batch + plane % a->channels * a->x_channel;
    T *out = static_cast<T *>(a->out) + plane * y.out * x.out * a->pixel + q0 * x.up * a->pixel;
    for (int64_t o = o0; o < o1; ++o) {
      stage.row(o, [&](int64_t row, float *streams) {
        fill(in + row * a->x_row, x.size, stage.from(), stage.count(), x.down, a->pixel, stage.pitch(), nullptr, streams);
      });
      T *row = out + o * x.out * a->pixel, *made = streaming ? reinterpret_cast<T *>(memory + floats + spare) : row;
      emit(stage, x.up, a->pixel, columns, memory + floats, made);
      if (streaming) stream<T>(made, row, columns * a->pixel);
    }
    if (streaming) streamed();
    return static_cast<int>(FG_OK);
  });
}

}  // namespace

extern "C" int FG_EXPORT(upfirdn2d)(const fg_upfirdn2d_args *a) {
  if (!a->batch || !a->channels || !a->pixel) return FG_OK;
  float taps[2 * kMostTaps];
  const bool alike = a->up_x == a->up_y && a->down_x == a->down_y;
  const bool apart = alike && fewer_apart(a->taps_y, a->taps_x, a->up_y, a->down_y);
  const Filter filter = read_filter(a->filter, a->filter_dtype, a->separable, a->filter_y, a->filter_x, a->taps_y,
                                    a->taps_x, a->flip, static_cast<float>(a->gain), apart, taps);
  switch (a->dtype) {
    case FG_FLOAT32:
      return resample<float>(a, filter);
    case FG_BFLOAT16:
      return resample<bf16>(a, filter);
    case FG_FLOAT16:
      return resample<fp16>(a, filter);
    default:
      return FG_BAD_ARGUMENT;
  }
}
