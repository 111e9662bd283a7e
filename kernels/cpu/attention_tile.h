// What all of attention's engines share: the problem, the tile and its online softmax.
//
// Everything is kept transposed: the scores of a tile are S[key][query] with TQ queries side by side in vectors, so
// that the maximum and the sum over keys need no work across lanes, and the running state is one vector per 16 queries.
// A tile's result depends on its own rows, the keys and the key block NB alone: not on chunks, threads or the batch.
#pragma once
#include "abi.h"
#include "exp2.h"

namespace {

constexpr int TQ = 2 * W;  // queries of a tile
constexpr float LOWEST = -3.402823466e38f;
constexpr float LOG2E = 1.44269504088896341f;

// What other ops have beyond attention: with `causal`, key j is open to query i where j <= i + diagonal; `window` > 0:
// only where it is less than that far from i + diagonal; `softcap` > 0: scores become softcap tanh(score / softcap);
// `sink`: a logit more in the softmax.  With a `table`, key j is row j % block of the cache's block table[j / block].
struct Extras {
  int64_t diagonal = 0, window = 0;
  float softcap = 0.0f, sink = -__builtin_inff();
  const int32_t *table = nullptr;
  int64_t table_step = 0, block = 1, k_block = 0, v_block = 0;
};

// One (batch, head): where its rows begin, and how far.
struct Head {
  const fg_attention_args *a;
  int64_t batch, head, keys;
  const char *q, *k, *v;
  char *out;
  Extras e;
};

FG_INLINE float infinity() { return __builtin_inff(); }

// 2^t for t <= 0 by a polynomial of degree 3 or 5: relative error 8e-5 or 2e-7.  0 at -inf, NaN at NaN.
template <int DEGREE>
FG_INLINE vf exp2_falling(vf t) {
  vf whole, f = fraction(t, whole), p = set1(PowerOfTwo<DEGREE>::terms[0]);
#pragma GCC unroll 5
  for (int i = 1; i <= DEGREE; ++i) p = fma(p, f, set1(PowerOfTwo<DEGREE>::terms[i]));
#if defined(FG_HAS_AVX512)
  return scaled(p, whole);
#else
  return select_gt(set1(-126.0f), t, set1(0.0f), scaled(p, whole));
#endif
}

// softcap tanh(x) in units of log 2, `cap` being softcap log2(e).
FG_INLINE vf capped(vf x, vf cap) {
  vf size = max(x, sub(set1(0.0f), x)), fall = exp2_falling<5>(mul(size, set1(-2.0f * LOG2E)));
  vf bent = mul(div(sub(set1(1.0f), fall), add(set1(1.0f), fall)), cap);
  return select_gt(set1(0.0f), x, sub(set1(0.0f), bent), bent);
}

// Running maximum (of score times rate, in units of log 2) and sum of each query, and what the tile's earlier sums must
// be multiplied by.
struct alignas(64) State {
  float maximum[TQ], sum[TQ], alpha[TQ];
  int64_t blocks;  // of keys met so far
};

FG_INLINE void reset(State *s) {
  s->blocks = 0;
  for (int i = 0; i < TQ; i += W) {
    store(s->maximum + i, set1(-infinity()));
    store(s->sum + i, set1(0.0f));
  }
}

// Takes the maximum of block S[n][TQ] into the state.  Sets alpha, multiplies the sum by it, and gives the shift in the
// weights exp2(score * rate - shift[query]).  Returns whether any alpha differs from 1.
FG_INLINE bool take_maximum(const float *scores, int n, float rate, State *state, float *shift) {
  bool moved = false;
  for (int i = 0; i < TQ; i += W) {
    vf m0 = set1(-infinity()), m1 = m0, m2 = m0, m3 = m0;
    int r = 0;
    for (; r + 4 <= n; r += 4) {
      const float *row = scores + r * TQ + i;
      m0 = max(load(row), m0);  // the running maximum comes second: a NaN score leaves it, and is met again in exp
      m1 = max(load(row + TQ), m1);
      m2 = max(load(row + 2 * TQ), m2);
      m3 = max(load(row + 3 * TQ), m3);
    }
    for (; r < n; ++r) m0 = max(load(scores + r * TQ + i), m0);
    vf old = load(state->maximum + i);
    vf now = max(mul(max(max(m0, m1), max(m2, m3)), set1(rate)), old);
    vf finite = select_gt(set1(LOWEST), now, set1(0.0f), now);  // all closed so far: any finite shift gives exp2(-inf)
    vf alpha = exp2_falling<5>(sub(old, finite));
    alpha = select_gt(now, old, alpha, set1(1.0f));
    moved |= hmax(select_gt(now, old, set1(1.0f), set1(0.0f))) > 0.0f;
    store(state->maximum + i, now);
    store(state->alpha + i, alpha);
    store(state->sum + i, mul(load(state->sum + i), alpha));
    store(shift + i, finite);
  }
  return moved;
}

// An element of any floating type.
FG_INLINE float element_at(const void *from, int64_t dtype, int64_t offset) {
  float lanes[W];
  switch (dtype) {
    case FG_FLOAT32: store(lanes, load_n(static_cast<const float *>(from) + offset, 1)); break;
    case FG_BFLOAT16: store(lanes, load_n(static_cast<const bf16 *>(from) + offset, 1)); break;
    default: store(lanes, load_n(static_cast<const fp16 *>(from) + offset, 1));
  }
  return lanes[0];
}

// An element of the mask as what is added to the scaled score.
FG_INLINE float mask_at(const fg_attention_args *a, int64_t offset) {
  if (a->mask_dtype == FG_BOOL) return static_cast<const char *>(a->mask)[offset] ? 0.0f : -infinity();
  float added = element_at(a->mask, a->mask_dtype, offset);
  // The lowest finite number stays finite after the change of base to 2: rows that it closes whole are averaged, as they
  // are in PyTorch.
  return added < -1e38f && added > -infinity() ? -1e38f : added;
}

// to[j][i] = from[i][j] for W x W floats; strides count elements.
FG_INLINE void transpose(const float *from, int from_stride, float *to, int to_stride) {
#if defined(FG_HAS_AVX512)
  __m512i x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, x[i]);
#elif defined(FG_LEVEL_AVX2)
  vf x[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) x[i] = load(from + i * from_stride);
  transpose(x);
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) store(to + i * to_stride, x[i]);
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// W keys of W rows of the mask as turned[key][query]: what is added to their scores, 0 past the ends.
template <class T>
FG_INLINE void turn_mask(const T *from, int64_t row_stride, int rows, int keys, float *turned) {
  const vf lowest = set1(-1e38f), closed = set1(-infinity());  // as in mask_at
  alignas(64) float block[W * W];
  for (int i = 0; i < W; ++i) {
    vf x = set1(0.0f);
    if (i < rows) x = keys == W ? load(from + i * row_stride) : load_n(from + i * row_stride, keys);
    store(block + i * W, select_gt(x, closed, max(lowest, x), x));
  }
  transpose(block, W, turned, W);
}
FG_INLINE void turn_mask(const char *from, int64_t row_stride, int rows, int keys, float *turned) {
  alignas(64) float block[W * W];
  for (int i = 0; i < W; ++i) {
    const char *row = from + i * row_stride;
#if defined(FG_HAS_AVX512)
    const __mmask16 there = lanes_below(i < rows ? keys : 0);
    const __m128i x = _mm_maskz_loadu_epi8(there, row);
    store(block + i * W, _mm512_maskz_mov_ps(_mm_mask_testn_epi8_mask(there, x, x), set1(-infinity())));
#else
    for (int j = 0; j < W; ++j) block[i * W + j] = i < rows && j < keys && !row[j] ? -infinity() : 0.0f;
#endif
  }
  transpose(block, W, turned, W);
}

