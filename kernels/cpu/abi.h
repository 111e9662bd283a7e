// Every struct and every function that crosses from Python into the kernel library.
//
// A kernel is `int fg_<op>_<level>(const fg_<op>_args*)`, one per instruction set it was compiled for; it returns
// FG_OK or one of the codes below and never throws.  Strides count elements, not bytes.  The launcher beside each
// kernel mirrors its struct with ctypes; tests/test_library.py compares the two field by field.
// Fields are 8 bytes wide (pointer, int64_t or double): the layout then has no padding to get wrong.
#pragma once
#include <cstddef>
#include <cstdint>

enum fg_status : int { FG_OK = 0, FG_BAD_ARGUMENT = 1, FG_NO_MEMORY = 2 };

// Element types, as `int64_t` fields of the structs.
enum fg_dtype : int64_t {
  FG_FLOAT32 = 0, FG_BFLOAT16 = 1, FG_FLOAT16 = 2, FG_BOOL = 3, FG_INT32 = 4, FG_INT64 = 5, FG_INT8 = 6
};

#include "abi_images.h"

// softmax(scale q k^T + mask) v over (batch, heads, length, dim); see attention.cpp.
struct fg_attention_args {
  const void *q, *k, *v;
  const void *mask;         // null: none; FG_BOOL: true attends; float: added to the scaled scores
  const void *key_lengths;  // null: none; (batch,): keys at and past this index are neither attended nor read
  void *out;
  int64_t dtype, mask_dtype, lengths_dtype;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  int64_t q_batch, q_head, q_row;  // strides; the dim axis has stride 1
  int64_t k_batch, k_head, k_row;
  int64_t v_batch, v_head, v_row;
  int64_t out_batch, out_head, out_row;
  int64_t mask_batch, mask_head, mask_row, mask_key;  // 0 where the mask is broadcast
  int64_t lengths_stride;
  int64_t causal;  // key j is open to query i where j <= i
  double scale;
};
struct fg_attention_int8_args : fg_attention_args {};  // of q, k, v and scale

// Attention of the newest `queries` tokens of each sequence over its key-value cache; see attention_decode.cpp.
struct fg_attention_decode_args {
  const void *q, *k, *v;
  const void *lengths;  // (batch,): the keys of each sequence
  const void *table;    // null: block b is sequence b's; (batch, ...) int32: the blocks of each sequence in order
  const void *sinks;    // null: none; (heads,): a logit more in each head's softmax
  void *out;
  int64_t dtype, lengths_dtype, sinks_dtype;
  int64_t batch, heads, kv_heads, queries, dim;
  int64_t blocks, block, most;  // of the cache: blocks, keys of each, keys that a sequence can have
  int64_t q_batch, q_head, q_row;
  int64_t k_block, k_head, k_row;
  int64_t v_block, v_head, v_row;
  int64_t out_batch, out_head, out_row;
  int64_t table_batch, table_block, lengths_stride, sinks_stride;
  int64_t window;  // 0: none; else a query attends no key so far before it
  double scale, softcap;
};

// Attention of packed sequences, rows cu_q[s] to cu_q[s + 1] of q over cu_k[s] to cu_k[s + 1] of k and v; see
// attention_varlen.cpp.
struct fg_attention_varlen_args {
  const void *q, *k, *v, *cu_q, *cu_k, *sinks;
  void *out;
  int64_t dtype, sinks_dtype;
  int64_t sequences, queries, keys, heads, kv_heads, dim;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;
  int64_t cu_q_stride, cu_k_stride, sinks_stride;
  int64_t causal, window;
  double scale, softcap;
};

// New rows (batch, heads, rows, dim) of k and v written into the cache; see kv_append.cpp.
struct fg_kv_append_args {
  const void *k, *v, *positions, *table;
  void *k_cache, *v_cache;
  int64_t size, positions_dtype;  // bytes of an element
  int64_t batch, heads, rows, dim, blocks, block, most;
  int64_t k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim;
  int64_t k_cache_block, k_cache_head, k_cache_row, k_cache_dim, v_cache_block, v_cache_head, v_cache_row, v_cache_dim;
  int64_t positions_stride, table_batch, table_block;
};

// Normalization and sampling.  Weight and bias may be null; each has its own dtype: float32 or x's.

