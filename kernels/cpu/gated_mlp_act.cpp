// levels: scalar avx2 avx512 avx512_bf16 neon
// up * act(gate): elementwise, in pieces that stay in the first-level cache.
#include "abi.h"
#include "gelu.h"
#include "stream.h"

namespace {

constexpr int64_t kAhead = 1 << 13;  // bytes from what is computed to what is prefetched, where memory is read
constexpr int64_t kItem = 1 << 13;  // elements of the output that one work item makes, about

enum Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kSigmoid, kQuickGelu };

template <class T, int64_t kActivation>
FG_INLINE vf activated(vf g) {
  if constexpr (kActivation == kSilu) return silu<T>(g);
  if constexpr (kActivation == kGelu) return gelu<T>(g);
  if constexpr (kActivation == kGeluTanh) return gelu_tanh<T>(g);
  if constexpr (kActivation == kRelu) return max(set1(0.0f), g);
  if constexpr (kActivation == kSigmoid) return logistic2<T>(mul(g, set1(-1.44269504088896341f)));
  if constexpr (kActivation == kQuickGelu) return mul(g, logistic2<T>(mul(g, set1(-2.4554669f))));  // 1.702 log2(e)
}

template <class T, int64_t kActivation>
FG_INLINE void run_of(const T *gate, const T *up, T *out, int64_t n, int64_t ahead) {
  int64_t i = 0;
  for (; ahead && i + 2 * W <= n; i += 2 * W) {
    __builtin_prefetch(gate + i + ahead);
    __builtin_prefetch(up + i + ahead);
    if (sizeof(T) == 4) __builtin_prefetch(gate + i + ahead + W);
    if (sizeof(T) == 4) __builtin_prefetch(up + i + ahead + W);
    vf y = mul(activated<T, kActivation>(load(gate + i)), load(up + i));
    vf z = mul(activated<T, kActivation>(load(gate + i + W)), load(up + i + W));
    store(out + i, y);
    store(out + i + W, z);
  }
  for (; i + W <= n; i += W) store(out + i, mul(activated<T, kActivation>(load(gate + i)), load(up + i)));
  if (i < n) {
    int rest = static_cast<int>(n - i);
    store_n(out + i, mul(activated<T, kActivation>(load_n(gate + i, rest)), load_n(up + i, rest)), rest);
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
      pieces(out + r * width + from, n, streaming,
             [&](int64_t i, int64_t m, T *to) { run_of<T, kActivation>(gate + i, up + i, to, m, ahead); });
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
