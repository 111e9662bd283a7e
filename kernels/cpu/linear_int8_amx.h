// Many rows of x by int8 weights on AMX tiles: 32 rows of the weight by 32 of x at a time, sums transposed.
//
// The weight's rows are the left operand, as they lie; x's codes are packed for the right one, when they are made.  A
// block of the weight is copied once for all rows of a strip, so that its tiles neither end beyond the weight nor meet
// in one set of the cache.
#pragma once
#include "linear_int8.h"
#include "tiles.h"

namespace {

constexpr int64_t kStrip = 256;  // rows of x
constexpr int64_t kSteps = 8;   // of 64 columns, in a block of the weight

struct Strip {
  int64_t first, tiles;                    // of x: its first row, its tiles of 16 rows
  alignas(64) int8_t w[kSteps][2][16][64];  // a block of 32 rows of the weight
  alignas(64) int32_t c[kStrip / 16][2][16][16];  // (tile of x, half of the weight's rows, weight row, x row)
};

// Columns [k, k + 64 steps) of rows [n, n + 32) of the weight; zero beyond its end.
inline void copy_block(const Job &job, int64_t n, int64_t k, int64_t steps, Strip *strip) {
  for (int64_t r = 0; r < 32; ++r) {
    const bool there = n + r < job.a->out_features;
    const int8_t *row = weight_row(job, there ? n + r : 0) + k;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t left = there ? job.a->width - k - s * 64 : 0;
      const __mmask64 mask = left >= 64 ? ~0ull : left <= 0 ? 0ull : (1ull << left) - 1;
      _mm512_store_si512(strip->w[s][r / 16][r % 16], _mm512_maskz_loadu_epi8(mask, row + s * 64));
    }
  }
}

// Asks for part `turn` of `turns` of a block that will be copied next, while tiles multiply.
inline void ask_for(const Job &job, int64_t n, int64_t k, int64_t turn, int64_t turns) {
  const int64_t end = k + kSteps * 64 < job.a->width ? k + kSteps * 64 : job.a->width;
  for (int64_t r = 32 * turn / turns; r < 32 * (turn + 1) / turns && n + r < job.a->out_features; ++r)
    for (int64_t i = k; i < end; i += 64) __builtin_prefetch(weight_row(job, n + r) + i, 0, 2);
}

// Tiles 0 to 3: sums; 4, 5: the weight; 6, 7: x.  `tile` of the strip and, where TWO, the next.
template <bool TWO>
FG_INLINE void multiply(Strip *strip, const int8_t *x, int64_t next, int64_t tile, int64_t steps, bool add) {
  int32_t *c = strip->c[tile][0][0];
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    if (TWO) {
      _tile_loadd(2, c + 512, 64);
      _tile_loadd(3, c + 768, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, strip->w[s][0], 64);
    _tile_loadd(6, x + s * 1024, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, strip->w[s][1], 64);
    _tile_dpbssd(1, 5, 6);
    if (TWO) {
      _tile_loadd(7, x + next + s * 1024, 64);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  if (TWO) {
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
  }
}

// The strip's sums by rows [n, n + 32) of the weight.
inline void sums_by(const Job &job, Strip *strip, int64_t n) {
  const int64_t steps = job.padded / 64, next = job.padded * 16, pairs = (strip->tiles + 1) / 2;
  if (!steps) memset(strip->c, 0, sizeof strip->c);
  for (int64_t s = 0; s < steps; s += kSteps) {
    const int64_t here = steps - s < kSteps ? steps - s : kSteps;
    const bool more = s + kSteps < steps;
    copy_block(job, n, s * 64, here, strip);
    const int8_t *x = job.packed + strip->first * job.padded + s * 1024;
    for (int64_t i = 0, t = 0; i < pairs; ++i, t += 2) {
      ask_for(job, more ? n : n + 32, more ? (s + kSteps) * 64 : 0, i, pairs);
      t + 1 < strip->tiles ? multiply<true>(strip, x + t * next, next, t, here, s > 0)
                           : multiply<false>(strip, x + t * next, next, t, here, s > 0);
    }
  }
}

// The strip's rows of the output in columns [n, n + 32).
template <class T>
void write_out(const Job &job, const Strip &strip, int64_t n, int64_t last) {
  for (int64_t m = strip.first; m < last; m += 16)
    for (int64_t half = 0; half < 2 && n + half * 16 < job.a->out_features; ++half) {
      __m512i x[16];
      for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(strip.c[(m - strip.first) / 16][half][r]);
      transpose(x);
      const int64_t first = n + half * 16, left = job.a->out_features - first;
      for (int r = 0; r < 16 && m + r < last; ++r)
        write<T>(job, first, m + r, x[r], static_cast<int>(left < 16 ? left : 16));
    }
}

template <class T>
int tiled(const Job &job) {
  const int64_t strips = (job.rows + kStrip - 1) / kStrip, blocks = (job.a->out_features + 31) / 32;
  int64_t step = blocks * strips / (8 * fg_threads());  // neighbouring blocks: each asks for the next one's weights
  step = step < 1 ? 1 : step > 8 ? 8 : step;
  const int64_t runs = (blocks + step - 1) / step;
  return parallel_for(runs * strips, 1, [&](int64_t item) {
    Strip strip;
    strip.first = item / runs * kStrip;
    const int64_t last = strip.first + kStrip < job.rows ? strip.first + kStrip : job.rows;
    strip.tiles = (last - strip.first + 15) / 16;
    load_tiles(whole_tiles());
    for (int64_t block = item % runs * step; block < item % runs * step + step && block < blocks; ++block) {
      sums_by(job, &strip, block * 32);
      write_out<T>(job, strip, block * 32, last);
    }
    _tile_release();
    return 0;
  });
}

}  // namespace
