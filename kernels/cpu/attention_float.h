// Attention's engine in float32: any storage type, converted as blocks are packed; vectors of queries, broadcast keys.
#pragma once
#include "attention_tile.h"

namespace {

struct FloatEngine {
  static constexpr int M = W == 1 ? 4 : W == 8 ? 6 : 8;             // rows of a register block
  static constexpr int NB = 128 / M * M;                           // keys of a block
  static constexpr int64_t SCORES = static_cast<int64_t>(NB) * TQ;  // elements of S

  static int64_t q_size(int64_t dim) { return dim * TQ * 4; }
  static int64_t k_size(int64_t dim) { return NB * dim * 4; }
  static int64_t v_size(int64_t dim) { return NB * dim * 4; }
  static int64_t o_rows(int64_t dim) { return dim; }
  static int64_t p_size() { return 0; }  // the weights take the place of the scores
  static void begin() {}
  static void end() {}

  // Rows are asked for before they are read, since they lie too far apart to be guessed.
  template <class T>
  FG_INLINE void ask(const T *row, int dim) {
    for (int d = 0; d < dim; d += static_cast<int>(64 / sizeof(T))) __builtin_prefetch(row + d);
  }

  // Q[dim][TQ], times sign; zeros past the last query.
  template <class T>
  static void pack_q(const T *q, int64_t stride, int rows, int dim, float sign, void *to) {
    float *out = static_cast<float *>(to);
    for (int i = 0; i < TQ; i += W) {
      for (int r = 0; r < W; ++r) ask(q + (i + r + TQ) * stride, dim);
      for (int d = 0; d < dim; d += W) {
        alignas(64) float block[W * W], turned[W * W];
        int n = dim - d < W ? dim - d : W;
        for (int r = 0; r < W; ++r) {
          vf x = i + r < rows ? load_n(q + (i + r) * stride + d, n) : set1(0.0f);
          store(block + r * W, mul(x, set1(sign)));
        }
        transpose(block, W, turned, W);
        for (int j = 0; j < n; ++j) store(out + (d + j) * TQ + i, load(turned + j * W));
      }
    }
  }

  // [key][dim], zeros up to a whole register block.
  template <class T>
  static void pack_rows(const T *from, int64_t stride, int n, int dim, float *to) {
    for (int r = 0; r < n; ++r) {
      const T *row = from + r * stride;
      float *out = to + static_cast<int64_t>(r) * dim;
      ask(row + 12 * stride, dim);
      int d = 0;
      for (; d + W <= dim; d += W) store(out + d, load(row + d));
      if (d < dim) store_n(out + d, load_n(row + d, dim - d), dim - d);
    }
    int padded = (n + M - 1) / M * M;
    if (padded > n) memset(to + static_cast<int64_t>(n) * dim, 0, static_cast<size_t>(padded - n) * dim * 4);
  }
  template <class T>
  static void pack_k(const T *k, int64_t stride, int n, int dim, void *to) {
    pack_rows(k, stride, n, dim, static_cast<float *>(to));
  }
  template <class T>
  static void pack_v(const T *v, int64_t stride, int n, int dim, void *to) {
    pack_rows(v, stride, n, dim, static_cast<float *>(to));
  }

  // S[key][query] = k . q
  static void scores(const void *packed_q, const void *packed_k, int n, int dim, float *s) {
    const float *q = static_cast<const float *>(packed_q), *k = static_cast<const float *>(packed_k);
    for (int r = 0; r < n; r += M) {
      vf acc[M][2];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = set1(0.0f);
      for (int d = 0; d < dim; ++d) {
        vf q0 = load(q + d * TQ), q1 = load(q + d * TQ + W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          vf one = set1(k[static_cast<int64_t>(r + m) * dim + d]);
          acc[m][0] = fma(one, q0, acc[m][0]);
          acc[m][1] = fma(one, q1, acc[m][1]);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        store(s + (r + m) * TQ, acc[m][0]);
        store(s + (r + m) * TQ + W, acc[m][1]);
      }
    }
  }

  // S becomes the weights exp2(S rate - shift); their sums are added to the state's.
  static void weigh(float *s, int n, float rate, const float *shift, State *state, void *) {
    for (int i = 0; i < TQ; i += W) {
      vf down = sub(set1(0.0f), load(shift + i)), sum0 = set1(0.0f), sum1 = sum0;
      int r = 0;
      for (; r + 2 <= n; r += 2) {
        float *at = s + r * TQ + i;
        vf p0 = exp2_falling<5>(fma(load(at), set1(rate), down));
        vf p1 = exp2_falling<5>(fma(load(at + TQ), set1(rate), down));
        store(at, p0);
        store(at + TQ, p1);
        sum0 = add(sum0, p0);
        sum1 = add(sum1, p1);
      }
      if (r < n) {
        float *at = s + r * TQ + i;
        vf p0 = exp2_falling<5>(fma(load(at), set1(rate), down));
        store(at, p0);
        sum0 = add(sum0, p0);
      }
      store(state->sum + i, add(load(state->sum + i), add(sum0, sum1)));
    }
  }

  template <int ROWS>
  FG_INLINE void gather(const float *p, const float *v, int n, int dim, const float *alpha, bool first, float *o) {
    vf acc[ROWS][2];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
      for (int j = 0; j < 2; ++j) acc[m][j] = first ? set1(0.0f) : mul(load(o + m * TQ + j * W), load(alpha + j * W));
    for (int r = 0; r < n; ++r) {
      vf p0 = load(p + r * TQ), p1 = load(p + r * TQ + W);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        vf one = set1(v[static_cast<int64_t>(r) * dim + m]);
        acc[m][0] = fma(one, p0, acc[m][0]);
        acc[m][1] = fma(one, p1, acc[m][1]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
      for (int j = 0; j < 2; ++j) store(o + m * TQ + j * W, acc[m][j]);
  }

  // How many of the rows of O that are left to take: as few parts as possible, of nearly one size.
  static int next_rows(int left) {
    if (M == 6 && left != 6 && left <= 10) return left > 8 || left == 5 ? 5 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    return left >= M ? M : left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }

  // O[dim][query] = alpha O + v p
  static void gather_all(const float *s, const void *, const void *packed_v, int n, int dim, const State *state,
                         bool first, bool, float *o) {
    const float *v = static_cast<const float *>(packed_v);
    for (int d = 0, rows; d < dim; d += rows) {
      rows = next_rows(dim - d);
      float *out = o + d * TQ;
      switch (rows) {
        case 8: gather<8>(s, v + d, n, dim, state->alpha, first, out); break;
        case 6: gather<6>(s, v + d, n, dim, state->alpha, first, out); break;
        case 5: gather<5>(s, v + d, n, dim, state->alpha, first, out); break;
        case 4: gather<4>(s, v + d, n, dim, state->alpha, first, out); break;
        case 2: gather<2>(s, v + d, n, dim, state->alpha, first, out); break;
        default: gather<1>(s, v + d, n, dim, state->alpha, first, out);
      }
    }
  }
};

}  // namespace
