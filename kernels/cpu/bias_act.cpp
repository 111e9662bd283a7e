// levels: scalar avx2 avx512 avx512_bf16 neon
// Bias, activation, gain and clamp in one pass.
//
// The output is dense in (outer, channels, inner).  Where the channels are innermost, or inner is short, a row's biases
// are laid out over it beforehand; a short row is taken several times in one, so that vectors are full.
#include "abi.h"
#include "activation.h"
#include "moments.h"
#include "stream.h"

namespace {

constexpr int64_t kItem = 1 << 16;   // bytes of x that one work item takes, about
constexpr int64_t kPeriod = 4096;    // elements of a row of biases laid out beforehand, at the most about

template <int kAct, class T, class Bias>
FG_INLINE void run_of(const T *x, T *out, int64_t n, const Bias &bias, const Finish &f, bool streaming) {
  leaving(out, streaming, [&](auto past) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      vf a = add(load(x + i), bias(i)), b = add(load(x + i + W), bias(i + W));
      leave(out + i, finished<kAct, T>(a, f), past);
      leave(out + i + W, finished<kAct, T>(b, f), past);
    }
    for (; i < n; i += W) {
      int rest = n - i < W ? static_cast<int>(n - i) : W;
      store_n(out + i, finished<kAct, T>(add(load_n(x + i, rest), bias(i)), f), rest);
    }
  });
  if (streaming) streamed();
}

// Rows of `inner` elements with one bias each.
template <int kAct, class T>
int long_rows(const fg_bias_act_args *a, const Finish &f) {
  const int64_t rows = a->outer * a->channels, inner = a->inner, most = kItem / static_cast<int64_t>(sizeof(T));
  const int64_t parts = (inner + most - 1) / most, each = inner < most ? most / inner : 1;  // of a row; rows an item
  const int64_t items = parts > 1 ? rows * parts : (rows + each - 1) / each;
  const bool streaming = streams(2 * rows * inner * static_cast<int64_t>(sizeof(T)));
  return parallel_for(items, 1, [&](int64_t item) {
    const int64_t first = parts > 1 ? item / parts : item * each;
    const int64_t last = parts > 1 ? first + 1 : first + each < rows ? first + each : rows;
    const int64_t from = parts > 1 ? item % parts * most : 0;
    const int64_t to = parts > 1 && from + most < inner ? from + most : inner;
    for (int64_t r = first; r < last; ++r) {
      const int64_t o = r / a->channels, c = r % a->channels;
      const T *x = static_cast<const T *>(a->x) + o * a->x_outer + c * a->x_channel;
      const vf b = set1(parameter(a->bias, a->bias_dtype, c, 0.0f));
      T *out = static_cast<T *>(a->out) + r * inner;
      run_of<kAct>(x + from, out + from, to - from, [&](int64_t) { return b; }, f, streaming);
    }
    return 0;
  });
}

// Samples of channels x inner dense elements, `times` of them a row, with their biases laid out.
template <int kAct, class T>
int laid_out(const fg_bias_act_args *a, const Finish &f) {
  const int64_t sample = a->channels * a->inner;
  const bool dense = a->outer == 1 || a->x_outer == sample;
  const int64_t times = dense && sample < kPeriod ? (kPeriod + sample - 1) / sample : 1, row = times * sample;
  float *bias = static_cast<float *>(fg_scratch(static_cast<size_t>(row + W) * sizeof(float)));
  if (!bias) return FG_NO_MEMORY;
  for (int64_t i = 0; i < row; ++i) {
    bias[i] = i < sample ? parameter(a->bias, a->bias_dtype, i / a->inner, 0.0f) : bias[i - sample];
  }
  for (int64_t i = row; i < row + W; ++i) bias[i] = 0.0f;
  const int64_t rows = (a->outer + times - 1) / times, most = kItem / static_cast<int64_t>(sizeof(T));
  const int64_t each = row < most ? most / row : 1;
  const bool streaming = streams(2 * a->outer * sample * static_cast<int64_t>(sizeof(T)));
  return parallel_for((rows + each - 1) / each, 1, [&](int64_t item) {
    for (int64_t r = item * each; r < (item + 1) * each && r < rows; ++r) {
      const int64_t left = (a->outer - r * times) * sample, n = left < row ? left : row;
      const T *x = static_cast<const T *>(a->x) + (dense ? r * row : r * a->x_outer);
      run_of<kAct>(x, static_cast<T *>(a->out) + r * row, n, [&](int64_t i) { return load(bias + i); }, f, streaming);
    }
    return 0;
  });
}

template <class T>
int dispatch(const fg_bias_act_args *a) {
  const Finish f = {static_cast<float>(a->alpha), static_cast<float>(a->gain), static_cast<float>(a->clamp)};
  const bool whole = a->inner == 1 || a->channels == 1 || a->x_channel == a->inner;  // samples are dense
  const bool brief = a->channels > 1 && whole && (a->inner == 1 || (a->inner < 8 * W && a->channels * a->inner <= kPeriod));
  return with_activation(a->act, [&](auto act) {
    return brief ? laid_out<decltype(act)::value, T>(a, f) : long_rows<decltype(act)::value, T>(a, f);
  });
}

}  // namespace

extern "C" int FG_EXPORT(bias_act)(const fg_bias_act_args *args) {
  if (!args->outer || !args->channels || !args->inner) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32:
      return dispatch<float>(args);
    case FG_BFLOAT16:
      return dispatch<bf16>(args);
    case FG_FLOAT16:
      return dispatch<fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
