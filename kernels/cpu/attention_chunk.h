// A chunk of one head's queries over its keys: each block of NB keys is packed once and taken by all the chunk's tiles.
#pragma once
#include "attention_float.h"
#include "threads.h"
#if defined(FG_HAS_AVX512_BF16)
#include "attention_bf16.h"
#endif

namespace {

#if defined(FG_LEVEL_AMX)
struct AmxEngine;  // attention_amx_chunk.h
using BestBf16Engine = AmxEngine;
#elif defined(FG_HAS_AVX512_BF16)
using BestBf16Engine = Bf16Engine;
#else
using BestBf16Engine = FloatEngine;
#endif

constexpr int64_t MOST_DIM = 1024;  // the head dimension up to which a chunk's tiles were tried

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
  if (h.e.softcap > 0.0f) {
    cap_scores(s, n, rate, h.e.softcap);
    rate = 1.0f;
  } else {
    rate *= LOG2E;
  }
  if (a->mask) {
    add_mask(h, s, q0, k0, n, rate);
    rate = 1.0f;
  }
  if (some_closed(h, q0, k0, n)) close_keys(h, s, q0, k0, n);
  alignas(64) float shift[TQ];
  bool moved = take_maximum(s, n, rate, state, shift);
  E::weigh(s, n, rate, shift, state, memory + at.p);
  E::gather_all(s, memory + at.p, memory + at.v, n, dim, state, state->blocks++ == 0, moved, o);
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
  int64_t end = last_open(h, last - 1);
  for (int64_t k0 = first_open(h, first) / E::NB * E::NB; k0 < end; k0 += E::NB) {
    int n = static_cast<int>(end - k0 < E::NB ? end - k0 : E::NB);
    E::pack_k(k + k0 * a->k_row, a->k_row, n, dim, memory + at.k);
    E::pack_v(v + k0 * a->v_row, a->v_row, n, dim, memory + at.v);
    for (int64_t q0 = first, tile = 0; q0 < last; q0 += TQ, ++tile)
      if (!all_closed(h, q0, k0, n)) step<E>(h, at, memory, tile, q0, k0, n, scale);
  }
  E::end();
  for (int64_t q0 = first, tile = 0; q0 < last; q0 += TQ, ++tile) {
    State *state = reinterpret_cast<State *>(memory + at.states) + tile;
    float *o = reinterpret_cast<float *>(memory + at.o) + tile * E::o_rows(dim) * TQ;
    if (!state->blocks) memset(o, 0, static_cast<size_t>(E::o_rows(dim)) * TQ * 4);
    if (h.e.sink > -infinity()) take_sink(state, h.e.sink);
    write_out<T>(h, o, state, q0);
  }
  return FG_OK;
}

// How many queries one item takes: enough to pay for packing the keys, few enough that every thread has some.
inline int64_t chunk_size(int64_t queries, int64_t pairs, int64_t dim) {
  int64_t most = dim <= 64 ? 512 : 256;
#if defined(FG_LEVEL_AMX)
  most *= dim <= 64 ? 4 : dim <= 128 ? 2 : 1;  // products take less beside packing
#endif
  int64_t size = round_up(queries < most ? queries : most, TQ);
  int64_t wanted = 4 * fg_threads();
  while (size > 128 && pairs * round_up(queries, size) / size < wanted) size = round_up(size / 2, TQ);
  return size;
}

}  // namespace
#if defined(FG_LEVEL_AMX)
#include "attention_amx_chunk.h"
#endif
