// Weaving streams into one, and taking one apart.
//
// There are rows x across streams, stream (i, j) at base + i * outer + j * inner.  Template arguments of 0 stand for
// counts given at run time; constants let the compiler make shuffles of the loops.
#pragma once
#include "level.h"

namespace {

struct Streams {
  int64_t rows, across, outer, inner;
};

// to[(e * rows + i) * across + j] = element e of stream (i, j), for e in [0, n).
template <int ROWS, int ACROSS, class T>
FG_INLINE void weave(const T *base, const Streams &s, int64_t n, T *__restrict to) {
  const int64_t rows = ROWS ? ROWS : s.rows, across = ACROSS ? ACROSS : s.across;
  for (int64_t e = 0; e < n; ++e)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < across; ++j) to[(e * rows + i) * across + j] = base[i * s.outer + j * s.inner + e];
}

// Element e of stream (i, j) = from[(e * rows + i) * across + j]; no two streams share memory.
template <int ROWS, int ACROSS, class T>
FG_INLINE void unweave(const T *__restrict from, const Streams &s, int64_t n, T *__restrict base) {
  const int64_t rows = ROWS ? ROWS : s.rows, across = ACROSS ? ACROSS : s.across;
  const int64_t outer = s.outer, inner = s.inner;
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < across; ++j) base[i * outer + j * inner + e] = from[(e * rows + i) * across + j];
}

}  // namespace
