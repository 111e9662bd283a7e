// Attention of a few queries, as in decoding, which is bound by reading the keys and values: nothing is packed, vectors
// run along the head dimension, and the queries that share a key head are taken together, so that it is read once.
//
// The keys are split into pieces of PIECE.  An item is up to ROWS queries over one piece: it leaves their maxima, sums
// and weighted values, which are then put together in the order of the pieces.  What is added to what depends on the
// number of keys alone: not on threads, the batch, which queries were taken together, or the blocks of a paged cache.
#pragma once
#include <type_traits>

#include "attention_tile.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t FEW = 4;   // queries up to which this is the faster way
constexpr int PIECE = 512;   // keys of a piece
constexpr int ROWS = 8;      // queries of an item over one head of the keys
constexpr int MOST_ROWS = 32;  // and over all of its heads
constexpr int64_t FEW_DIM = 256;  // the largest head dimension
constexpr int WIDE = FEW_DIM + 32;  // room for a row along the head dimension, and so that rows fall in other cache sets
constexpr int AHEAD = 16;    // keys between the one in use and the one prefetched

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

// How rows of T are multiplied: in float32.  attention_few_bf16.h has its own way for bfloat16.
template <class T>
struct FloatFew {
  using element = T;
  using query_t = float;
  using vector = vf;
  static constexpr int STEP = W;  // elements of a row that dots takes at a time

  FG_INLINE vf query(const float *q) { return load(q); }
  FG_INLINE vf key(const T *k) { return load(k); }
  FG_INLINE vf key_n(const T *k, int n) { return load_n(k, n); }
  FG_INLINE vf dot(vf sum, vf q, vf k) { return fma(q, k, sum); }
  static void take_query(const T *from, int dim, float *to) {
    vectors(dim, [&](int64_t d, int n) { store(to + d, part(from + d, n)); });
  }
  FG_INLINE vf weight(vf p) { return p; }  // as it will be multiplied
  static void take_weights(float *, int) {}
  static int whole_run(int count, int) { return count; }

