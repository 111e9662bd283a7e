// How rows of T are multiplied where there is no better way: widened to float32, a query at a time.
#pragma once

namespace {

// body(M, first) for groups of `most`, four or two, and less, of `rows`; M is a constant.
template <class F>
FG_INLINE void in_groups(int most, int rows, const F &body) {
  int m = 0;
  for (; most >= 4 && m + 4 <= rows; m += 4) body(std::integral_constant<int, 4>(), m);
  for (; m + 2 <= rows; m += 2) body(std::integral_constant<int, 2>(), m);
  if (m < rows) body(std::integral_constant<int, 1>(), m);
}

// How many groups that makes.
FG_INLINE int groups_of(int most, int rows) {
  return most >= 4 ? rows / 4 + rows % 4 / 2 + rows % 2 : rows / 2 + rows % 2;
}

// The sums over the lanes of four vectors, each added up in hsum's order.
FG_INLINE void hsum4(const vf (&x)[4], float *to) {
#if defined(FG_HAS_AVX512)
  vf ab = add(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
  vf cd = add(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
  vf four = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  four = add(four, _mm512_permute_ps(four, 0x4e));
  four = add(four, _mm512_permute_ps(four, 0xb1));
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four)));
#elif defined(FG_LEVEL_AVX2)
  vf ab = add(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
  vf cd = add(_mm256_permute2f128_ps(x[2], x[3], 0x20), _mm256_permute2f128_ps(x[2], x[3], 0x31));
  vf four = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));  // a a c c, b b d d
  four = add(four, _mm256_movehdup_ps(four));
  __m128 acbd = _mm_shuffle_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1), 0x88);
  _mm_storeu_ps(to, _mm_permute_ps(acbd, 0xd8));
#else
  for (int i = 0; i < 4; ++i) to[i] = hsum(x[i]);
#endif
}

// to[m * ROW + r] = q[m] . k[r] for M queries, R keys; `ahead` is what will be read later.
template <int M, int R, class T>
FG_INLINE void dots(const float *q, const T *k, Ahead &ahead, int64_t stride, int dim, float *to) {
  vf sum[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[m][r] = set1(0.0f);
  int whole = dim / W * W;
  // Row after row: memory is read in its own order.  Four queries of eight lanes are bound by the products, whose sums
  // wait for each other unless there are eight.
  constexpr int TOGETHER = W == 8 && M == 4 && R == 4 ? 2 : 1;
#pragma GCC unroll 4
  for (int r = 0; r < R; r += TOGETHER)
    for (int d = 0; d < whole; d += W) {
      ahead.ask(TOGETHER * W * sizeof(T));
      vf x[TOGETHER];
#pragma GCC unroll 2
      for (int i = 0; i < TOGETHER; ++i) x[i] = load(k + (r + i) * stride + d);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        vf own = load(q + m * WIDE + d);
#pragma GCC unroll 2
        for (int i = 0; i < TOGETHER; ++i) sum[m][r + i] = fma(own, x[i], sum[m][r + i]);
      }
    }
  if (whole < dim) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      ahead.ask(W * sizeof(T));
      vf x = load_n(k + r * stride + whole, dim - whole);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = fma(load(q + m * WIDE + whole), x, sum[m][r]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    if constexpr (R == 4)
      hsum4(sum[m], to + m * ROW);
    else
      to[m * ROW] = hsum(sum[m][0]);
  }
}

template <int M, class T>
void all_dots(const float *q, const T *k, Ahead &ahead, int64_t stride, int n, int dim, float *s) {
  if (n == 4)
    dots<M, 4>(q, k, ahead, stride, dim, s);
  else
    for (int r = 0; r < n; ++r) dots<M, 1>(q, k + r * stride, ahead, stride, dim, s + r);
}

template <class T>
struct FloatFew : Vectors {
  using element = T;

  static void take_query(const T *from, int dim, int m, char *to) {
    float *at = reinterpret_cast<float *>(to) + m * WIDE;
    vectors(dim, [&](int64_t d, int n) { store(at + d, part(from + d, n)); });
  }
  // to[m * ROW + r] = q[m] . k[r] for the rows m of a key head and `count` keys.
  static void scores(const char *q, int rows, const T *k, Ahead &ahead, int64_t stride, int count, int dim, float *to) {
    for (int r = 0, n; r < count; r += n) {
      n = count - r < 4 ? count - r : 4;
      in_groups(4, rows, [&](auto M, int m) {
        const float *from = reinterpret_cast<const float *>(q) + m * WIDE;
        all_dots<M.value>(from, k + r * stride, ahead, stride, n, dim, to + m * ROW + r);
      });
    }
  }

  static int groups(int rows) { return groups_of(4, rows); }  // that scores() makes

  // The scores from s[r] on become BLOCK weights; `sum`, of each lane, with theirs.
  FG_INLINE vf weigh(float *s, int r, vf shift, vf sum) {
    for (int end = r + BLOCK; r < end; r += W) {
      vf p = exp2_falling<5>(sub(load(s + r), shift));
      store(s + r, p);
      sum = add(sum, p);
    }
    return sum;
  }
  static int whole_run(int count, int) { return count; }

  // o[m] += sum over n keys of p[m][key] v[key], for M queries and C vectors of dims, the last of `lanes`.
  template <int M, int C>
  FG_INLINE void blend(const float *p, const T *v, Ahead &ahead, int64_t stride, int n, int lanes, float *o) {
    vf sum[M][C];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[m][c] = load(o + m * WIDE + c * W);
    for (int r = 0; r < n; ++r) {
      vf x[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        if (c % 2 == 0) ahead.ask((c + 1 < C ? 2 : 1) * W * sizeof(T));
        x[c] = c + 1 < C ? load(v + r * stride + c * W) : part(v + r * stride + c * W, lanes);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        vf one = set1(p[m * ROW + r]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[m][c] = fma(one, x[c], sum[m][c]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) store(o + m * WIDE + c * W, sum[m][c]);
  }

  // All dims of the n keys from the piece's key r on; of one or two queries whole rows, as far as registers hold them.
  template <int M>
  static void blends(const float *p, int r, const T *v, Ahead &ahead, int64_t stride, int n, int dim, float *o) {
    constexpr int MOST = W == 16 && M <= 2 ? 8 : W == 8 && M == 4 ? 2 : 4;
    p += r;
    Ahead own = ahead;
    int d = 0;
    for (; d + MOST * W < dim; d += MOST * W) blend<M, MOST>(p, v + d, own, stride, n, W, o + d);
    rest<M, MOST>(p, v + d, own, stride, n, dim - d, o + d);
    ahead = own;
  }
  template <int M, int C>
  FG_INLINE void rest(const float *p, const T *v, Ahead &ahead, int64_t stride, int n, int left, float *o) {
    if (left > (C - 1) * W) return blend<M, C>(p, v, ahead, stride, n, (left - 1) % W + 1, o);
    if constexpr (C > 1) rest<M, C - 1>(p, v, ahead, stride, n, left, o);
  }
  static void give(const float *o, int m, int, int dim, float *to) {
    o += m * WIDE;
    for (int d = 0; d < dim; d += W) store(to + d, load(o + d));
  }
};

}  // namespace
