// Attention of a few queries, as in decoding, which is bound by reading the keys and values: nothing is packed, vectors
// run along the head dimension, and the queries that share a key head are taken together, so that it is read once.
//
// The keys are split into pieces of PIECE.  An item is up to ROWS queries over one piece: it leaves their maxima, sums
// and weighted values, which are then put together in the order of the pieces.  What is added to what depends on the
// number of keys alone: not on threads, the batch, which queries were taken together, or the blocks of a paged cache.
#pragma once
#include "attention_tile.h"
#include "threads.h"

namespace {

constexpr int64_t FEW = 4;   // queries up to which this is the faster way
constexpr int PIECE = 512;   // keys of a piece
constexpr int ROWS = 8;      // queries of an item
constexpr int WIDE = 256 + W;  // room for a row along the head dimension
constexpr int AHEAD = 16;    // keys between the one in use and the one prefetched

// Where key j's row begins, `base` being that of the first block's first.
template <class T>
FG_INLINE const T *row_of(const Head &h, const char *base, int64_t block_stride, int64_t row_stride, int64_t j) {
  const T *from = reinterpret_cast<const T *>(base);
  if (!h.e.table) return from + j * row_stride;
  return from + h.e.table[j / h.e.block * h.e.table_step] * block_stride + j % h.e.block * row_stride;
}

// How many keys from j on lie one after another, `most` at the most.
FG_INLINE int run_of(const Head &h, int64_t j, int most) {
  int64_t left = h.e.table ? h.e.block - j % h.e.block : most;
  return left < most ? static_cast<int>(left) : most;
}

// to[m * PIECE + r] = q[m] . k[r] for M queries, R keys; `ahead` is what will be read next but a few.
template <int M, int R, class T>
FG_INLINE void dots(const float *q, const T *k, const T *ahead, int64_t stride, int dim, float *to) {
  vf sum[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[m][r] = set1(0.0f);
  int d = 0;
  for (; d + W <= dim; d += W) {
    vf x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead + r * stride + d);
      x[r] = load(k + r * stride + d);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[m][r] = fma(load(q + m * WIDE + d), x[r], sum[m][r]);
  }
  if (d < dim) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf x = load_n(k + r * stride + d, dim - d);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = fma(load(q + m * WIDE + d), x, sum[m][r]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) to[m * PIECE + r] = hsum(sum[m][r]);
}

// o[m] += sum over n keys r of p[m][r] v[r], for M queries, C vectors of dims (or the first `lanes` of one).
template <int M, int C, class T>
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
      x[c] = C == 1 ? load_n(v + r * stride, lanes) : load(v + r * stride + c * W);
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

template <int M, class T>
FG_INLINE void all_dots(const float *q, const T *k, const T *ahead, int64_t stride, int n, int dim, float *s) {
  if (n == 4)
    dots<M, 4>(q, k, ahead, stride, dim, s);
  else
    for (int r = 0; r < n; ++r) dots<M, 1>(q, k + r * stride, ahead + r * stride, stride, dim, s + r);
}

template <int M, class T>
FG_INLINE void all_blends(const float *p, const T *v, const T *ahead, int64_t stride, int n, int dim, float *o) {
  int d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) blend<M, 4>(p, v + d, ahead + d, stride, n, W, o + d);
  for (; d < dim; d += W) blend<M, 1>(p, v + d, ahead + d, stride, n, dim - d < W ? dim - d : W, o + d);
}

// What an item leaves of a query: its maximum (in units of log 2), its sum, and from PART_HEAD on its weighted values.
constexpr int64_t PART_HEAD = 16;
FG_INLINE int64_t part_size(int64_t dim) { return PART_HEAD + (dim + W - 1) / W * W; }

// The scores s[n] of a query become its weights exp2(score - maximum); the maximum and their sum go to `part`.
inline void weigh_row(const Head &h, int64_t head, int64_t row, int64_t k0, int n, float *s, float *part) {
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
    vf p = exp2_falling<5>(sub(load(s + r), set1(shift)));
    store(s + r, p);
    sum = add(sum, p);
  }
  part[0] = most;
  part[1] = hsum(sum);
}