// add_mask where keys lie side by side and every query has its own.
template <class T>
inline void add_mask_rows(const Head &h, const T *mask, float *scores, int64_t q0, int64_t k0, int n, float rate) {
  const fg_attention_args *a = h.a;
  mask += h.batch * a->mask_batch + h.head * a->mask_head + q0 * a->mask_row + k0;
  alignas(64) float turned[W * W];
  for (int i = 0; i < TQ; i += W) {
    int64_t left = a->queries - q0 - i;
    int rows = static_cast<int>(left < 0 ? 0 : left < W ? left : W);
    for (int r = 0; r < n; r += W) {
      int keys = n - r < W ? n - r : W;
      turn_mask(mask + i * a->mask_row + r, a->mask_row, rows, keys, turned);
      for (int j = 0; j < keys; ++j) {
        float *at = scores + (r + j) * TQ + i;
        store(at, fma(load(at), set1(rate), mul(set1(LOG2E), load(turned + j * W))));
      }
    }
  }
}

// S = rate S + mask, in units of log 2, for keys [k0, k0 + n) and queries [q0, q0 + TQ).
inline void add_mask(const Head &h, float *scores, int64_t q0, int64_t k0, int n, float rate) {
  const fg_attention_args *a = h.a;
  if (a->mask_key == 1 && a->mask_row != 0) {
    switch (a->mask_dtype) {
      case FG_BOOL: return add_mask_rows(h, static_cast<const char *>(a->mask), scores, q0, k0, n, rate);
      case FG_FLOAT32: return add_mask_rows(h, static_cast<const float *>(a->mask), scores, q0, k0, n, rate);
      case FG_BFLOAT16: return add_mask_rows(h, static_cast<const bf16 *>(a->mask), scores, q0, k0, n, rate);
      default: return add_mask_rows(h, static_cast<const fp16 *>(a->mask), scores, q0, k0, n, rate);
    }
  }
  int64_t base = h.batch * a->mask_batch + h.head * a->mask_head;
  int rows = static_cast<int>(a->queries - q0 < TQ ? a->queries - q0 : TQ);
  alignas(64) float added[TQ] = {};
  for (int r = 0; r < n; ++r) {
    int64_t column = base + (k0 + r) * a->mask_key;
    if (a->mask_row == 0) {
      float one = LOG2E * mask_at(a, column);
      for (int i = 0; i < TQ; ++i) added[i] = one;
    } else {
      for (int i = 0; i < rows; ++i) added[i] = LOG2E * mask_at(a, column + (q0 + i) * a->mask_row);
    }
    for (int i = 0; i < TQ; i += W) {
      float *at = scores + r * TQ + i;
      store(at, fma(load(at), set1(rate), load(added + i)));
    }
  }
}

