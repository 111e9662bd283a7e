// levels: scalar avx2 avx512 avx512_bf16 neon
// A 3x3 convolution by Winograd's algorithm, with bias and residual; see winograd.h.
#include "winograd_conv2d.h"

extern "C" int FG_EXPORT(winograd_conv2d)(const fg_winograd_conv2d_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
#if defined(FG_HAS_AVX512_BF16)
  if (a->dtype == FG_BFLOAT16) return convolve_pairs(a, Unseen());
#endif
  if (a->dtype != FG_FLOAT32 || a->doubled) return FG_BAD_ARGUMENT;
  return convolve_floats(a, [](int64_t, int64_t, int64_t, int64_t, const vf *) {});
}