  // o[m] += sum over n keys of p[m][key] v[key], for M queries and C vectors of dims, the last of `lanes`.
  template <int M, int C>
  FG_INLINE void blend(const float *p, const T *v, const T *ahead, int64_t stride, int n, int lanes, float *o) {
    vf sum[M][C];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[m][c] = load(o + m * WIDE + c * W);
    for (int r = 0; r < n; ++r) {
      vf x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        __builtin_prefetch(ahead + r * stride + c * W);
        x[c] = c + 1 < C ? load(v + r * stride + c * W) : part(v + r * stride + c * W, lanes);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        vf one = set1(p[m * PIECE + r]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[m][c] = fma(one, x[c], sum[m][c]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(o + m * WIDE + c * W, sum[m][c]);
  }

  // All dims of the n keys from the piece's key r on.
  template <int M>
  static void blends(const float *p, int r, const T *v, const T *ahead, int64_t stride, int n, int dim, float *o) {
    p += r;
    int d = 0;
    for (; d + 4 * W <= dim; d += 4 * W) blend<M, 4>(p, v + d, ahead + d, stride, n, W, o + d);
    int left = dim - d, lanes = (left - 1) % W + 1;
    if (left > 3 * W)
      blend<M, 4>(p, v + d, ahead + d, stride, n, lanes, o + d);
    else if (left > 2 * W)
      blend<M, 3>(p, v + d, ahead + d, stride, n, lanes, o + d);
    else if (left > W)
      blend<M, 2>(p, v + d, ahead + d, stride, n, lanes, o + d);
    else if (left > 0)
      blend<M, 1>(p, v + d, ahead + d, stride, n, lanes, o + d);
  }
  static void give(const float *o, int dim, float *to) {
    for (int d = 0; d < dim; d += W) store(to + d, load(o + d));
  }
};

// The sums over the lanes of four vectors, each added up in hsum's order.
FG_INLINE void hsum4(const vf (&x)[4], float *to) {
#if defined(FG_HAS_AVX512)
  vf ab = add(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
  vf cd = add(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
  vf four = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  four = add(four, _mm512_permute_ps(four, 0x4e));
  four = add(four, _mm512_permute_ps(four, 0xb1));
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four)));
#else
  for (int i = 0; i < 4; ++i) to[i] = hsum(x[i]);
#endif
}

// to[m * PIECE + r] = q[m] . k[r] for M queries, R keys; `ahead` is what will be read next but a few.
template <int M, int R, class F, class T>
FG_INLINE void dots(const typename F::query_t *q, const T *k, const T *ahead, int64_t stride, int dim, float *to) {
  vf sum[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[m][r] = set1(0.0f);
  int whole = dim / F::STEP * F::STEP;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)  // row after row: memory is read in its own order
    for (int d = 0; d < whole; d += F::STEP) {
      __builtin_prefetch(ahead + r * stride + d);
      typename F::vector x = F::key(k + r * stride + d);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = F::dot(sum[m][r], F::query(q + m * WIDE + d), x);
    }
  if (whole < dim) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      typename F::vector x = F::key_n(k + r * stride + whole, dim - whole);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = F::dot(sum[m][r], F::query(q + m * WIDE + whole), x);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    if constexpr (R == 4)
      hsum4(sum[m], to + m * PIECE);
    else
      to[m * PIECE] = hsum(sum[m][0]);
  }
}

template <int M, class F, class T>
void all_dots(const typename F::query_t *q, const T *k, const T *ahead, int64_t stride, int n, int dim, float *s) {
  if (n == 4)
    dots<M, 4, F>(q, k, ahead, stride, dim, s);
  else
    for (int r = 0; r < n; ++r) dots<M, 1, F>(q, k + r * stride, ahead + r * stride, stride, dim, s + r);
}

// body(M, first) for groups of four, two and one of `rows`; M is a constant.
template <class F>
FG_INLINE void in_groups(int rows, const F &body) {
  int m = 0;
  for (; m + 4 <= rows; m += 4) body(std::integral_constant<int, 4>(), m);
  if (m + 2 <= rows) body(std::integral_constant<int, 2>(), m), m += 2;
  if (m < rows) body(std::integral_constant<int, 1>(), m);
}

template <class T>
struct BestFew { using type = FloatFew<T>; };
#if defined(FG_HAS_AVX512_BF16)
}  // namespace
#include "attention_few_bf16.h"
namespace {
template <>
struct BestFew<bf16> { using type = Bf16Few; };
#endif
constexpr int64_t SHORT = 16;  // head dimensions below which products of pairs gain nothing, and their roundings show

// What an item leaves of a query: its maximum (in units of log 2), its sum, and from PART_HEAD on its weighted values.
constexpr int64_t PART_HEAD = 16;
FG_INLINE int64_t part_size(int64_t dim) { return PART_HEAD + (dim + W - 1) / W * W; }

// The scores s[n] of a query become its weights exp2(score - maximum), rounded as the products take them; the maximum and
// their sum go to `part`.
template <class F>
void weigh_row(const Head &h, int64_t head, int64_t row, int64_t k0, int n, float *s, float *part) {
  const fg_attention_args *a = h.a;
  float rate = static_cast<float>(a->scale) * LOG2E;
  int64_t mask = h.batch * a->mask_batch + head * a->mask_head + row * a->mask_row;
  int64_t shut = first_open(h, row) - k0, open = last_open(h, row) - k0;
  float bend = h.e.softcap > 0.0f ? static_cast<float>(a->scale) / h.e.softcap : 0.0f;
  vf highest = set1(-infinity()), sum = set1(0.0f);
  for (int r = 0; r < n; r += W) {
    vf x = mul(load(s + r), set1(rate));
    if (h.e.softcap > 0.0f) x = capped(mul(load(s + r), set1(bend)), set1(h.e.softcap * LOG2E));
    if (a->mask) {
      float added[W];
      for (int j = 0; j < W; ++j) added[j] = r + j < n ? LOG2E * mask_at(a, mask + (k0 + r + j) * a->mask_key) : 0.0f;
      x = add(x, load(added));
    }
    store(s + r, x);
    for (int j = W; j > 0 && r + j > open; --j) s[r + j - 1] = -infinity();
    for (int j = 0; j < W && r + j < shut; ++j) s[r + j] = -infinity();
    highest = max(load(s + r), highest);
  }
  float most = hmax(highest), shift = most < LOWEST ? 0.0f : most;  // all closed: any finite shift gives exp2(-inf)
  for (int r = 0; r < n; r += W) {
    vf p = F::weight(exp2_falling<5>(sub(load(s + r), set1(shift))));
    store(s + r, p);
    sum = add(sum, p);
  }
  part[0] = most;
  part[1] = hsum(sum);
}

// An item: some heads of the keys, whose rows lie side by side where there are more than one, and of the queries over
// each the rows [first, first + rows): query i is row i % queries of head i / queries from the key head's first.
struct Item {
  int heads, rows;
  int64_t first;
  Head of[MOST_ROWS];  // the first query head of each

