// Many rows of x by a weight in panels (kernels/linear_panels.py): products of bfloat16 or float32, sums in float32.
//
// A tile is some rows of x by one panel, its sums in registers from the first column of x to the last: an element is
// the same sum whatever the other rows are, and is rounded once.  x is read where it lies, a pair of neighbours for all
// lanes; a block of its rows stays in the second-level cache while the panels go past it, each asked for while the one
// before it is used.
#pragma once
#include "packed_linear_float.h"
#include "quantized.h"

namespace {

#if defined(FG_HAS_AVX512)
constexpr int kRows = 8;  // sixteen sums: as many as two products a cycle of six cycles each need, and some more
#elif defined(FG_LEVEL_AVX2) || defined(FG_LEVEL_NEON)
constexpr int kRows = 2;
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kTall = 128;       // rows of x in a block at the most
constexpr int64_t kGroup = 1 << 18;  // bytes of panels that a block goes through before the next block does
constexpr int64_t kItem = 1 << 21;   // multiply-adds that are worth a thread

using Sums = vf[kRows * kParts];  // row by row

// Adds one pair of columns of the panel times that of each row of x.
FG_INLINE void step(const bf16 *panel, const uint32_t (&x)[kRows], Sums &sums) {
#if defined(FG_HAS_AVX512_BF16)
  const __m512bh left = (__m512bh)_mm512_loadu_si512(panel), right = (__m512bh)_mm512_loadu_si512(panel + kPanel);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(x[r]));
    sums[2 * r] = _mm512_dpbf16_ps(sums[2 * r], left, both);
    sums[2 * r + 1] = _mm512_dpbf16_ps(sums[2 * r + 1], right, both);
  }
#else
  for (int v = 0; v < kParts; ++v) {
    vf even, odd;
    deinterleave(load(panel + 2 * v * W), load(panel + 2 * v * W + W), even, odd);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint32_t bits[] = {x[r] << 16, x[r] & 0xffff0000u};
      float both[2];
      memcpy(both, bits, 8);
      vf &sum = sums[r * kParts + v];
      sum = fma(odd, set1(both[1]), fma(even, set1(both[0]), sum));
    }
  }
#endif
}

// A panel of bfloat16: pairs of columns of 32 rows of the weight.
struct Pairs {
  using T = bf16;
  static constexpr int ROWS = kRows, PARTS = kParts, PER = 2;  // PER: columns of a word
  static constexpr int64_t BLOCK = 5 << 17;                        // bytes of x in a block

  // As Floats has it.
  FG_INLINE void multiply(const bf16 *panel, const bf16 *const (&x)[kRows], int64_t width, int64_t below,
                          const bf16 *next, int64_t lines, Sums &sums) {
#pragma GCC unroll 32
    for (vf &sum : sums) sum = set1(0.0f);
    const int64_t pairs = width / 2;
    uint32_t both[kRows];
    for (int64_t from = 0; from < pairs; from += kChunk) {
      for (int64_t line = 0; line < lines; ++line, next += 32) __builtin_prefetch(next, 0, 2);
      for (int r = 0; below && r < kRows; ++r) __builtin_prefetch(x[r] + 2 * from + below);
      const int64_t end = from + kChunk < pairs ? from + kChunk : pairs;
      for (int64_t i = from; i < end; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) memcpy(both + r, x[r] + 2 * i, 4);
        step(panel + i * 2 * kPanel, both, sums);
      }
    }
    if (width % 2) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) both[r] = x[r][2 * pairs].bits;
      step(panel + pairs * 2 * kPanel, both, sums);
    }
  }
};

template <class T = bf16, class A>
FG_INLINE const T *row_of(const A *a, int64_t far, int64_t near) {
  return static_cast<const T *>(a->x) + far * a->x_outer + near * a->x_inner;
}

