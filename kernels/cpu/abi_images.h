// The structs of ops on images: shuffles, convolutions, StyleGAN's; a part of abi.h, whose head says how they are read.
#pragma once
#include <cstdint>

// Pixel shuffle between (batch, channels factor^2, height, width) and (batch, channels, height factor, width factor); the
// first is x, or out where `down`.  out is dense, in x's memory order.
struct fg_pixel_shuffle_args {
  const void *x;
  void *out;
  int64_t element_bytes, channels_last, down, factor;
  int64_t batch, channels, height, width;
  int64_t x_batch, x_channel, x_row, x_column;  // strides; x_column is 1, or where channels_last x_channel
};

// 2x2 convolutions of (batch, inputs, height, width), one for each of the four phases of (batch, outputs, 2 height,
// 2 width); see upsample2x_conv.cpp.
struct fg_upsample2x_conv_args {
  const void *x, *filters, *bias;  // filters are dense, of x's dtype; bias may be null
  void *out;
  int64_t dtype, bias_dtype;
  int64_t batch, inputs, outputs, height, width;
  int64_t x_batch, x_channel, x_row, x_column;  // strides; x_channel or x_column is 1
  int64_t out_batch, out_channel, out_row, out_column;
};

// A 3x3 convolution with padding 1 of (batch, height, width, inputs), or `doubled` of (batch, height / 2, width / 2,
// inputs) with each pixel 2 x 2 times, + bias + residual; see winograd_conv2d.cpp.
struct fg_winograd_conv2d_args {
  const void *x, *filters, *bias, *residual;  // dense, channels innermost; bias and residual may be null
  void *out;
  int64_t dtype, bias_dtype;  // float32 and the filters of 6 x 6 points, or bfloat16 and taps
  int64_t batch, inputs, outputs, height, width;
  int64_t doubled;  // in bfloat16 alone
  int64_t taps;     // those of float32 are taps (winograd_taps.py): outputs of a tile's side, 2 or 4; else 0
  void *moments;    // null: none; doubles (batch, 2, outputs): each channel's mean and variance
};
struct fg_winograd_conv2d_moments_args : fg_winograd_conv2d_args {};

// A weight (outputs, inputs, 3, 3) in bfloat16, as products of pairs read it; see conv_taps.cpp.
struct fg_conv_taps_args {
  const void *weight;  // float32 or bfloat16
  void *out;
  int64_t dtype, inputs, outputs;
  int64_t doubled;  // whether as the four phases of 2x2 that it is to a doubled image
};

// 3x3, padding 1, on channels-last images of bfloat16, `stride` 1 or 2, or `doubled` with each pixel 2 x 2 times; taps of
// conv_taps.cpp; see packed_conv2d.cpp.
struct fg_packed_conv2d_args {
  const void *x, *taps;
  const void *bias, *residual;  // null: none; bias (outputs,), residual laid out as out is
  void *out;
  int64_t dtype, bias_dtype;
  int64_t batch, inputs, outputs, height, width;  // of x
  int64_t stride, doubled;
  void *moments;  // null: none; doubles (batch, 2, outputs): each channel's mean and variance
};
struct fg_packed_conv2d_moments_args : fg_packed_conv2d_args {};

// A weight (outputs, inputs, 3, 3) of int8 codes as products of words read it; see conv_taps_int8.cpp.
struct fg_conv_taps_int8_args {
  const void *weight;
  void *taps, *sums;  // int8, int32
  int64_t inputs, outputs;
};

// As fg_packed_conv2d_args, in int8, at stride 1 of x or, where `doubled`, of it with each pixel 2 x 2 times.
struct fg_packed_conv2d_int8_args {
  const void *x, *taps, *sums, *scale;  // conv_taps_int8's, and float32 (outputs,)
  const void *bias, *residual;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t batch, inputs, outputs, height, width;  // of x
  int64_t stride, doubled;
};

// The float32 filters of a weight (outputs, inputs, 3, 3); see winograd_filters.cpp.
struct fg_winograd_filters_args {
  const void *weight;
  void *out;
  int64_t dtype, inputs, outputs, transposed;
};