  int64_t head(int m) const { return (first + m % rows) / of[0].a->queries; }
  int64_t row(int m) const { return (first + m % rows) % of[0].a->queries; }
};

// An item over the n keys from k0 on: query m of head g stands at g * rows + m.
//
// What will be read next is fetched row after row: by the products where the item is one head alone, here where it is
// several.  It stays inside the sequence.
template <class F>
struct Piece {
  using T = typename F::element;
  const Item &item;
  const int64_t k0;
  const int n, dim = static_cast<int>(item.of[0].a->dim), rows = item.rows, queries = item.heads * item.rows;
  const bool alone = item.heads == 1;
  alignas(64) float o[MOST_ROWS * WIDE], s[MOST_ROWS * PIECE];
  alignas(64) typename F::query_t q[MOST_ROWS * WIDE];

  Piece(const Item &item, int64_t k0, int n) : item(item), k0(k0), n(n) {}

  int64_t k_at(int r) const { return row_at(item.of[0], item.of[0].e.k_block, item.of[0].a->k_row, k0 + r); }
  int64_t v_at(int r) const { return row_at(item.of[0], item.of[0].e.v_block, item.of[0].a->v_row, k0 + r); }
  const T *k(int g) const { return reinterpret_cast<const T *>(item.of[g].k); }
  const T *v(int g) const { return reinterpret_cast<const T *>(item.of[g].v); }
  int near(int r) const { return r < n ? r : n - 1; }

  void fetch(const T *from, int64_t stride, int count) const {
    for (int r = 0; r < count; ++r)
      for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(from + r * stride + d);
  }

  void take_queries() {
    const fg_attention_args *a = item.of[0].a;
    for (int m = 0; m < queries; ++m) {
      const T *from = reinterpret_cast<const T *>(item.of[m / rows].q);
      F::take_query(from + item.head(m) * a->q_head + item.row(m) * a->q_row, dim, q + m * WIDE);
      memset(o + m * WIDE, 0, WIDE * sizeof(float));
    }
  }

  void scores() {
    const int64_t stride = item.of[0].a->k_row;
    for (int r = 0, count; r < n; r += count) {
      count = run_of(item.of[0], k0 + r, n - r < 4 ? n - r : 4);
      bool keys = r + AHEAD < n;  // else the values, which come next
      int64_t here = k_at(r), ahead = keys ? k_at(r + AHEAD) : v_at(near(r + AHEAD - n));
      for (int g = 0; g < item.heads; ++g) {
        const T *from = k(g) + here, *next = (keys ? k(g) : v(g)) + ahead;
        if (!alone) fetch(next, keys ? stride : item.of[0].a->v_row, count);
        in_groups(rows, [&](auto M, int m) {
          m += g * rows;
          all_dots<M.value, F>(q + m * WIDE, from, alone ? next : from, stride, count, dim, s + m * PIECE + r);
        });
      }
    }
  }

  void values() {
    const int most = alone ? 16 : 4;  // side by side: rows are taken whole before the next are
    for (int r = 0, count; r < n; r += count) {
      count = F::whole_run(run_of(item.of[0], k0 + r, n - r < most ? n - r : most), n - r);
      int64_t here = v_at(r), ahead = v_at(near(r + AHEAD)), step = count > 1 ? v_at(r + 1) - here : 0;
      for (int g = 0; g < item.heads; ++g) {
        const T *from = v(g) + here, *next = v(g) + ahead;
        if (!alone) fetch(next, item.of[0].a->v_row, count);
        in_groups(rows, [&](auto M, int m) {
          m += g * rows;
          F::template blends<M.value>(s + m * PIECE, r, from, alone ? next : from, step, count, dim, o + m * WIDE);
        });
      }
    }
  }