// Group normalization of (batch, channels, pixels), then SiLU where `silu`; see group_norm.h.
struct fg_group_norm_args {
  const void *x;
  const void *other;               // null: none; else what is normalized is joined: x + other, or both, channel by channel
  void *joined;                    // (batch, channels, pixels), dense
  const void *weight, *bias;
  const void *add, *scale, *shift;  // null: none; (batch, channels), the channels' stride is 1
  const void *moments;              // null: none; doubles (batch, 2, channels): each channel's mean and variance
  void *out;
  int64_t dtype, weight_dtype, bias_dtype, add_dtype, scale_dtype, shift_dtype;
  int64_t batch, channels, groups, pixels;
  int64_t split, concat;  // the channels of x; whether other's follow them
  int64_t x_batch, other_batch, add_batch, scale_batch, shift_batch;  // strides; each sample is dense, and so is out
  int64_t channels_last, silu;
  double eps;
};
struct fg_join_group_norm_args : fg_group_norm_args {};

// Layer or RMS normalization of outer x inner rows of `width` elements; see row_norm.h.  out and sum are dense.
struct fg_row_norm_args {
  const void *x;
  const void *branch, *gate;   // null: none; else the norm is that of sum = x + gate * branch
  const void *weight, *bias;   // (width,); offset is added to the weight
  const void *scale, *shift;   // null: none; else the result is y * (1 + scale) + shift
  void *out, *sum;
  int64_t dtype, weight_dtype, bias_dtype;
  int64_t modulation_dtype;  // of gate, scale and shift: float32 or x's
  int64_t outer, inner, width;
  int64_t x_outer, x_inner, branch_outer, branch_inner;  // strides, 0 where broadcast
  int64_t gate_outer, gate_inner, scale_outer, scale_inner, shift_outer, shift_inner;
  int64_t rms;  // of add_norm: which norm
  double eps, offset;
};
struct fg_layer_norm_args : fg_row_norm_args {};
struct fg_rms_norm_args : fg_row_norm_args {};
struct fg_add_norm_args : fg_row_norm_args {};

