// levels: scalar avx2 avx512 avx512_bf16 neon
// A 3x3 convolution in int8 by Winograd's algorithm, of an image or of it doubled in size, with bias and residual; see winograd_int8.h.
#include "abi.h"
#include "winograd_int8.h"

namespace {

template <class T>
int convolve(const fg_winograd_conv2d_int8_args *a) {
  CodeWinograd<T> problem(a->x, a->filters, a->scale, a->batch, a->inputs, a->outputs, a->height, a->width);
  const T *residual = problem.beside = static_cast<const T *>(a->residual), *own = static_cast<const T *>(a->bias);
  const float *bias = static_cast<const float *>(a->bias);
  const bool wide = a->bias_dtype == FG_FLOAT32;
  T *out = static_cast<T *>(a->out);
  const int64_t outputs = a->outputs;
  const auto finish = [=](int64_t pixel, int64_t o, vf z) __attribute__((always_inline)) {
    const int64_t to = pixel * outputs + o;
    const int some = lanes_left(outputs - o);
    if (bias) z = add(z, wide ? load_n(bias + o, some) : load_n(own + o, some));
    if (residual) z = add(z, load_n(residual + to, some));
    store_n(out + to, z, some);
  };
  return a->doubled ? problem.template run<true>(finish) : problem.template run<false>(finish);
}

}  // namespace

extern "C" int FG_EXPORT(winograd_conv2d_int8)(const fg_winograd_conv2d_int8_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return convolve<float>(a);
    case FG_BFLOAT16: return convolve<bf16>(a);
    case FG_FLOAT16: return convolve<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
