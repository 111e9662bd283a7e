// levels: scalar avx2 avx512 avx512_bf16 amx neon
// Attention, softmax(scale q k^T + mask) v, in one pass over the keys with a running maximum and sum (Milakov &
// Gimelshein 2018; Dao et al. 2022).
//
// The work is split over batch x heads x chunks of queries.  A chunk packs each block of NB keys once and takes all its
// tiles of TQ queries over it; a few queries alone go another way (attention_few.h).  bfloat16 input runs on the CPU's
// bfloat16 products where the level has them, else in float32 (attention_float.h); float16 input always in float32,
// whose weights keep float16's eleven bits.
#include "attention_few.h"
#include "attention_float.h"
#include "threads.h"
#if defined(FG_HAS_AVX512_BF16)
#include "attention_bf16.h"
#endif

namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
          static_cast<char *>(a->out) + size * (batch * a->out_batch + head * a->out_head)};
}

// A chunk's scratch memory, in this order.
template <class E>
struct Layout {
  int64_t tiles, q, k, v, s, p, o, states, bytes;
  Layout(int64_t tiles, int64_t dim) : tiles(tiles) {
    int64_t at = 0;
    auto take = [&at](int64_t size) {
      int64_t start = at;
      at += round_up(size, 64);
      return start;
    };
    q = take(tiles * E::q_size(dim));
    k = take(E::k_size(dim));
    v = take(E::v_size(dim));
    s = take(E::SCORES * 4);
    p = take(E::p_size());
    o = take(tiles * E::o_rows(dim) * TQ * 4);
    states = take(tiles * static_cast<int64_t>(sizeof(State)));
    bytes = at;
  }
};

// One tile over one block of keys.
template <class E>
FG_INLINE void step(const Head &h, const Layout<E> &at, char *memory, int64_t tile, int64_t q0, int64_t k0, int n,
                    float rate) {
  const fg_attention_args *a = h.a;
  int dim = static_cast<int>(a->dim);
  float *s = reinterpret_cast<float *>(memory + at.s);
  State *state = reinterpret_cast<State *>(memory + at.states) + tile;
  float *o = reinterpret_cast<float *>(memory + at.o) + tile * E::o_rows(dim) * TQ;
  E::scores(memory + at.q + tile * E::q_size(dim), memory + at.k, n, dim, s);
  if (a->mask) {
    add_mask(h, s, q0, k0, n, rate);
    rate = 1.0f;
  }
  if (a->causal && k0 + n - 1 > q0) close_future(s, q0, k0, n);
  alignas(64) float shift[TQ];
  bool moved = take_maximum(s, n, rate, state, shift);
  E::weigh(s, n, rate, shift, state, memory + at.p);
  E::gather_all(s, memory + at.p, memory + at.v, n, dim, state, k0 == 0, moved, o);
}

template <class E, class T>
int chunk(const Head &h, int64_t first, int64_t last, const Layout<E> &at) {
  const fg_attention_args *a = h.a;
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(at.bytes)));
  if (!memory) return FG_NO_MEMORY;
  int dim = static_cast<int>(a->dim);
  float scale = static_cast<float>(a->scale), sign = scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f;
  scale = scale < 0 ? -scale : scale > 0 ? scale : 1.0f;  // its sign, or its being 0, goes into q
  const T *q = reinterpret_cast<const T *>(h.q), *k = reinterpret_cast<const T *>(h.k),
          *v = reinterpret_cast<const T *>(h.v);
  E::begin();
  for (int64_t q0 = first, tile = 0; q0 < last; q0 += TQ, ++tile) {
    int rows = static_cast<int>(last - q0 < TQ ? last - q0 : TQ);
    E::pack_q(q + q0 * a->q_row, a->q_row, rows, dim, sign, memory + at.q + tile * E::q_size(dim));
    reset(reinterpret_cast<State *>(memory + at.states) + tile);
  }
  int64_t keys = a->causal && last < h.keys ? last : h.keys;
  if (keys == 0) memset(memory + at.o, 0, static_cast<size_t>(at.states - at.o));
  for (int64_t k0 = 0; k0 < keys; k0 += E::NB) {
    int n = static_cast<int>(keys - k0 < E::NB ? keys - k0 : E::NB);
    E::pack_k(k + k0 * a->k_row, a->k_row, n, dim, memory + at.k);
    E::pack_v(v + k0 * a->v_row, a->v_row, n, dim, memory + at.v);
    for (int64_t q0 = first, tile = 0; q0 < last; q0 += TQ, ++tile) {
      if (a->causal && k0 >= q0 + TQ) continue;
      step<E>(h, at, memory, tile, q0, k0, n, scale * LOG2E);
    }
  }
  E::end();
  for (int64_t q0 = first, tile = 0; q0 < last; q0 += TQ, ++tile)
    write_out<T>(h, reinterpret_cast<float *>(memory + at.o) + tile * E::o_rows(dim) * TQ,
                 reinterpret_cast<State *>(memory + at.states) + tile, q0);
  return FG_OK;
}

// How many queries one item takes: enough to pay for packing the keys, few enough that every thread has some.
int64_t chunk_size(const fg_attention_args *a) {
  int64_t most = a->dim <= 64 ? 512 : 256;
  int64_t size = round_up(a->queries < most ? a->queries : most, TQ);
  int64_t wanted = 4 * fg_threads();
  while (size > 128 && a->batch * a->heads * round_up(a->queries, size) / size < wanted) size = round_up(size / 2, TQ);
  return size;
}

template <class E, class T>
int attention(const fg_attention_args *a) {
  if (a->queries <= FEW)
    return few<T>(a, [a](int64_t batch, int64_t head) { return head_at<T>(a, batch, head); });
  int64_t size = chunk_size(a), chunks = round_up(a->queries, size) / size;
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
  if (a->dim > 256 || a->kv_heads < 1 || a->heads % a->kv_heads) return FG_BAD_ARGUMENT;
  switch (a->dtype) {
    case FG_FLOAT32: return attention<FloatEngine, float>(a);
    case FG_FLOAT16: return attention<FloatEngine, fp16>(a);
#if defined(FG_HAS_AVX512_BF16)
    case FG_BFLOAT16: return attention<Bf16Engine, bf16>(a);
#else
    case FG_BFLOAT16: return attention<FloatEngine, bf16>(a);
#endif
    default: return FG_BAD_ARGUMENT;
  }
}
