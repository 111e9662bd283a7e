// levels: scalar avx2 avx512 avx512_bf16 amx neon
// Attention of packed sequences: attention's chunks (attention_chunk.h), each of them of one sequence.
#include "attention_chunk.h"

namespace {

struct Span {
  int64_t first, last;
};

// The rows of a sequence; the one past the last has what rows are left.
Span span_of(const void *cu, int64_t stride, int64_t sequence, int64_t sequences, int64_t total) {
  auto end = [&](int64_t s) -> int64_t {
    int64_t at = s > sequences ? total : static_cast<const int32_t *>(cu)[s * stride];
    return at < 0 ? 0 : at > total ? total : at;
  };
  int64_t first = end(sequence), last = end(sequence + 1);
  return {first, last < first ? first : last};
}

// The sequence that chunk `number` belongs to: the last whose first chunk, cu_q[s] / size + s, is not past it.
int64_t sequence_of(const fg_attention_varlen_args *v, int64_t number, int64_t size) {
  int64_t low = 0, high = v->sequences;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    bool here = span_of(v->cu_q, v->cu_q_stride, middle, v->sequences, v->queries).first / size + middle <= number;
    (here ? low : high) = here ? middle : middle - 1;
  }
  return low;
}

template <class E, class T>
int varlen(const fg_attention_varlen_args *v) {
  int64_t pairs = (v->sequences + 1) * v->heads, mean = v->queries / (v->sequences + 1) + 1;
  int64_t size = chunk_size(mean, pairs, v->dim), chunks = v->queries / size + v->sequences + 1;
  Layout<E> at(size / TQ, v->dim);
  int64_t work = size * (v->keys / (v->sequences + 1) + 16) * v->dim;
  return parallel_for(chunks * v->heads, 1 + 400000 / (work + 1), [&](int64_t item) -> int {
    int64_t head = item % v->heads, number = item / v->heads, s = sequence_of(v, number, size);
    Span q = span_of(v->cu_q, v->cu_q_stride, s, v->sequences, v->queries);
    Span k = span_of(v->cu_k, v->cu_k_stride, s, v->sequences, v->keys);
    int64_t first = (number - q.first / size - s) * size, keys = s < v->sequences ? k.last - k.first : 0;
    if (first >= q.last - q.first) return FG_OK;
    fg_attention_args a = {};
    a.queries = q.last - q.first, a.keys = keys, a.dim = v->dim, a.causal = v->causal, a.scale = v->scale;
    a.q_row = v->q_row, a.k_row = v->k_row, a.v_row = v->v_row, a.out_row = v->out_row;
    Extras e;
    e.diagonal = keys - a.queries, e.window = v->window, e.softcap = static_cast<float>(v->softcap);
    if (v->sinks) e.sink = element_at(v->sinks, v->sinks_dtype, head * v->sinks_stride);
    int64_t kv = head / (v->heads / v->kv_heads), bytes = sizeof(T);
    Head h = {&a, 0, head, keys, static_cast<const char *>(v->q) + bytes * (q.first * v->q_row + head * v->q_head),
              static_cast<const char *>(v->k) + bytes * (k.first * v->k_row + kv * v->k_head),
              static_cast<const char *>(v->v) + bytes * (k.first * v->v_row + kv * v->v_head),
              static_cast<char *>(v->out) + bytes * (q.first * v->out_row + head * v->out_head), e};
    return chunk<E, T>(h, first, first + size < a.queries ? first + size : a.queries, at);
  });
}

}  // namespace

extern "C" int FG_EXPORT(attention_varlen)(const fg_attention_varlen_args *v) {
  if (!v->queries || !v->heads || !v->dim) return FG_OK;
  if (v->dim > 256 || v->kv_heads < 1 || v->heads % v->kv_heads) return FG_BAD_ARGUMENT;
  switch (v->dtype) {
    case FG_FLOAT32: return varlen<FloatEngine, float>(v);
    case FG_BFLOAT16: return varlen<BestBf16Engine, bf16>(v);
    case FG_FLOAT16: return varlen<FloatEngine, fp16>(v);
    default: return FG_BAD_ARGUMENT;
  }
}
