// F(4 x 4, 3 x 3) by filters that are made of the weight's nine taps as a convolution goes: the 36 of a pair of channels
// would take four times the weight's memory, and with few tiles longer to read than to make.  Images of few such tiles
// take F(2 x 2, 3 x 3): four times the tiles, and 16 filters to make, not 36.
//
// All tiles of a chunk are transformed first.  A panel of outputs then goes through the inputs some at a time: their
// filters are made, and multiplied by every tile, whose sums stay in the second-level cache.  The order of a sum depends
// on the inputs alone: neither threads nor batch nor chunks change a bit.
#pragma once
#include <cstdlib>

#include "winograd.h"
#include "winograd_extend.h"

namespace {

constexpr int64_t kTaps = 9, kMade = 64;     // kMade: inputs whose filters are made at a time
constexpr int64_t kApart = (kMade + 1) * PANEL;  // from one point's to the next one's: in other sets of a cache
constexpr int64_t kLeastTiles = 24;          // of a chunk, which else takes half of the last cache

// The transforms of tiles of SIDE x SIDE pixels, 6 or 4, in one direction.
template <int SIDE>
struct Transforms {
  FG_INLINE void spread_to(const vf *d, vf *o, int s) {
    if constexpr (SIDE == 6) spread(d, o, s);
    else spread_small(d, o, s);
  }
  FG_INLINE void gather_to(const vf *m, int s, vf *o, int t) {
    if constexpr (SIDE == 6) gather(m, s, o, t);
    else gather_small(m, s, o, t);
  }
};

template <int SIDE>
struct TapWinograd {
  using In = Transforms<SIDE>;
  static constexpr int OUT = SIDE - 2, SPAN = SIDE * SIDE;  // pixels of a side that come out; points
  static constexpr int MR = W == 1 ? 2 : W == 16 ? 12 : 6;  // sums of as many vectors as two products a cycle need
  const float *taps;  // (panels, inputs, 9, PANEL)
  int64_t inputs, outputs, panels, step;
  int64_t down, across, tiles;  // of a sample, of the batch

  TapWinograd(const void *taps, int64_t batch, int64_t inputs, int64_t outputs, int64_t height, int64_t width)
      : taps(static_cast<const float *>(taps)), inputs(inputs), outputs(outputs) {
    panels = (outputs + PANEL - 1) / PANEL, step = (inputs + W - 1) / W * W;
    down = (height + OUT - 1) / OUT, across = (width + OUT - 1) / OUT, tiles = batch * down * across;
  }

  int64_t chunk() const {
    const int64_t bytes = SPAN * 4 * step + 1, most = fg_cache_bytes() / 2 / bytes / MR * MR;
    return most < kLeastTiles ? kLeastTiles : most;
  }

  // The filters of inputs [k, k + n) and a panel: u[point][kApart].
  FG_INLINE void make(const float *from, int64_t n, float *u) {
    for (int64_t k = 0; k < n; ++k, from += kTaps * PANEL)
      for (int64_t o = 0; o < PANEL; o += W) {
        vf f[SPAN];
        extend_taps<SIDE == 4 ? BY_TWO : BY_FOUR>(from + o, PANEL, f);
        for (int i = 0; i < SPAN; ++i) store(u + i * kApart + k * PANEL + o, f[i]);
      }
  }

