// Attention of a few queries, as in decoding, which is bound by reading the keys and values: nothing is packed, vectors
// run along the head dimension, and the queries that share a key head are taken together, so that it is read once.
//
// The keys are split into pieces of PIECE.  An item is up to ROWS queries over some pieces: of each it leaves their
// maxima, sums and weighted values, which are then put together in the order of the pieces.  What is added to what
// depends on the number of keys alone: not on threads, the batch, which queries were taken together, or the blocks of a
// paged cache.
#pragma once
#include <type_traits>

#include "attention_tile.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t FEW = 4;       // queries up to which this is the faster way
constexpr int PIECE = 1024;     // keys of a piece
constexpr int ROW = PIECE + 16;  // floats from a query's scores to the next one's: in other cache sets
constexpr int ROWS = 16;         // queries of an item over one head of the keys,
constexpr int MOST_ROWS = 32;    // and over all of its heads, an even number of each
constexpr int64_t FEW_DIM = 256;  // the largest head dimension
constexpr int WIDE = FEW_DIM + 32;  // room for a row along the head dimension; rows fall in other cache sets
constexpr int BLOCK = 32;    // scores that become weights in one go
constexpr int LEAD = 8192;   // bytes from the key in use to the one asked for, twice that where heads lie side by side;
                             // as far again to the page that is met next, whose address takes long to find
constexpr int PAUSE = 8192;  // more of them while weights are computed
constexpr int HALF = 2048;   // bytes of half a page
constexpr int RUN = 8192;    // bytes that products take at a time,
constexpr int KEYS = 32;     // and their keys at the most
#if defined(FG_LEVEL_AMX)
constexpr int NEAR = 2;      // where to: with AMX the second cache is large and near (measured on an Emerald Rapids)
#else
constexpr int NEAR = 3;
#endif

// Where key j's row begins, in elements from the first block's first.
FG_INLINE int64_t row_at(const Head &h, int64_t block_stride, int64_t row_stride, int64_t j) {
  if (!h.e.table) return j * row_stride;
  return h.e.table[j / h.e.block * h.e.table_step] * block_stride + j % h.e.block * row_stride;
}

// How many keys from j on lie one after another, `most` at the most.
FG_INLINE int run_of(const Head &h, int64_t j, int most) {
  int64_t left = h.e.table ? h.e.block - j % h.e.block : most;
  return left < most ? static_cast<int>(left) : most;
}

// What is asked for ahead of time: rows of `length` bytes, in the order of memory, whatever the order of the products.
// It is asked for line by line, as evenly as the products come: where groups of queries multiply the same bytes one
// after another, each asks for a part of them.
struct Ahead {
  const char *at, *end;
  int64_t length, between;
  int every, due = 0;

  Ahead(const char *at, int64_t stride, int64_t length, int groups)
      : at(at), end(at + length), length(length), between(stride - length), every(64 * groups) {}

  inline __attribute__((always_inline)) void ask(int size) {  // for as much as `size` bytes that are multiplied
    for (due -= size; due < 0; due += every) line();
  }
  inline __attribute__((always_inline)) void line() {
    __builtin_prefetch(at, 0, NEAR);
    at += 64;
    if (at >= end) at = end + between, end = at + length;
  }
};

// What engines of vectors have in common.
struct Vectors {
  static constexpr bool TILES = false;
  static constexpr int ALIGN = 16;  // keys: what is added to what depends on where they begin
  static constexpr int ROOM = 2;    // queries over a key head that there is room for at the least
  static void begin_scores() {}
  static void begin_values(int) {}
  static void end() {}
};

}  // namespace
#include "attention_few_float.h"
#if defined(FG_HAS_AVX512)
#include "attention_few_pairs.h"
#endif
#if defined(FG_HAS_AVX512_BF16) && !defined(FG_LEVEL_AMX)
#include "attention_few_bf16.h"
#endif
#if defined(FG_LEVEL_AMX)
#include "attention_few_tiles.h"
#endif
#include "attention_few_pieces.h"
namespace {

template <class T>
struct BestFew { using type = FloatFew<T>; };
#if defined(FG_HAS_AVX512)
template <>
struct BestFew<float> { using type = PairFew<float>; };
#endif
#if defined(FG_LEVEL_AMX)
template <>
struct BestFew<bf16> { using type = PairFew<bf16>; };
#elif defined(FG_HAS_AVX512_BF16)
template <>
struct BestFew<bf16> { using type = Bf16Few; };
#endif
constexpr int64_t SHORT = 16;  // head dimensions below which products of pairs gain nothing, and their roundings show

// One query's output from its parts, `size` floats each, one after another.
template <class T>
void few_join(const float *parts, int64_t size, int64_t pieces, int dim, float sink, T *out) {
  alignas(64) float o[WIDE] = {}, factor[W];
  float most = sink * LOG2E, total = 0.0f;
  for (int64_t i = 0; i < pieces; ++i) most = parts[i * size] > most ? parts[i * size] : most;
  float shift = most < LOWEST ? 0.0f : most;
  for (int64_t i = 0; i < pieces; ++i) {
    const float *part = parts + i * size;
    store(factor, exp2_falling<5>(set1(part[0] - shift)));
    total += factor[0] * part[1];
    for (int d = 0; d < dim; d += W) store(o + d, fma(set1(factor[0]), load(part + PART_HEAD + d), load(o + d)));
  }
  store(factor, exp2_falling<5>(set1(sink * LOG2E - shift)));
  total += factor[0];
  float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int d = 0; d < dim; d += W) store_n(out + d, mul(load(o + d), set1(inverse)), dim - d < W ? dim - d : W);
}

