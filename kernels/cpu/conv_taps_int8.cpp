// levels: scalar avx2 avx512 neon
// A 3x3 weight of int8 codes laid out for products of words of four channels; see kernels/conv_taps_int8.py.
#include "abi.h"
#include "level.h"
#include "threads.h"

#include <cstring>

namespace {

constexpr int64_t TAPS = 9, GROUP = 32, WORD = 4, CHUNK = 64, TAP = CHUNK * GROUP;  // outputs; inputs; both

// Inputs [from, from + CHUNK) of 32 outputs from `first` on; adds each output's codes to its sum.
void chunk(const fg_conv_taps_int8_args *a, int64_t first, int64_t from, int8_t *to, int32_t *sums) {
  memset(to, 0, static_cast<size_t>(TAPS * TAP));
  const int64_t some = a->inputs - from < CHUNK ? a->inputs - from : CHUNK;
  for (int64_t o = 0; o < GROUP && first + o < a->outputs; ++o) {
    const int8_t *w = static_cast<const int8_t *>(a->weight) + ((first + o) * a->inputs + from) * TAPS;
    for (int64_t i = 0; i < some; ++i, w += TAPS)
      for (int64_t tap = 0; tap < TAPS; ++tap) {
        to[tap * TAP + i / WORD * GROUP * WORD + o * WORD + i % WORD] = w[tap];
        sums[o] += w[tap];
      }
  }
}

}  // namespace

extern "C" int FG_EXPORT(conv_taps_int8)(const fg_conv_taps_int8_args *a) {
  const int64_t groups = (a->outputs + GROUP - 1) / GROUP, chunks = (a->inputs + CHUNK - 1) / CHUNK;
  return parallel_for(groups, 1, [&](int64_t group) {
    int32_t *sums = static_cast<int32_t *>(a->sums) + group * GROUP;
    memset(sums, 0, GROUP * sizeof(int32_t));
    int8_t *to = static_cast<int8_t *>(a->taps) + group * chunks * TAPS * TAP;
    for (int64_t i = 0; i < chunks; ++i) chunk(a, group * GROUP, i * CHUNK, to + i * TAPS * TAP, sums);
    return 0;
  });
}