  // Each query leaves a part of `size` floats; a key head's stand `apart` from the next one's.
  void run(float *parts, int64_t size, int64_t apart) {
    auto part = [&](int m) { return parts + m / rows * apart + m % rows * size; };
    take_queries();
    scores();
    for (int m = 0; m < queries; ++m) {
      const Head &h = item.of[m / rows];
      weigh_row<F>(h, h.head + item.head(m), item.row(m), k0, n, s + m * PIECE, part(m));
      F::take_weights(s + m * PIECE, n);
    }
    values();
    for (int m = 0; m < queries; ++m) F::give(o + m * WIDE, dim, part(m) + PART_HEAD);
  }
};

// One query's output from its parts, `apart` floats from one piece's to the next.
template <class T>
void few_join(const float *parts, int64_t apart, int64_t pieces, int dim, float sink, T *out) {
  alignas(64) float o[WIDE] = {}, factor[W];
  float most = sink * LOG2E, total = 0.0f;
  for (int64_t i = 0; i < pieces; ++i) most = parts[i * apart] > most ? parts[i * apart] : most;
  float shift = most < LOWEST ? 0.0f : most;
  for (int64_t i = 0; i < pieces; ++i) {
    const float *part = parts + i * apart;
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
struct Pieces {
  int64_t first, last;
};
inline Pieces pieces_of(const Head &h) {
  return {first_open(h, 0) / PIECE, (last_open(h, h.a->queries - 1) + PIECE - 1) / PIECE};
}

// How many heads of the keys an item takes: where their rows lie side by side, as many as leave every thread some
// items, so that memory is read in its own order; else one.
template <class T, class F>
int64_t heads_together(const fg_attention_args *a, const F &head_at, int64_t rows, int64_t pieces) {
  int64_t apart = a->kv_heads > 1 ? head_at(0, a->heads / a->kv_heads).k - head_at(0, 0).k : 0;
  int64_t blocks = (rows + ROWS - 1) / ROWS, most = MOST_ROWS / (rows < ROWS ? rows : ROWS);
  if (apart <= 0 || apart >= a->k_row * static_cast<int64_t>(sizeof(T))) return 1;
  int64_t heads = a->kv_heads < most ? a->kv_heads : most;
  while (heads > 1 && a->batch * blocks * pieces * (a->kv_heads / heads) < 4 * fg_threads()) heads = (heads + 1) / 2;
  return heads;
}

// All of a problem by the engine E; `head_at(batch, head)` gives a Head.  A sequence's parts stand from its first piece on.
template <class E, class F>
int few_by(const fg_attention_args *a, const F &head_at) {
  using T = typename E::element;
  int64_t shared = a->heads / a->kv_heads, rows = shared * a->queries, blocks = (rows + ROWS - 1) / ROWS, pieces = 0;
  for (int64_t batch = 0; batch < a->batch; ++batch) {
    Pieces own = pieces_of(head_at(batch, 0));
    pieces = own.last - own.first > pieces ? own.last - own.first : pieces;
  }
  int64_t size = part_size(a->dim), apart = a->batch * a->kv_heads * rows * size;
  float *parts = static_cast<float *>(fg_scratch(static_cast<size_t>(apart * pieces * 4)));
  if (!parts && pieces) return FG_NO_MEMORY;
  int64_t together = heads_together<T>(a, head_at, rows, pieces), groups = (a->kv_heads + together - 1) / together;
  auto piece = [&](int64_t number) -> int {  // all heads of a piece in turn: their rows often lie side by side
    int64_t block = number % blocks, kv = number / blocks % groups * together;
    int64_t i = number / (blocks * groups) % pieces, batch = number / (blocks * groups * pieces);
    Item item;
    item.heads = static_cast<int>(a->kv_heads - kv < together ? a->kv_heads - kv : together);
    item.first = block * ROWS;
    item.rows = static_cast<int>(rows - item.first < ROWS ? rows - item.first : ROWS);
    for (int g = 0; g < item.heads; ++g) item.of[g] = head_at(batch, (kv + g) * shared);
    const Head &h = item.of[0];
    int64_t own = pieces_of(h).first + i;
    int64_t begin = own * PIECE, lowest = first_open(h, 0) & ~int64_t{15}, end = last_open(h, a->queries - 1);
    begin = begin < lowest ? lowest : begin;  // down to 16: what is added to what stays
    int64_t n = (end < (own + 1) * PIECE ? end : (own + 1) * PIECE) - begin;
    float *to = parts + i * apart + ((batch * a->kv_heads + kv) * rows + item.first) * size;
    if (n > 0) Piece<E>(item, begin, static_cast<int>(n)).run(to, size, rows * size);
    return FG_OK;
  };
  int64_t work = PIECE * a->dim * (rows < ROWS ? rows : ROWS) * together;
  parallel_for(a->batch * groups * blocks * pieces, 1 + 100000 / (work + 1), piece);
  return parallel_for(a->batch * a->heads * a->queries, 1 + 100000 / (pieces * a->dim + 1), [&](int64_t item) -> int {
    int64_t pair = item / a->queries, row = item % a->queries;
    Head h = head_at(pair / a->heads, pair % a->heads);
    Pieces own = pieces_of(h);
    few_join(parts + item * size, apart, own.last - own.first, static_cast<int>(a->dim), h.e.sink,
             reinterpret_cast<T *>(h.out) + row * a->out_row);
    return FG_OK;
  });
}

template <class T, class F>
int few(const fg_attention_args *a, const F &head_at) {
  return a->dim < SHORT ? few_by<FloatFew<T>>(a, head_at) : few_by<typename BestFew<T>::type>(a, head_at);
}

}  // namespace
