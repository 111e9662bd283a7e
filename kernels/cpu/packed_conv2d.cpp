// levels: scalar avx2 avx512 avx512_bf16 amx neon
// A 3x3 convolution by packed taps; see packed_conv2d.h.
#include "packed_conv2d.h"

extern "C" int FG_EXPORT(packed_conv2d)(const fg_packed_conv2d_args *a) { return packed_convolution(a); }
