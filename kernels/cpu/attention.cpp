// levels: scalar avx2 avx512 avx512_bf16 amx neon
// Attention, softmax(scale q k^T + mask) v, in one pass over the keys with a running maximum and sum (Milakov &
// Gimelshein 2018; Dao et al. 2022).
//
// The work is split over batch x heads x chunks of queries.  A chunk packs each block of NB keys once and takes all its
// tiles of TQ queries over it; a few queries alone go another way (attention_few.h).  bfloat16 input runs on the CPU's
// bfloat16 products where the level has them, else in float32 (attention_float.h); float16 input always in float32,
// whose weights keep float16's eleven bits.
#include "attention_chunk.h"
#include "attention_few.h"

namespace {

int64_t key_count(const fg_attention_args *a, int64_t batch) {
  if (!a->key_lengths) return a->keys;
  int64_t at = batch * a->lengths_stride;
  int64_t n = a->lengths_dtype == FG_INT32 ? static_cast<const int32_t *>(a->key_lengths)[at]
                                           : static_cast<const int64_t *>(a->key_lengths)[at];
  return n < 0 ? 0 : n > a->keys ? a->keys : n;
}

template <class T>
Head head_at(const fg_attention_args *a, int64_t batch, int64_t head) {
  int64_t kv = head / (a->heads / a->kv_heads);
  const int64_t size = sizeof(T);
  return {a, batch, head, key_count(a, batch),
          static_cast<const char *>(a->q) + size * (batch * a->q_batch + head * a->q_head),
          static_cast<const char *>(a->k) + size * (batch * a->k_batch + kv * a->k_head),
          static_cast<const char *>(a->v) + size * (batch * a->v_batch + kv * a->v_head),
          static_cast<char *>(a->out) + size * (batch * a->out_batch + head * a->out_head), {}};
}

template <class E, class T>
int attention(const fg_attention_args *a) {
  if (a->queries <= FEW && a->dim <= FEW_DIM)
    return few<T>(a, [a](int64_t batch, int64_t head) { return head_at<T>(a, batch, head); });
  int64_t size = chunk_size(a->queries, a->batch * a->heads, a->dim), chunks = round_up(a->queries, size) / size;
  Layout<E> at(size / TQ, a->dim);
  int64_t work = size * (a->keys + 16) * a->dim;  // a thread is worth waking for 400,000 multiplications
  return parallel_for(a->batch * a->heads * chunks, 1 + 400000 / (work + 1), [&](int64_t item) {
    int64_t part = item % chunks, pair = item / chunks;
    int64_t first = part * size, last = first + size < a->queries ? first + size : a->queries;
    return chunk<E, T>(head_at<T>(a, pair / a->heads, pair % a->heads), first, last, at);
  });
}

}  // namespace

extern "C" int FG_EXPORT(attention)(const fg_attention_args *a) {
  if (a->batch < 0 || a->heads < 0 || a->queries < 0 || a->keys < 0 || a->dim < 0) return FG_BAD_ARGUMENT;
  if (!a->batch || !a->heads || !a->queries || !a->dim) return FG_OK;
  if (a->dim > MOST_DIM || a->kv_heads < 1 || a->heads % a->kv_heads) return FG_BAD_ARGUMENT;
  switch (a->dtype) {
    case FG_FLOAT32: return attention<FloatEngine, float>(a);
    case FG_FLOAT16: return attention<FloatEngine, fp16>(a);
    case FG_BFLOAT16: return attention<BestBf16Engine, bf16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