// The pieces [first, last) of the keys that any of a head's queries attends.
struct Range {
  int64_t first, last;
};
inline Range pieces_of(const Head &h) {
  return {first_open(h, 0) / PIECE, (last_open(h, h.a->queries - 1) + PIECE - 1) / PIECE};
}

// How many heads of the keys an item takes: where their rows lie side by side, as many as leave every thread some
// items, so that memory is read in its own order; else one.
template <class T, class F>
int64_t heads_together(const fg_attention_args *a, const F &head_at, int64_t rows, int64_t pieces) {
  int64_t apart = a->kv_heads > 1 ? head_at(0, a->heads / a->kv_heads).k - head_at(0, 0).k : 0;
  int64_t blocks = (rows + ROWS - 1) / ROWS, most = MOST_ROWS / (rows < ROWS ? (rows + 1) / 2 * 2 : ROWS);
  if (apart <= 0 || apart >= a->k_row * static_cast<int64_t>(sizeof(T))) return 1;
  int64_t heads = a->kv_heads < most ? a->kv_heads : most;
  while (heads > 1 && a->batch * blocks * pieces * (a->kv_heads / heads) < 4 * fg_threads()) heads = (heads + 1) / 2;
  return heads;
}

// The pieces [i, i + span), counted from the sequence's first on, of an item that knows its heads and rows.
template <class E>
void some_pieces(Item *item, int64_t i, int64_t span, float *parts, int64_t apart) {
  const Head &h = item->of[0];
  const int64_t last = h.a->queries - 1, first = pieces_of(h).first + i, end = last_open(h, last);
  const int64_t lowest = first_open(h, 0) / E::ALIGN * E::ALIGN;  // what is added to what stays
  item->end = end < (first + span) * PIECE ? end : (first + span) * PIECE;
  if (first * PIECE >= item->end) return;
  Pieces<E> over(*item);
  for (int64_t own = first; own * PIECE < item->end; ++own) {
    int64_t begin = own * PIECE < lowest ? lowest : own * PIECE;
    int64_t n = (item->end < (own + 1) * PIECE ? item->end : (own + 1) * PIECE) - begin;
    if (n > 0) over.run(begin, static_cast<int>(n), parts + (i + own - first) * part_size(h.a->dim), apart);
  }
}

// All of a problem by the engine E; `head_at(batch, head)` gives a Head.  A query's parts stand one after another.
template <class E, class F>
int few_by(const fg_attention_args *a, const F &head_at) {
  using T = typename E::element;
  int64_t shared = a->heads / a->kv_heads, rows = shared * a->queries, blocks = (rows + ROWS - 1) / ROWS, pieces = 0;
  for (int64_t batch = 0; batch < a->batch; ++batch) {
    Range own = pieces_of(head_at(batch, 0));
    pieces = own.last - own.first > pieces ? own.last - own.first : pieces;
  }
  int64_t size = part_size(a->dim), apart = pieces * size;
  float *parts = static_cast<float *>(fg_scratch(static_cast<size_t>(a->batch * a->kv_heads * rows * apart * 4)));
  if (!parts && pieces) return FG_NO_MEMORY;
  int64_t together = heads_together<T>(a, head_at, rows, pieces), groups = (a->kv_heads + together - 1) / together;
  int64_t all = a->batch * groups * blocks, span = all * pieces / (16 * fg_threads());  // pieces of an item
  span = span < 1 ? 1 : span < pieces ? span : pieces;
  int64_t spans = (pieces + span - 1) / (span > 0 ? span : 1);
  auto run = [&](int64_t number) -> int {  // all heads of some pieces in turn: their rows often lie side by side
    int64_t block = number % blocks, kv = number / blocks % groups * together;
    int64_t i = number / (blocks * groups) % spans * span, batch = number / (blocks * groups * spans);
    Item item;
    item.heads = static_cast<int>(a->kv_heads - kv < together ? a->kv_heads - kv : together);
    item.first = block * ROWS;
    item.rows = static_cast<int>(rows - item.first < ROWS ? rows - item.first : ROWS);
    for (int g = 0; g < item.heads; ++g) item.of[g] = head_at(batch, (kv + g) * shared);
    some_pieces<E>(&item, i, span, parts + ((batch * a->kv_heads + kv) * rows + item.first) * apart, apart);
    return FG_OK;
  };
  int64_t work = PIECE * a->dim * (rows < ROWS ? rows : ROWS) * together * span;
  parallel_for(all * spans, 1 + 100000 / (work + 1), run);
  return parallel_for(a->batch * a->heads * a->queries, 1 + 100000 / (pieces * a->dim + 1), [&](int64_t item) -> int {
    int64_t pair = item / a->queries, row = item % a->queries;
    Head h = head_at(pair / a->heads, pair % a->heads);
    Range own = pieces_of(h);
    few_join(parts + item * apart, size, own.last - own.first, static_cast<int>(a->dim), h.e.sink,
             reinterpret_cast<T *>(h.out) + row * a->out_row);
    return FG_OK;
  });
}

template <class T, class F>
int few(const fg_attention_args *a, const F &head_at) {
#if defined(FG_LEVEL_AMX)
  if constexpr (std::is_same_v<T, bf16>)
    if (TileFew::serves(a)) return few_by<TileFew>(a, head_at);
#endif
  return a->dim < SHORT ? few_by<FloatFew<T>>(a, head_at) : few_by<typename BestFew<T>::type>(a, head_at);
}

}  // namespace