// Keys [first, last) are open to query i, as far as causality and the window go.
FG_INLINE int64_t first_open(const Head &h, int64_t i) {
  int64_t first = i + h.e.diagonal - h.e.window + 1;
  return h.e.window && first > 0 ? first : 0;
}
FG_INLINE int64_t last_open(const Head &h, int64_t i) {
  int64_t at = i + h.e.diagonal, last = h.a->causal ? at + 1 : h.e.window ? at + h.e.window : h.keys;
  return last < 0 ? 0 : last < h.keys ? last : h.keys;
}

// Whether keys [k0, k0 + n) are closed to all of the tile's queries, and whether they are to some of them.
FG_INLINE bool all_closed(const Head &h, int64_t q0, int64_t k0, int n) {
  return k0 >= last_open(h, q0 + TQ - 1) || k0 + n <= first_open(h, q0);
}
FG_INLINE bool some_closed(const Head &h, int64_t q0, int64_t k0, int n) {
  return k0 + n > last_open(h, q0) || k0 < first_open(h, q0 + TQ - 1);
}

inline void close_keys(const Head &h, float *scores, int64_t q0, int64_t k0, int n) {
  alignas(64) float first[TQ], last[TQ];
  for (int i = 0; i < TQ; ++i) {
    first[i] = static_cast<float>(first_open(h, q0 + i) - k0);
    last[i] = static_cast<float>(last_open(h, q0 + i) - k0);
  }
  for (int r = 0; r < n; ++r) {
    vf key = set1(static_cast<float>(r) + 0.5f);
    for (int i = 0; i < TQ; i += W) {
      float *at = scores + r * TQ + i;
      vf open = select_gt(load(last + i), key, load(at), set1(-infinity()));
      store(at, select_gt(key, load(first + i), open, set1(-infinity())));
    }
  }
}

// S = softcap tanh(S rate / softcap), in units of log 2.
inline void cap_scores(float *scores, int n, float rate, float softcap) {
  vf factor = set1(rate / softcap), cap = set1(softcap * LOG2E);
  for (int i = 0; i < n * TQ; i += W) store(scores + i, capped(mul(load(scores + i), factor), cap));
}

// Takes the sink into the sums.  Where it drowns the keys, the sum becomes infinite and the output 0.
inline void take_sink(State *state, float sink) {
  for (int i = 0; i < TQ; i += W) {
    vf most = load(state->maximum + i), top = max(set1(sink * LOG2E), most);
    vf weight = div(exp2_falling<5>(sub(set1(sink * LOG2E), top)), exp2_falling<5>(sub(most, top)));
    store(state->sum + i, add(load(state->sum + i), weight));
  }
}

// The tile's rows of the output: O[dim][TQ], divided by the sums; zeros where a query attended nothing.
template <class T>
inline void write_out(const Head &h, const float *o, const State *state, int64_t q0) {
  const fg_attention_args *a = h.a;
  int dim = static_cast<int>(a->dim);
  for (int i = 0; i < TQ; i += W) {
    vf sum = load(state->sum + i);
    vf inverse = select_gt(sum, set1(0.0f), div(set1(1.0f), sum), sum);  // keeps NaN
    int rows = static_cast<int>(a->queries - q0 - i < W ? a->queries - q0 - i : W);
    for (int d = 0; d < dim; d += W) {
      alignas(64) float block[W * W], turned[W * W];
      int n = dim - d < W ? dim - d : W;
      for (int j = 0; j < n; ++j) store(block + j * W, mul(load(o + (d + j) * TQ + i), inverse));
      for (int j = n; j < W; ++j) store(block + j * W, set1(0.0f));
      transpose(block, W, turned, W);
      T *out = reinterpret_cast<T *>(h.out) + (q0 + i) * a->out_row + d;
      for (int r = 0; r < rows; ++r) {
        if (n == W)
          store(out + r * a->out_row, load(turned + r * W));
        else
          store_n(out + r * a->out_row, load(turned + r * W), n);
      }
    }
  }
}

}  // namespace