  // m[MR][PANEL] = v[MR][n] . u, added to what is there but for the first inputs: parts by themselves, so that a sum of
  // thousands is rounded in two short chains.
  FG_INLINE void multiply(const float *v, int64_t row, int64_t n, const float *u, bool first, float *m) {
    vf sum[MR * VP];
#pragma GCC unroll 32
    for (int i = 0; i < MR * VP; ++i) sum[i] = set1(0.0f);
    for (int64_t k = 0; k < n; ++k) {
      vf f[VP];
#pragma GCC unroll 16
      for (int j = 0; j < VP; ++j) f[j] = load(u + k * PANEL + j * W);
#pragma GCC unroll 32
      for (int i = 0; i < MR; ++i) {
        const vf x = set1(v[i * row + k]);
#pragma GCC unroll 16
        for (int j = 0; j < VP; ++j) sum[i * VP + j] = fma(x, f[j], sum[i * VP + j]);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < MR * VP; ++i) {
      float *to = m + i / VP * PANEL + i % VP * W;
      store(to, first ? sum[i] : add(load(to), sum[i]));
    }
  }

  // A panel of outputs of the tiles [first, first + count), v[point][room][step] being theirs.
  template <class Put>
  int panel(int64_t p, const float *v, int64_t first, int64_t count, int64_t room, const Put &put) const {
    const int64_t words = SPAN * (kApart + room * PANEL);
    float *u = static_cast<float *>(fg_scratch(static_cast<size_t>(words) * sizeof(float)));
    if (!u) return FG_NO_MEMORY;
    float *m = u + SPAN * kApart;
    for (int64_t k = 0; k == 0 || k < inputs; k += kMade) {
      const int64_t n = inputs - k < kMade ? inputs - k : kMade;
      make(taps + (p * inputs + k) * kTaps * PANEL, n, u);
      for (int64_t i = 0; i < SPAN; ++i)
        for (int64_t t = 0; t < count; t += MR)
          multiply(v + (i * room + t) * step + k, step, n, u + i * kApart, k == 0, m + (i * room + t) * PANEL);
    }
    const int64_t from = p * PANEL, to = from + PANEL < outputs ? from + PANEL : outputs;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t tile = first + t;
      put(tile / (down * across), tile / across % down * OUT, tile % across * OUT, from, to, [&](int64_t o, vf *z) {
        vf d[SPAN], e[SIDE * OUT];
        for (int i = 0; i < SPAN; ++i) d[i] = load(m + (i * room + t) * PANEL + o - from);
        for (int i = 0; i < SIDE; ++i) In::gather_to(d + i, SIDE, e + i, SIDE);
        for (int i = 0; i < OUT; ++i) In::gather_to(e + SIDE * i, 1, z + OUT * i, 1);
      });
    }
    return FG_OK;
  }

  // As Winograd::run, but for put(sample, y, x, from, to, get): of the outputs [from, to) alone.
  template <class Fill, class Put>
  int run(const Fill &fill, const Put &put) const {
    const int64_t most = chunk() < tiles ? chunk() : (tiles + MR - 1) / MR * MR;
    const int64_t room = most | 1;  // points in other sets of a cache
    float *v = static_cast<float *>(std::malloc(static_cast<size_t>(SPAN * (room + MR) * step) * sizeof(float) + 64));
    if (!v) return FG_NO_MEMORY;
    int code = FG_OK;
    for (int64_t first = 0; first < tiles && !code; first += most) {
      const int64_t count = tiles - first < most ? tiles - first : most, whole = (count + MR - 1) / MR * MR;
      parallel_for(whole, 1 + (1 << 12) / (step + 1), [&](int64_t t) {
        const int64_t tile = first + t;
        if (t >= count) {  // multiplied with the others, and never read
          for (int i = 0; i < SPAN; ++i) memset(v + (i * room + t) * step, 0, static_cast<size_t>(step) * sizeof(float));
          return 0;
        }
        fill(tile / (down * across), tile / across % down * OUT, tile % across * OUT, [&](int64_t c, vf *d) {
          vf e[SPAN];
          for (int i = 0; i < SIDE; ++i) In::spread_to(d + i, e + i, SIDE);
          for (int i = 0; i < SIDE; ++i) In::spread_to(e + SIDE * i, d + SIDE * i, 1);
          for (int i = 0; i < SPAN; ++i) store(v + (i * room + t) * step + c, d[i]);
        });
        return 0;
      });
      code = parallel_for(panels, 1, [&](int64_t p) { return panel(p, v, first, count, room, put); });
    }
    std::free(v);
    return code;
  }
};

}  // namespace
