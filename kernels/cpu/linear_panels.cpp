// levels: scalar avx2 avx512 neon
// A linear layer's weight in panels, 32 rows by words of columns: two of bfloat16, four of int8 in whole steps of a tile;
// 16 rows by one of float32.  See kernels/linear_panels.py.
#include "abi.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t kWords = 32;              // of columns that are turned together
constexpr int64_t kItem = 1 << 10;          // words of a panel that are worth a thread
constexpr int64_t kTile = 16;               // words of a step
template <class Out>
constexpr int64_t kRows = sizeof(Out) == 4 ? 16 : 32;  // of a panel

FG_INLINE void values(const bf16 *from, int64_t n, bf16 *to) { memcpy(to, from, static_cast<size_t>(n) * 2); }
FG_INLINE void values(const float *from, int64_t n, bf16 *to) {
  vectors(n, [&](int64_t i, int some) { put(to + i, part(from + i, some), some); });
}
FG_INLINE void values(const float *from, int64_t n, float *to) { memcpy(to, from, static_cast<size_t>(n) * 4); }
FG_INLINE void values(const int8_t *from, int64_t n, int8_t *to) { memcpy(to, from, static_cast<size_t>(n)); }

// Words [k, last) of panel p: the rows of the gate first, where there is one, as many as of the weight then.
template <class T, class Out>
void turn(const fg_linear_panels_args *a, int64_t p, int64_t k, int64_t last, Out *out) {
  constexpr int64_t PER = 4 / sizeof(Out), TOGETHER = PER * kWords, ROWS = kRows<Out>;
  const int64_t own = a->gate ? ROWS / 2 : ROWS;
  Out rows[ROWS][TOGETHER + PER] = {};  // an odd number of words apart
  for (; k < last; k += kWords) {
    int64_t columns = a->width - PER * k < TOGETHER ? a->width - PER * k : TOGETHER;
    columns = columns < 0 ? 0 : columns;
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t row = p * own + r % own;
      const T *weight = static_cast<const T *>(a->gate && r < own ? a->gate : a->weight);
      if (row >= a->outputs) continue;
      values(weight + row * a->width + PER * k, columns, rows[r]);
      memset(rows[r] + columns, 0, static_cast<size_t>(TOGETHER - columns) * sizeof(Out));
    }
    for (int64_t i = 0; i < kWords && k + i < last; ++i)
      for (int64_t r = 0; r < ROWS; ++r) memcpy(out + ((k + i) * ROWS + r) * PER, rows[r] + PER * i, 4);
  }
}

template <class T, class Out>
int panels(const fg_linear_panels_args *a) {
  constexpr int64_t PER = 4 / sizeof(Out), STEP = PER == 4 ? kTile : 1, ROWS = kRows<Out>;
  const int64_t own = a->gate ? ROWS / 2 : ROWS, words = (a->width + PER * STEP - 1) / (PER * STEP) * STEP;
  const int64_t parts = (words + kItem - 1) / kItem;
  return parallel_for((a->outputs + own - 1) / own * parts, 1, [&](int64_t item) {
    const int64_t p = item / parts, k = item % parts * kItem;
    turn<T>(a, p, k, k + kItem < words ? k + kItem : words, static_cast<Out *>(a->out) + p * words * ROWS * PER);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(linear_panels)(const fg_linear_panels_args *a) {
  if (!a->outputs || !a->width) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return a->out_dtype == FG_FLOAT32 ? panels<float, float>(a) : panels<float, bf16>(a);
    case FG_BFLOAT16: return panels<bf16, bf16>(a);
    case FG_INT8: return panels<int8_t, int8_t>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