// act(x W^T + bias + residual) * multiplier for few rows of x; see linear.cpp.  x has outer x inner rows of `width`; bias,
// residual and multiplier may be null, all but x are dense; activation: quantized.h.
struct fg_linear_args {
  const void *x, *weight, *bias, *residual, *multiplier;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

// A weight (outputs, width), and a gate of its shape or null, in panels of bfloat16 or int8; see linear_panels.cpp.
struct fg_linear_panels_args {
  const void *weight, *gate;  // dense
  void *out;
  int64_t dtype, out_dtype, outputs, width;  // of float32 panels of float32 or bfloat16, else of its own dtype
};

// Linear layers of many rows by a weight in panels; see packed_linear.h.  All but x are dense, biases and residual may be
// null; of the gated one out_features counts the gates, too few to fill a last panel or not.
struct fg_packed_linear_args {
  const void *x, *panels, *bias, *residual;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

struct fg_packed_gated_linear_args {
  const void *x, *panels, *bias, *gate_bias;
  void *out;
  int64_t dtype, bias_dtype, gate_bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

// The same of int8 panels, x quantized row by row, scales (out_features,); see packed_int8.h.
struct fg_packed_linear_int8_args {
  const void *x, *panels, *scale, *bias, *residual;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

struct fg_packed_gated_linear_int8_args {
  const void *x, *panels, *scale, *gate_scale, *bias, *gate_bias;
  void *out;
  int64_t dtype, bias_dtype, gate_bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

// Linear layers on quantized weights; see linear_int4.py and linear_int8.py of kernels/.  x has outer x inner rows of
// `width`, bias, residual and zeros may be null, out and residual are dense; activation: quantized.h.
struct fg_linear_int4_args {
  const void *x, *weight, *scales, *zeros, *bias, *residual;
  void *out;
  int64_t dtype, scale_dtype, bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, groups, group, activation;
  int64_t quantize;  // x to int8, by groups
};

struct fg_linear_int8_args {
  const void *x, *weight, *scale, *bias, *residual;
  void *out;
  int64_t dtype, bias_dtype;
  int64_t outer, inner, width, x_outer, x_inner;
  int64_t out_features, activation;
};

// Images of `elements` each to uint8 (batch, elements), with a scale and a zero point for each; see quantize_uint8.cpp.
struct fg_quantize_uint8_args {
  const void *x;
  void *codes, *scale, *zero;  // uint8, float32, int64
  int64_t dtype;
  int64_t batch, elements;
};

// Normal noise (batch, count) of (seed, step, sample, element); see normal.h.
struct fg_noise_normal_args {
  const void *seeds;  // (batch,) int64
  void *out;          // (batch, count) float32
  const void *table;  // kernels/noise_normal.py's, coefficient-major
  int64_t batch, count, seeds_stride, step, sample;
};

// One sampler step; see kernels/sampler_step.py.  All tensors are contiguous, float32 but for out and input.
struct fg_sampler_step_args {
  const void *x, *out, *row;
  void *history;
  const void *seeds, *guidance, *mask, *known, *table;
  void *next, *input, *denoised;
  int64_t dtype;  // of out and input
  int64_t batch, count, guided;
  int64_t thresholded, rank;  // the quantile lies `part` of the way from the value of that rank to the next
  double rescale, part;
};

// One token a row; see kernels/sample_token.py.  Optional tensors are null; integers are int64, parameters float32.
struct fg_sample_token_args {
  const void *logits, *seeds, *positions, *requests, *temperature, *top_k, *top_p, *min_p, *typical_p;
  const void *history, *history_lengths, *prompt_lengths, *repetition, *frequency, *presence;
  const void *bias, *bias_ids, *bias_values, *mask;
  void *token, *logprob, *top_tokens, *top_logprobs;
  int64_t dtype, mask_dtype;  // of logits; FG_BOOL, or FG_INT32 for packed bits
  int64_t batch, vocabulary, length, pairs, top, model;
  int64_t logits_row, bias_row, pairs_row, mask_row;  // strides; 0 where all rows share one
};

// up * act(gate) over three loops of rows and `width` neighbours; see gated_mlp_act.cpp.
struct fg_gated_mlp_act_args {
  const void *x, *up;  // up null: both lie in x
  void *out;           // dense, in the order of the loops
  int64_t dtype, activation;
  int64_t n0, n1, n2, width;
  int64_t gate_0, gate_1, gate_2, gate_start;  // strides, and where the gate starts in x
  int64_t up_0, up_1, up_2, up_start;          // in up, or in x
};

// Rotary embedding: two loops over table rows, within which `repeat` rows of x take the same one; see rotate.h.
struct fg_rope_args {
  const void *x, *cos, *sin;
  const void *positions;  // null: none; else which of the `entries` table rows
  void *out;
  int64_t dtype, table_dtype, positions_dtype;
  int64_t rows_0, rows_1, repeat, width;
  int64_t x_0, x_1, x_repeat;        // strides; the last axis of x and out has stride 1
  int64_t out_0, out_1, out_repeat;
  int64_t table_0, table_1, table_step, entries;
  int64_t positions_0, positions_1;
  int64_t half, full, interleaved;  // pairs that turn; whether the tables have an entry for each feature
};

// RMS norm over `width`, then as fg_rope_args.
struct fg_qk_norm_rope_args {
  const void *x, *weight, *cos, *sin;  // weight null: ones
  const void *positions;
  void *out;
  int64_t dtype, weight_dtype, table_dtype, positions_dtype;
  int64_t rows_0, rows_1, repeat, width;
  int64_t x_0, x_1, x_repeat;
  int64_t out_0, out_1, out_repeat;
  int64_t table_0, table_1, table_step, entries;
  int64_t positions_0, positions_1;
  int64_t half, full, interleaved;
  double eps;
};

// Every op with a struct above; pool.cpp gives their sizes out.
#define FG_OPS(X)     \
  X(add_norm)         \
  X(attention)        \
  X(attention_decode) \
  X(attention_int8) X(attention_varlen) \
  X(bias_act)         \
  X(conv_taps) X(conv_taps_int8) \
  X(filtered_lrelu)   \
  X(gated_mlp_act)    \
  X(group_norm)       \
  X(join_group_norm)  \
  X(kv_append)        \
  X(layer_norm)       \
  X(linear)           \
  X(linear_int4)      \
  X(linear_int8) X(linear_panels) \
  X(modulated_conv2d) \
  X(noise_normal)     \
  X(packed_conv2d) X(packed_conv2d_moments) X(packed_conv2d_int8) \
  X(packed_gated_linear) X(packed_gated_linear_int8) \
  X(packed_linear) X(packed_linear_int8) \
  X(pixel_shuffle)    \
  X(qk_norm_rope)     \
  X(quantize_uint8)   \
  X(rms_norm)         \
  X(rope)             \
  X(sample_token)     \
  X(sampler_step)     \
  X(upfirdn2d)        \
  X(upsample2x_conv)  \
  X(winograd_conv2d)  \
  X(winograd_conv2d_int8) \
  X(winograd_conv2d_moments) \
  X(winograd_filters) X(winograd_int8_filters) \
  X(winograd_modulated_conv2d)

// One bound kernel; `fg_run` runs a list of them in order and stops at the first that fails.
struct fg_call {
  int (*function)(const void *);
  const void *args;
};
