// levels: scalar avx2 avx512 avx512_bf16 amx neon
// Attention of the newest tokens over a key-value cache, contiguous or paged: attention_few.h on a cache's rows.
#include "attention_few.h"

namespace {

int64_t length_of(const fg_attention_decode_args *d, int64_t batch) {
  int64_t at = batch * d->lengths_stride;
  int64_t n = d->lengths_dtype == FG_INT32 ? static_cast<const int32_t *>(d->lengths)[at]
                                           : static_cast<const int64_t *>(d->lengths)[at];
  return n < 0 ? 0 : n > d->most ? d->most : n;
}

const int32_t *table_of(const fg_attention_decode_args *d, int64_t batch) {
  return d->table ? static_cast<const int32_t *>(d->table) + batch * d->table_batch : nullptr;
}

// Whether every block that a sequence's keys lie in is one of the cache's.
bool blocks_exist(const fg_attention_decode_args *d, int64_t batch) {
  const int32_t *table = table_of(d, batch);
  for (int64_t i = 0; table && i * d->block < length_of(d, batch); ++i) {
    int32_t block = table[i * d->table_block];
    if (block < 0 || block >= d->blocks) return false;
  }
  return true;
}

template <class T>
int decode(const fg_attention_decode_args *d) {
  fg_attention_args a = {};
  a.batch = d->batch, a.heads = d->heads, a.kv_heads = d->kv_heads, a.queries = d->queries, a.dim = d->dim;
  a.q_head = d->q_head, a.q_row = d->q_row, a.k_row = d->k_row, a.v_row = d->v_row, a.out_row = d->out_row;
  a.causal = 1, a.scale = d->scale;
  const int64_t size = sizeof(T);
  return few<T>(&a, [&](int64_t batch, int64_t head) -> Head {
    int64_t kv = head / (d->heads / d->kv_heads), own = d->table ? 0 : batch, length = length_of(d, batch);
    Extras e;
    e.diagonal = length - d->queries, e.window = d->window, e.softcap = static_cast<float>(d->softcap);
    if (d->sinks) e.sink = element_at(d->sinks, d->sinks_dtype, head * d->sinks_stride);
    e.table = table_of(d, batch), e.table_step = d->table_block, e.block = d->block;
    e.k_block = d->k_block, e.v_block = d->v_block;
    return {&a, batch, head, length,
            static_cast<const char *>(d->q) + size * (batch * d->q_batch + head * d->q_head),
            static_cast<const char *>(d->k) + size * (own * d->k_block + kv * d->k_head),
            static_cast<const char *>(d->v) + size * (own * d->v_block + kv * d->v_head),
            static_cast<char *>(d->out) + size * (batch * d->out_batch + head * d->out_head), e};
  });
}

}  // namespace

extern "C" int FG_EXPORT(attention_decode)(const fg_attention_decode_args *d) {
  if (!d->batch || !d->heads || !d->queries || !d->dim) return FG_OK;
  if (d->dim > 256 || d->kv_heads < 1 || d->heads % d->kv_heads) return FG_BAD_ARGUMENT;
  for (int64_t batch = 0; batch < d->batch; ++batch)
    if (!blocks_exist(d, batch)) return FG_BAD_ARGUMENT;
  switch (d->dtype) {
    case FG_FLOAT32: return decode<float>(d);
    case FG_BFLOAT16: return decode<bf16>(d);
    case FG_FLOAT16: return decode<fp16>(d);
    default: return FG_BAD_ARGUMENT;
  }
}
