// levels: scalar avx2 avx512 avx512_bf16 amx neon
// packed_conv2d, and the moments of what it writes.
#include <algorithm>

#include "packed_conv2d.h"

extern "C" int FG_EXPORT(packed_conv2d_moments)(const fg_packed_conv2d_moments_args *a) {
  if (!a->height || !a->width) std::fill_n(static_cast<double *>(a->moments), a->batch * 2 * a->outputs, __builtin_nan(""));
  return packed_convolution(a);
}