// Queries [first, last) of those over one key head, h's first: query i is row i % queries of head i / queries.  Over the
// n keys from k0 on.  The parts they leave are `size` floats each.
template <class T>
void few_piece(const Head &h, int64_t first, int64_t last, int64_t k0, int n, float *parts, int64_t size) {
  const fg_attention_args *a = h.a;
  int dim = static_cast<int>(a->dim), rows = static_cast<int>(last - first);
  alignas(64) float q[ROWS * WIDE], o[ROWS * WIDE], s[ROWS * PIECE];
  for (int m = 0; m < rows; ++m) {
    int64_t head = (first + m) / a->queries, row = (first + m) % a->queries;
    const T *from = reinterpret_cast<const T *>(h.q) + head * a->q_head + row * a->q_row;
    for (int d = 0; d < dim; d += W) {
      store(q + m * WIDE + d, load_n(from + d, dim - d < W ? dim - d : W));
      store(o + m * WIDE + d, set1(0.0f));
    }
  }
  auto near = [&](int64_t j) { return k0 + (j < n ? j : n - 1); };  // what is prefetched stays inside the sequence
  for (int r = 0, count; r < n; r += count) {
    count = run_of(h, k0 + r, n - r < 4 ? n - r : 4);
    int m = 0;
    const T *from = row_of<T>(h, h.k, h.e.k_block, a->k_row, k0 + r);
    const T *ahead = row_of<T>(h, h.k, h.e.k_block, a->k_row, near(r + AHEAD));
    for (; m + 4 <= rows; m += 4) all_dots<4>(q + m * WIDE, from, ahead, a->k_row, count, dim, s + m * PIECE + r);
    for (; m < rows; ++m) all_dots<1>(q + m * WIDE, from, ahead, a->k_row, count, dim, s + m * PIECE + r);
  }
  for (int m = 0; m < rows; ++m)
    weigh_row(h, h.head + (first + m) / a->queries, (first + m) % a->queries, k0, n, s + m * PIECE, parts + m * size);
  for (int r = 0, count; r < n; r += count) {
    count = run_of(h, k0 + r, n - r < 16 ? n - r : 16);
    int m = 0;
    const T *from = row_of<T>(h, h.v, h.e.v_block, a->v_row, k0 + r);
    const T *ahead = row_of<T>(h, h.v, h.e.v_block, a->v_row, near(r + AHEAD));
    for (; m + 4 <= rows; m += 4) all_blends<4>(s + m * PIECE + r, from, ahead, a->v_row, count, dim, o + m * WIDE);
    for (; m < rows; ++m) all_blends<1>(s + m * PIECE + r, from, ahead, a->v_row, count, dim, o + m * WIDE);
  }
  for (int m = 0; m < rows; ++m)
    for (int d = 0; d < dim; d += W) store(parts + m * size + PART_HEAD + d, load(o + m * WIDE + d));
}

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

// All of a problem; `head_at(batch, head)` gives a Head.  A sequence's parts stand from its first piece on.
template <class T, class F>
int few(const fg_attention_args *a, const F &head_at) {
  int64_t shared = a->heads / a->kv_heads, rows = shared * a->queries, blocks = (rows + ROWS - 1) / ROWS, pieces = 0;
  for (int64_t batch = 0; batch < a->batch; ++batch) {
    Pieces own = pieces_of(head_at(batch, 0));
    pieces = own.last - own.first > pieces ? own.last - own.first : pieces;
  }
  int64_t size = part_size(a->dim), apart = a->batch * a->kv_heads * rows * size;
  float *parts = static_cast<float *>(fg_scratch(static_cast<size_t>(apart * pieces * 4)));
  if (!parts && pieces) return FG_NO_MEMORY;
  auto piece = [&](int64_t item) -> int {  // all heads of a piece in turn: their rows often lie side by side
    int64_t block = item % blocks, kv = item / blocks % a->kv_heads, i = item / (blocks * a->kv_heads) % pieces;
    int64_t batch = item / (blocks * a->kv_heads * pieces);
    Head h = head_at(batch, kv * shared);
    int64_t first = block * ROWS, last = first + ROWS < rows ? first + ROWS : rows, own = pieces_of(h).first + i;
    int64_t begin = own * PIECE, lowest = first_open(h, 0) & ~int64_t{15}, end = last_open(h, a->queries - 1);
    begin = begin < lowest ? lowest : begin;  // down to 16: what is added to what stays
    int64_t n = (end < (own + 1) * PIECE ? end : (own + 1) * PIECE) - begin;
    float *to = parts + i * apart + ((batch * a->kv_heads + kv) * rows + first) * size;
    if (n > 0) few_piece<T>(h, first, last, begin, static_cast<int>(n), to, size);
    return FG_OK;
  };
  int64_t work = PIECE * a->dim * (rows < ROWS ? rows : ROWS);
  parallel_for(a->batch * a->kv_heads * blocks * pieces, 1 + 100000 / (work + 1), piece);
  return parallel_for(a->batch * a->heads * a->queries, 1 + 100000 / (pieces * a->dim + 1), [&](int64_t item) -> int {
    int64_t pair = item / a->queries, row = item % a->queries;
    Head h = head_at(pair / a->heads, pair % a->heads);
    Pieces own = pieces_of(h);
    few_join(parts + item * size, apart, own.last - own.first, static_cast<int>(a->dim), h.e.sink,
             reinterpret_cast<T *>(h.out) + row * a->out_row);
    return FG_OK;
  });
}

}  // namespace