// As fg_winograd_conv2d_args, in int8; see winograd_int8.h.
struct fg_winograd_conv2d_int8_args {
  const void *x, *filters, *scale;  // dense, channels innermost; winograd_int8_filters's
  const void *bias, *residual;      // or null; residual as x
  void *out;
  int64_t dtype, bias_dtype;  // bias: x's or float32
  int64_t batch, inputs, outputs, height, width, doubled;
};

// Its filters of a weight (outputs, inputs, 3, 3) of int8 codes, `scale` (outputs,); see winograd_int8_filters.cpp.
struct fg_winograd_int8_filters_args {
  const void *weight, *scale;
  void *filters, *out_scale;
  int64_t inputs, outputs;
};

// A modulated 3x3 convolution with padding 1 of (batch, height, width, inputs), where `taps` is not null of that at twice
// the size, with norm, noise, bias and activation; see winograd_modulated_conv2d.cpp.
struct fg_winograd_modulated_conv2d_args {
  const void *x, *styles;          // dense, channels innermost; (batch, inputs)
  const void *filters, *squares;   // see kernels/; float32 (outputs, inputs): each pair's sum of squared weights
  const void *taps, *noise, *bias; // or null; (4, 4), (batch or 1, out height, out width), (outputs,)
  void *out;
  int64_t dtype, styles_dtype, taps_dtype, noise_dtype, bias_dtype;
  int64_t batch, inputs, outputs, height, width;  // of x
  int64_t noise_batch;                            // a sample's elements of noise, 0 where all share one
  int64_t pairs;                                  // whether the filters are bfloat16 pairs; float32 otherwise
  int64_t act;
  double alpha, gain, clamp, eps;
};

// clamp(gain act(x + bias)) of outer x channels x inner elements; out is dense in that order; see bias_act.cpp.
struct fg_bias_act_args {
  const void *x, *bias;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t outer, channels, inner;
  int64_t x_outer, x_channel;  // strides; the innermost axis that is not of size 1 has stride 1
  int64_t act;
  double alpha, gain, clamp;
};

// Resampling of planes of rows of pixels; see fir.h.  A pixel is one element, or the channels where they are innermost.
struct fg_upfirdn2d_args {
  const void *x, *filter;  // filter: null, (taps) or (taps y, taps x)
  void *out;
  int64_t dtype, filter_dtype, separable, filter_y, filter_x;  // strides of the filter
  int64_t batch, channels, pixel;                             // planes: batch x channels, each with `pixel` channels
  int64_t size_x, out_x, up_x, down_x, before_x, taps_x;
  int64_t size_y, out_y, up_y, down_y, before_y, taps_y;
  int64_t x_batch, x_channel, x_row;
  int64_t flip;
  double gain;
};

// Bias, upsampling, leaky ReLU, clamp and downsampling; see filtered_lrelu.cpp.  `mid`: the sizes between the two.
struct fg_filtered_lrelu_args {
  const void *x, *up_filter, *down_filter, *bias;
  void *out;
  int64_t dtype, up_dtype, down_dtype, bias_dtype;
  int64_t up_separable, up_filter_y, up_filter_x, down_separable, down_filter_y, down_filter_x;
  int64_t batch, channels, pixel;
  int64_t size_x, mid_x, out_x, before_x, up_taps_x, down_taps_x;
  int64_t size_y, mid_y, out_y, before_y, up_taps_y, down_taps_y;
  int64_t up, down;
  int64_t x_batch, x_channel, x_row;
  int64_t flip;
  double gain, slope, clamp;
};

// A convolution by weights scaled for each sample; see modulated_conv2d.cpp.  Weights and styles are dense.
struct fg_modulated_conv2d_args {
  const void *x, *weight, *styles, *noise, *bias;  // noise: (batch or 1, 1, out_y, out_x)
  void *out;
  void *scaled;         // null, or all that is made: x times the styles, (batch, height, width, channels)
  const void *product;  // null, or the convolution of that, (batch, out_y, out_x, outputs): what follows it is done
  int64_t dtype, weight_dtype, styles_dtype, noise_dtype, bias_dtype;
  int64_t batch, channels, outputs, height, width, taps_y, taps_x, up, pad_y, pad_x, out_y, out_x;
  int64_t x_batch, x_channel, x_row, x_col, noise_batch;
  int64_t channels_last;  // of out
  int64_t demodulate, act;
  double alpha, gain, clamp, eps;
};
