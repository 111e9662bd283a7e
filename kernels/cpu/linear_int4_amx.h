// Many rows of x by 4-bit weights on AMX tiles: 16 rows of x by two panels at a time.
//
// A group's codes less their zero points are unpacked once for all rows of a strip, to bytes as tdpbssd takes its right
// operand; x's codes are its left operand as they lie.  Each group's tile of sums is scaled into the strip's float sums
// while the next multiplies.
#pragma once
#include "linear_int4.h"
#include "tiles.h"

namespace {

constexpr int64_t kStrip = 128;  // rows of x: their sums by two panels, 16 KiB, stay in the first-level cache

struct Strip {
  int64_t first, last;       // rows of x
  const uint8_t *w[2];       // the panels' weights
  alignas(64) int8_t b[2][2][1024];  // a group of either panel, in blocks of 64 columns
  alignas(64) int32_t c[2][2][256];   // sums of two tiles of rows, for one to be written while the other is read
  alignas(64) float acc[kStrip][2][16];
};

// A zero point a row, 16 of them, in each of the row's four bytes.
FG_INLINE __m512i four_times(const uint8_t *zero) {
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(zero)));
  return _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
}

// The group's codes of both panels, less `zero`, to `b`; `words` of 8 columns each.
FG_INLINE void unpack_group(Strip *strip, int64_t words, const __m512i (&zero)[2]) {
  for (int p = 0; p < 2; ++p) {
    int8_t *to = strip->b[p][0];
    for (int64_t i = 0; i < words; ++i, strip->w[p] += 64, to += 128) {
      ahead(strip->w[p], 4096);
      Nibbles codes = unpack(strip->w[p]);
      _mm512_store_si512(to, _mm512_sub_epi8(codes.low, zero[p]));
      _mm512_store_si512(to + 64, _mm512_sub_epi8(codes.high, zero[p]));
    }
  }
}

// Tiles 0 and 1: sums of 16 rows of x by either panel; 2 and 3: x; 4 to 7: the weights.
template <bool TWO>
FG_INLINE void multiply(const int8_t *x, int64_t stride, int32_t (&c)[2][256]) {
  _tile_loadd(2, x, stride);
  _tile_zero(0);
  _tile_zero(1);
  _tile_dpbssd(0, 2, 4);
  _tile_dpbssd(1, 2, 6);
  if (TWO) {
    _tile_loadd(3, x + 64, stride);
    _tile_dpbssd(0, 3, 5);
    _tile_dpbssd(1, 3, 7);
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
}

template <bool TWO, class S, bool ZEROS>
void strip_by(const Job &job, Strip *strip, const int64_t (&panel)[2]) {
  const fg_linear_int4_args *a = job.a;
  const S *scale[2];
  const uint8_t *zero[2];
  for (int p = 0; p < 2; ++p) {
    strip->w[p] = static_cast<const uint8_t *>(a->weight) + panel[p] * job.padded * 8;
    scale[p] = static_cast<const S *>(a->scales) + panel[p] * a->groups * 16;
    zero[p] = static_cast<const uint8_t *>(a->zeros) + (ZEROS ? panel[p] * a->groups * 16 : 0);
  }
  memset(strip->acc, 0, static_cast<size_t>(strip->last - strip->first) * sizeof(strip->acc[0]));
  for (int64_t g = 0; g < a->groups; ++g) {
    __m512i z[2];
    for (int p = 0; p < 2; ++p) z[p] = ZEROS ? four_times(zero[p] + g * 16) : _mm512_set1_epi8(8);
    unpack_group(strip, a->group / 8, z);
    _tile_loadd(4, strip->b[0][0], 64);
    _tile_loadd(6, strip->b[1][0], 64);
    if (TWO) {
      _tile_loadd(5, strip->b[0][1], 64);
      _tile_loadd(7, strip->b[1][1], 64);
    }
    const vf s[2] = {load(scale[0] + g * 16), load(scale[1] + g * 16)};
    const int8_t *x = job.codes + g * a->group;
    multiply<TWO>(x + strip->first * job.stride, job.stride, strip->c[0]);
    for (int64_t m = strip->first, turn = 0; m < strip->last; m += 16, turn ^= 1) {
      if (m + 16 < strip->last) multiply<TWO>(x + (m + 16) * job.stride, job.stride, strip->c[turn ^ 1]);
      const int64_t rows = strip->last - m < 16 ? strip->last - m : 16;
      for (int64_t r = 0; r < rows; ++r) {
        const float by = job.scale[g * job.rows + m + r];
        float *acc = strip->acc[m - strip->first + r][0];
        for (int p = 0; p < 2; ++p) {
          vf sum = to_float(_mm512_load_si512(strip->c[turn][p] + r * 16));
          store(acc + p * 16, group_into(load(acc + p * 16), sum, s[p], by));
        }
      }
    }
  }
}

template <class T, class S, bool ZEROS>
int tiled(const Job &job) {
  const fg_linear_int4_args *a = job.a;
  const int64_t panels = (a->out_features + 15) / 16, pairs = (panels + 1) / 2;
  const int64_t chunks = (job.rows + kStrip - 1) / kStrip;
  return parallel_for(pairs * chunks, 1, [&](int64_t item) {
    Strip strip;
    strip.first = item / pairs * kStrip;
    strip.last = strip.first + kStrip < job.rows ? strip.first + kStrip : job.rows;
    const int64_t one = item % pairs * 2, panel[2] = {one, one + 1 < panels ? one + 1 : one};
    TileConfig config = whole_tiles();
    if (a->group == 32) {
      config.row_bytes[2] = 32;
      config.rows[4] = config.rows[6] = 8;
    }
    load_tiles(config);
    a->group == 128 ? strip_by<true, S, ZEROS>(job, &strip, panel) : strip_by<false, S, ZEROS>(job, &strip, panel);
    _tile_release();
    for (int64_t m = strip.first; m < strip.last; ++m)
      for (int p = 0; p < 2 && (p == 0 || panel[1] != one); ++p)
        write<T>(job, panel[p], m, strip.acc[m - strip.first][p]);
    return 0;
  });
}

}  // namespace
