// levels: scalar avx2 avx512 neon
// A linear layer's weight in panels of bfloat16, 32 rows by pairs of columns; see kernels/linear_panels.py.
#include "abi.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t kRows = 32, kPairs = 32;  // of a panel; pairs of columns that are turned together
constexpr int64_t kItem = 1 << 10;          // pairs of a panel that are worth a thread

FG_INLINE void halves(const bf16 *from, int64_t n, bf16 *to) { memcpy(to, from, static_cast<size_t>(n) * sizeof(bf16)); }
FG_INLINE void halves(const float *from, int64_t n, bf16 *to) {
  vectors(n, [&](int64_t i, int some) { put(to + i, part(from + i, some), some); });
}

// Pairs [k, last) of panel p: the rows of the gate first, where there is one, as many as of the weight then.
template <class T>
void turn(const fg_linear_panels_args *a, int64_t p, int64_t k, int64_t last, bf16 *out) {
  const int64_t own = a->gate ? kRows / 2 : kRows;
  bf16 rows[kRows][2 * kPairs + 2] = {};  // an odd number of pairs apart
  for (; k < last; k += kPairs) {
    const int64_t columns = a->width - 2 * k < 2 * kPairs ? a->width - 2 * k : 2 * kPairs;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = p * own + r % own;
      const T *weight = static_cast<const T *>(a->gate && r < own ? a->gate : a->weight);
      if (row >= a->outputs) continue;
      halves(weight + row * a->width + 2 * k, columns, rows[r]);
      rows[r][columns] = {};  // what pairs with the last column, where it is one alone
    }
    for (int64_t i = 0; i < kPairs && k + i < last; ++i)
      for (int64_t r = 0; r < kRows; ++r) memcpy(out + ((k + i) * kRows + r) * 2, rows[r] + 2 * i, 4);
  }
}

template <class T>
int panels(const fg_linear_panels_args *a) {
  const int64_t own = a->gate ? kRows / 2 : kRows, pairs = (a->width + 1) / 2;
  const int64_t parts = (pairs + kItem - 1) / kItem;
  return parallel_for((a->outputs + own - 1) / own * parts, 1, [&](int64_t item) {
    const int64_t p = item / parts, k = item % parts * kItem;
    turn<T>(a, p, k, k + kItem < pairs ? k + kItem : pairs, static_cast<bf16 *>(a->out) + p * pairs * kRows * 2);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(linear_panels)(const fg_linear_panels_args *a) {
  if (!a->outputs || !a->width) return FG_OK;
  switch (a->dtype) {
    case FG_FLOAT32: return panels<float>(a);
    case FG_BFLOAT16: return panels<bf16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
