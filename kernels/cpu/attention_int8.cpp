// levels: scalar avx512_bf16 amx
// Attention in int8, by the arithmetic of kernels/attention_int8.py: the codes of each head's keys and values are made
// once, then queries go over them a tile at a time.
#include "attention_int8_sides.h"
#if defined(FG_LEVEL_AMX)
#include "attention_int8_amx.h"
#elif defined(FG_HAS_AVX512_BF16)
#include "attention_bf16.h"
#include "attention_int8_vnni.h"
#else
#include "attention_int8_plain.h"
#endif

namespace {

// Rows of a tensor from its batch and head on.
template <class P>
P rows_at(P from, int64_t size, int64_t batch, int64_t head, int64_t batch_step, int64_t head_step) {
  return from + size * (batch * batch_step + head * head_step);
}

template <class T>
int attention(const fg_attention_int8_args *a) {
  const int64_t size = sizeof(T), pairs = a->batch * a->kv_heads, tiles = (a->queries + SPAN - 1) / SPAN;
  const Sizes s(a->keys, a->dim);
  const SidesAt at(s);
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(pairs * at.one + 64)));
  if (!memory) return FG_NO_MEMORY;
  parallel_for(pairs * 2, 1 + 200000 / (s.keys * s.dim + 1), [&](int64_t item) {
    const int64_t pair = item / 2, batch = pair / a->kv_heads, head = pair % a->kv_heads;
    const char *k = static_cast<const char *>(a->k), *v = static_cast<const char *>(a->v);
    if (item % 2)
      pack_values(reinterpret_cast<const T *>(rows_at(v, size, batch, head, a->v_batch, a->v_head)), a->v_row, s,
                  at.of(memory, pair));
    else
      pack_keys(reinterpret_cast<const T *>(rows_at(k, size, batch, head, a->k_batch, a->k_head)), a->k_row, s,
                at.of(memory, pair));
    return 0;
  });
  const int shift = shift_of(s.dim);
  const float factor = static_cast<float>(a->scale * 1.4426950408889634 * static_cast<double>(1 << shift));
  const int64_t work = SPAN * (s.keys + 16) * s.dim;
  return parallel_for(a->batch * a->heads * tiles, 1 + 400000 / (work + 1), [&](int64_t item) {
    const int64_t pair = item / tiles, batch = pair / a->heads, head = pair % a->heads;
    Head h{a, batch, head, a->keys, rows_at(static_cast<const char *>(a->q), size, batch, head, a->q_batch, a->q_head),
           nullptr, nullptr, rows_at(static_cast<char *>(a->out), size, batch, head, a->out_batch, a->out_head), {}};
    const Sides sides = at.of(memory, batch * a->kv_heads + head / (a->heads / a->kv_heads));
    const int64_t q0 = item % tiles * SPAN;
#if defined(FG_HAS_AVX512_BF16)
    tile<T>(h, sides, s, shift, factor, q0);
#else
    for (int64_t i = q0; i < q0 + SPAN && i < a->queries; ++i) query<T>(h, sides, s, shift, factor, i);
#endif
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(attention_int8)(const fg_attention_int8_args *a) {
  if (!a->batch || !a->heads || !a->queries || !a->dim) return FG_OK;
  if (a->dim > MOST_DIM || a->kv_heads < 1 || a->heads % a->kv_heads) return FG_BAD_ARGUMENT;
  switch (a->dtype) {
    case FG_FLOAT32: return attention<float>(a);
    case FG_FLOAT16: return attention<fp16>(a);
    case FG_BFLOAT16: return attention<bf16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
