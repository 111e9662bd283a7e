// A 3x3 convolution by taps that lie in groups of outputs and pairs of inputs; see kernels/conv_taps.py.
#pragma once
#if defined(FG_LEVEL_AMX)
#include "packed_conv2d_amx.h"
#else
#include "packed_conv2d_plain.h"
#endif

namespace {

int packed_convolution(const fg_packed_conv2d_args *a) {
  if (!a->batch || !a->outputs || !a->height || !a->width) return FG_OK;
  return a->dtype == FG_BFLOAT16 ? convolve(a) : FG_BAD_ARGUMENT;
}

}  // namespace
