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
enum fg_dtype : int64_t { FG_FLOAT32 = 0, FG_BFLOAT16 = 1, FG_FLOAT16 = 2, FG_BOOL = 3, FG_INT32 = 4, FG_INT64 = 5 };

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

// One bound kernel; `fg_run` runs a list of them in order and stops at the first that fails.
struct fg_call {
  int (*function)(const void *);
  const void *args;
};