// Rows [m, last) of x, ROWS of them at a time, by one panel, the `first` of a block or not, with `more` behind it.  Tail
// says how many COLUMNS of the output it makes, and puts the sums there.
template <class Form, class Tail, class A>
inline void panel_by(const A *a, int64_t p, int64_t m, int64_t last, bool first, bool more) {
  using T = typename Form::T;
  constexpr int ROWS = Form::ROWS, LINE = 64 / sizeof(T);
  constexpr int64_t WORD = Form::PARTS * W * Form::PER, LINES = kChunk * WORD / LINE;  // elements; of a chunk of words
  const int64_t words = (a->width + Form::PER - 1) / Form::PER, chunks = (a->width / Form::PER + kChunk - 1) / kChunk;
  const int64_t tiles = (last - m + ROWS - 1) / ROWS, lines = more ? (LINES + tiles - 1) / tiles : 0;
  const T *panel = static_cast<const T *>(a->panels) + p * words * WORD, *next = panel + words * WORD;
  const int64_t below = first ? ROWS * a->x_inner : 0;
  const int64_t column = p * Tail::COLUMNS, left = a->out_features - column;
  for (int64_t far = m / a->inner, near = m % a->inner; m < last; m += ROWS, next += chunks * lines * LINE) {
    const int rows = static_cast<int>(last - m < ROWS ? last - m : ROWS);
    const T *x[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      x[r] = r < rows ? row_of<T>(a, far, near) : x[0];
      if (r < rows && ++near == a->inner) near = 0, ++far;
    }
    const int64_t at = m * a->out_features + column;
    for (int r = 0; r < rows; ++r) Tail::ahead(a, at + r * a->out_features);
    vf sums[ROWS * Form::PARTS];
    Form::multiply(panel, x, a->width, below, next, lines, sums);
    if (left >= Tail::COLUMNS)
      Tail::put(a, sums, rows, at, column, static_cast<int64_t>(Tail::COLUMNS));
    else
      Tail::put(a, sums, rows, at, column, left);
  }
}

template <class Form, class Tail, class A>
int in_blocks(const A *a) {
  constexpr int64_t SIZE = sizeof(typename Form::T), PANEL = Form::PARTS * W, ROWS = Form::ROWS;
  const int64_t rows = a->outer * a->inner, threads = fg_threads();
  const int64_t panels = (a->out_features + Tail::COLUMNS - 1) / Tail::COLUMNS, bytes = SIZE * PANEL * a->width + 1;
  int64_t tall = Form::BLOCK / (SIZE * a->width + 1);
  tall = tall < ROWS ? ROWS : tall > kTall ? kTall : tall;
  tall = (rows + (rows + tall - 1) / tall - 1) / ((rows + tall - 1) / tall);  // blocks of one size
  tall = (tall + ROWS - 1) / ROWS * ROWS;
  const int64_t blocks = (rows + tall - 1) / tall;
  // What is larger is read from memory once: the weight group by group, each by all blocks, or x.
  const bool by_group = panels * PANEL > rows;
  int64_t groups = by_group ? panels * bytes / kGroup : 1;
  groups = groups * blocks < 8 * threads ? (8 * threads + blocks - 1) / blocks : groups;
  const int64_t some = groups > panels ? 1 : (panels + groups - 1) / groups;
  groups = (panels + some - 1) / some;
  const int64_t grain = 1 + kItem / (tall * some * PANEL * a->width + 1);
  return parallel_for(blocks * groups, grain, [&](int64_t item) {
    const int64_t block = by_group ? item % blocks : item / groups, group = by_group ? item / blocks : item % groups;
    const int64_t first = block * tall, last = first + tall < rows ? first + tall : rows;
    for (int64_t p = group * some; p < (group + 1) * some && p < panels; ++p)
      panel_by<Form, Tail>(a, p, first, last, p == group * some, p + 1 < panels);
    return 0;
  });
}

}  // namespace

#if defined(FG_LEVEL_AMX)
#include "packed_linear_amx.h"
#else
namespace {
template <class Tail, class A>
int product(const A *a) {
  return in_blocks<Pairs, Tail>(a);
}
}  // namespace
#endif
