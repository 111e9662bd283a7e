// The scores of a few queries with AVX-512: two queries side by side in a vector, each with eight elements (float32) or
// pairs of elements (bfloat16) of its row, against 32 bytes of a key for both.
//
// The sums of four keys are then added up together, by a third of the shuffles that a query by itself would need.  A
// score is eight sums, of every eighth element or pair, whichever queries and keys were taken together.
#pragma once

namespace {

FG_INLINE vf dot_bytes(vf sum, __m512 q, __m512 k, const float *) { return _mm512_fmadd_ps(q, k, sum); }
#if defined(FG_LEVEL_AMX)
// By two products of float32: CPUs with tiles multiply vectors of bfloat16 at half the rate of those.
FG_INLINE vf dot_bytes(vf sum, __m512 q, __m512 k, const bf16 *) {
  const __m512i a = _mm512_castps_si512(q), b = _mm512_castps_si512(k), high = _mm512_set1_epi32(~0xffff);
  sum = _mm512_fmadd_ps((vf)_mm512_slli_epi32(a, 16), (vf)_mm512_slli_epi32(b, 16), sum);
  return _mm512_fmadd_ps((vf)_mm512_and_si512(a, high), (vf)_mm512_and_si512(b, high), sum);
}
#elif defined(FG_HAS_AVX512_BF16)
FG_INLINE vf dot_bytes(vf sum, __m512 q, __m512 k, const bf16 *) {
  return _mm512_dpbf16_ps(sum, (__m512bh)q, (__m512bh)k);
}
#endif

// Two queries' sums against four keys, key r's in x[r]: two quarters of a vector a query, a key a lane.
FG_INLINE vf fold(vf (&x)[4]) {
  vf ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  vf cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  return add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

template <class T>
struct PairScores {
  static constexpr int UNIT = 32;            // bytes of a key that are taken at a time
  static constexpr int PAIR = 2 * WIDE * 4;  // bytes from two queries to the next two

  FG_INLINE __mmask32 bytes_below(int n) { return n >= UNIT ? ~0u : (1u << n) - 1u; }
  FG_INLINE __m256i unit(const char *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

  // Query m's row in its place beside its neighbour's.
  static void take_query(const T *from, int dim, int m, char *to) {
    const int bytes = dim * static_cast<int>(sizeof(T));
    char *at = to + m / 2 * PAIR + m % 2 * UNIT;
    for (int d = 0; d < bytes; d += UNIT) {
      __m256i x = _mm256_maskz_loadu_epi8(bytes_below(bytes - d), reinterpret_cast<const char *>(from) + d);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(at + d * 2), x);
    }
  }

  // G pairs of queries by R keys, R being 1 or whole fours.
  template <int G, int R>
  FG_INLINE void tile(const char *q, const char *k, Ahead &ahead, int64_t stride, int bytes, float *to) {
    constexpr int SUMS = R < 4 ? 4 : R;
    vf sum[G][SUMS];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
      for (int r = 0; r < SUMS; ++r) sum[g][r] = set1(0.0f);
    auto step = [&](int d, auto take) __attribute__((always_inline)) {
      vf x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = _mm512_castsi512_ps(_mm512_broadcast_i64x4(take(k + r * stride + d)));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        vf own = load(reinterpret_cast<const float *>(q + g * PAIR + d * 2));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[g][r] = dot_bytes(sum[g][r], own, x[r], static_cast<const T *>(nullptr));
      }
    };
    int d = 0;
    for (; d + 2 * UNIT <= bytes; d += 2 * UNIT) {
      ahead.ask(R * 64);
      step(d, unit);
      step(d + UNIT, unit);
    }
    if (d < bytes) {
      ahead.ask(R * 64);
      for (; d + UNIT <= bytes; d += UNIT) step(d, unit);
      if (d < bytes) step(d, [&](const char *p) { return _mm256_maskz_loadu_epi8(bytes_below(bytes - d), p); });
    }
#pragma GCC unroll 2
    for (int r = 0; r < SUMS; r += 4) give<G>(sum, r, to + r);
  }

  // The scores against keys r to r + 3: to[m * ROW + key].  Of one key: what stands after it is written later.
  template <int G, int SUMS>
  FG_INLINE void give(vf (&sum)[G][SUMS], int r, float *to) {
    vf folded[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      vf four[4] = {sum[g][r], sum[g][r + 1], sum[g][r + 2], sum[g][r + 3]};
      folded[g] = fold(four);
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; g += 2) {
      vf a = folded[g], b = folded[G > 1 ? g + 1 : g];
      vf all = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
      float *at = to + 2 * g * ROW;
      _mm_storeu_ps(at, _mm512_castps512_ps128(all));
      _mm_storeu_ps(at + ROW, _mm512_extractf32x4_ps(all, 1));
      if constexpr (G > 1) {
        _mm_storeu_ps(at + 2 * ROW, _mm512_extractf32x4_ps(all, 2));
        _mm_storeu_ps(at + 3 * ROW, _mm512_extractf32x4_ps(all, 3));
      }
    }
  }

  // One query by eight keys, two of them side by side: its eight sums for each are tile()'s.  Of whole units.
  FG_INLINE void alone(const char *q, const char *k, Ahead &ahead, int64_t stride, int bytes, float *to) {
    vf sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int d = 0; d < bytes; d += UNIT) {
      ahead.ask(8 * UNIT);
      vf own = _mm512_castsi512_ps(_mm512_broadcast_i64x4(unit(q + d * 2)));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const char *at = k + 2 * r * stride + d;
        __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(unit(at)), unit(at + stride), 1);
        sum[r] = dot_bytes(sum[r], own, _mm512_castsi512_ps(two), static_cast<const T *>(nullptr));
      }
    }
    vf all = fold(sum);  // two quarters of keys 0, 2, 4 and 6, two of keys 1, 3, 5 and 7
    vf scores = add(_mm512_shuffle_f32x4(all, all, 0x88), _mm512_shuffle_f32x4(all, all, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, scores)));
  }

  template <int G>
  FG_INLINE void tiles(const char *q, const char *k, Ahead &ahead, int64_t stride, int count, int bytes, float *to) {
    constexpr int R = G <= 2 ? 8 : 4;
    int r = 0;
    for (; r + R <= count; r += R) tile<G, R>(q, k + r * stride, ahead, stride, bytes, to + r);
    if (R > 4 && r + 4 <= count) tile<G, 4>(q, k + r * stride, ahead, stride, bytes, to + r), r += 4;
    for (; r < count; ++r) tile<G, 1>(q, k + r * stride, ahead, stride, bytes, to + r);
  }

  static int groups(int rows) { return groups_of(4, (rows + 1) / 2); }  // that scores() makes

  // to[m * ROW + r] = q[m] . k[r] for the rows m of a key head, and one more where they are odd, and `count` keys.
  static void scores(const char *q, int rows, const T *keys, Ahead &ahead, int64_t step, int count, int dim,
                     float *to) {
    const char *k = reinterpret_cast<const char *>(keys);
    const int64_t stride = step * static_cast<int64_t>(sizeof(T));
    const int bytes = dim * static_cast<int>(sizeof(T));
    if (rows == 1 && bytes % UNIT == 0) {
      Ahead own = ahead;
      int r = 0;
      for (; r + 8 <= count; r += 8) alone(q, k + r * stride, own, stride, bytes, to + r);
      tiles<1>(q, k + r * stride, own, stride, count - r, bytes, to + r);
      ahead = own;
      return;
    }
    in_groups(4, (rows + 1) / 2, [&](auto G, int g) {
      Ahead own = ahead;  // in registers
      tiles<G.value>(q + g * PAIR, k, own, stride, count, bytes, to + 2 * g * ROW);
      ahead = own;
    });
  }
};

// Scores so, values in float32.
template <class T>
struct PairFew : FloatFew<T> {
  using Pairs = PairScores<T>;
  static int groups(int rows) { return Pairs::groups(rows); }
  static void take_query(const T *from, int dim, int m, char *to) { Pairs::take_query(from, dim, m, to); }
  static void scores(const char *q, int rows, const T *k, Ahead &ahead, int64_t stride, int count, int dim, float *to) {
    Pairs::scores(q, rows, k, ahead, stride, count, dim, to);
  }
};

}  // namespace
