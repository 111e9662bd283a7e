// levels: scalar avx2 avx512 avx512_bf16 neon
// up * act(gate), elementwise.
#include "abi.h"
#include "gelu.h"
#include "stream.h"

namespace {

constexpr int64_t kAhead = 1 << 13;  // bytes from what is computed to what is prefetched, where memory is read
constexpr int kVectors = kAtOnce < 4 ? kAtOnce : 4;  // beside what the gates are multiplied by
constexpr int64_t kItem = 1 << 13;  // elements of the output that one work item makes, about

enum Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kSigmoid, kQuickGelu };

template <class T, int64_t kActivation, int N>
FG_INLINE void activate(vf (&g)[N]) {
  if constexpr (kActivation == kSilu) silu<T>(g);
  if constexpr (kActivation == kGelu) gelu<T>(g);
  if constexpr (kActivation == kGeluTanh) gelu_tanh<T>(g);
  if constexpr (kActivation == kRelu)
    for (vf &v : g) v = max(set1(0.0f), v);
  if constexpr (kActivation == kQuickGelu) quick_gelu<T>(g);
  if constexpr (kActivation == kSigmoid) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) g[v] = mul(g[v], set1(-1.44269504f));
    logistic2<T>(g);
  }
}

template <class T, int64_t kActivation, class Past>
FG_INLINE void run_of(const T *gate, const T *up, T *out, int64_t n, int64_t ahead, Past past) {
  int64_t i = 0;
  for (; i + kVectors * W <= n; i += kVectors * W) {
    for (int64_t line = 0; ahead && line < kVectors * W; line += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(gate + i + ahead + line);
      __builtin_prefetch(up + i + ahead + line);
    }
    vf y[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) y[v] = load(gate + i + v * W);
    activate<T, kActivation>(y);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) leave(out + i + v * W, mul(y[v], load(up + i + v * W)), past);
  }
  for (; i < n; i += W) {
    const int some = n - i < W ? static_cast<int>(n - i) : W;
    vf y[] = {load_n(gate + i, some)};
    activate<T, kActivation>(y);
    store_n(out + i, mul(y[0], load_n(up + i, some)), some);
  }
}

template <class T, int64_t kActivation>
int gated(const fg_gated_mlp_act_args *a) {
  const T *gates = static_cast<const T *>(a->x) + a->gate_start;
  const T *ups = static_cast<const T *>(a->up ? a->up : a->x) + a->up_start;
  T *out = static_cast<T *>(a->out);
  const int64_t rows = a->n0 * a->n1 * a->n2, width = a->width;
  const int64_t columns = width < kItem ? width : kItem, across = (width + columns - 1) / columns;
  const int64_t step = kItem / columns, down = (rows + step - 1) / step;
  const bool streaming = streams(3 * rows * width * static_cast<int64_t>(sizeof(T)));
  const int64_t ahead = streaming ? kAhead / static_cast<int64_t>(sizeof(T)) : 0;
  return parallel_for(down * across, 1, [&](int64_t item) {
    const int64_t from = item % across * columns, first = item / across * step;
    const int64_t n = width - from < columns ? width - from : columns;
    const int64_t last = first + step < rows ? first + step : rows;
    for (int64_t r = first; r < last; ++r) {
      const int64_t i2 = r % a->n2, i1 = r / a->n2 % a->n1, i0 = r / a->n2 / a->n1;
      const T *gate = gates + i0 * a->gate_0 + i1 * a->gate_1 + i2 * a->gate_2 + from;
      const T *up = ups + i0 * a->up_0 + i1 * a->up_1 + i2 * a->up_2 + from;
      T *to = out + r * width + from;
      leaving(to, streaming, [&](auto past) { run_of<T, kActivation>(gate, up, to, n, ahead, past); });
    }
    if (streaming) streamed();
    return 0;
  });
}

template <class T>
int by_activation(const fg_gated_mlp_act_args *a) {
  switch (a->activation) {
    case kSilu:
      return gated<T, kSilu>(a);
    case kGelu:
      return gated<T, kGelu>(a);
    case kGeluTanh:
      return gated<T, kGeluTanh>(a);
    case kRelu:
      return gated<T, kRelu>(a);
    case kSigmoid:
      return gated<T, kSigmoid>(a);
    case kQuickGelu:
      return gated<T, kQuickGelu>(a);
    default:
      return FG_BAD_ARGUMENT;
  }
}

}  // namespace

extern "C" int FG_EXPORT(gated_mlp_act)(const fg_gated_mlp_act_args *args) {
  if (!args->n0 || !args->n1 || !args->n2 || !args->width) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32:
      return by_activation<float>(args);
    case FG_BFLOAT16:
      return by_activation<bf16>(args);
    case FG_FLOAT16:
      return by_activation<fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
