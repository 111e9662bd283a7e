// levels: scalar avx2 avx512 neon
// G w G^T of int8 codes, as codes again with a scale for each point and output; see kernels/winograd_int8_filters.py.
#include "abi.h"
#include "dot.h"
#include "threads.h"

namespace {

constexpr int64_t GROUP = 32, WORD = 4, LANES = GROUP * WORD;  // outputs; inputs; both
constexpr int SPOTS = 16, TAPS = 9;

// Twice G w for three vectors `s` apart in w, the first and last not doubled; four come out, `t` apart.
FG_INLINE void widen(const vf *w, int s, vf *o, int t) {
  const vf outer = add(w[0], w[2 * s]);
  o[0] = w[0];
  o[t] = add(outer, w[s]);
  o[2 * t] = sub(outer, w[s]);
  o[3 * t] = w[2 * s];
}

// take(point, lane, values) for each point and vector of lanes of a word's filters, `from` its weights' codes.
template <class F>
FG_INLINE void points(const bf16 *from, const F &take) {
  for (int64_t lane = 0; lane < LANES; lane += W) {
    vf w[TAPS], rows[12], all[SPOTS];
    for (int i = 0; i < TAPS; ++i) w[i] = load(from + i * LANES + lane);
    for (int i = 0; i < 3; ++i) widen(w + i, 3, rows + i, 3);
    for (int i = 0; i < 4; ++i) widen(rows + 3 * i, 1, all + 4 * i, 1);
    for (int i = 0; i < SPOTS; ++i) take(i, lane, all[i]);
  }
}

// The group's weights to `to` (word, tap, output, input of the word), zeros beyond the last of either.
void turn(const fg_winograd_int8_filters_args *a, int64_t first, int64_t words, bf16 *to) {
  const int8_t *weight = static_cast<const int8_t *>(a->weight);
  memset(to, 0, static_cast<size_t>(words * TAPS * LANES) * sizeof(bf16));
  float codes[256];
  bf16 halves[256];
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<float>(i - 128);
  for (int i = 0; i < 256; i += W) store(halves + i, load(codes + i));
  for (int64_t o = 0; o < GROUP && first + o < a->outputs; ++o) {
    const int8_t *w = weight + (first + o) * a->inputs * TAPS;
    for (int64_t i = 0; i < a->inputs; ++i, w += TAPS)
      for (int tap = 0; tap < TAPS; ++tap)
        to[(i / WORD * TAPS + tap) * LANES + o * WORD + i % WORD] = halves[w[tap] + 128];
  }
}

int group_of(const fg_winograd_int8_filters_args *a, int64_t group, int64_t words) {
  const int64_t first = group * GROUP;
  bf16 *from = static_cast<bf16 *>(fg_scratch(static_cast<size_t>(words * TAPS * LANES + W) * sizeof(bf16)));
  if (!from) return FG_NO_MEMORY;
  turn(a, first, words, from);
  float top[SPOTS][LANES] = {}, rate[SPOTS][LANES];
  for (int64_t k = 0; k < words; ++k)
    points(from + k * TAPS * LANES, [&](int point, int64_t lane, vf u) {
      store(top[point] + lane, max(load(top[point] + lane), max(u, sub(set1(0.0f), u))));
    });
  float *scale = static_cast<float *>(a->out_scale) + group * SPOTS * GROUP;
  for (int point = 0; point < SPOTS; ++point) {
    const float unit = (point / 4 % 3 ? 0.5f : 1.0f) * (point % 4 % 3 ? 0.5f : 1.0f);
    for (int64_t o = 0; o < GROUP; ++o) {
      float most = 127.0f;  // what fits stays as it is
      for (int64_t j = 0; j < WORD; ++j) most = top[point][o * WORD + j] > most ? top[point][o * WORD + j] : most;
      for (int64_t j = 0; j < WORD; ++j) rate[point][o * WORD + j] = 127.0f / most;
      const float own = first + o < a->outputs ? static_cast<const float *>(a->scale)[first + o] : 0.0f;
      scale[point * GROUP + o] = most * (1.0f / 127.0f) * unit * own;
    }
  }
  uint8_t *to = static_cast<uint8_t *>(a->filters) + group * SPOTS * words * LANES;
  for (int64_t k = 0; k < words; ++k)
    points(from + k * TAPS * LANES, [&](int point, int64_t lane, vf u) {
      int8_t codes[W];
      to_codes(codes, round(mul(u, load(rate[point] + lane))), W);
      for (int i = 0; i < W; ++i) to[(point * words + k) * LANES + lane + i] = static_cast<uint8_t>(codes[i] ^ -128);
    });
  return FG_OK;
}

}  // namespace

extern "C" int FG_EXPORT(winograd_int8_filters)(const fg_winograd_int8_filters_args *a) {
  const int64_t groups = (a->outputs + GROUP - 1) / GROUP, words = (a->inputs + WORD - 1) / WORD;
  return parallel_for(groups, 1, [&](int64_t group) { return group_of(a, group, words); });
}
