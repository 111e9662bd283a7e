// The products of upsample2x_conv: packed pixels by a packed panel of filters.
//
// A unit is 32 bits: one float, or a pair of bfloat16 of neighbouring input channels.  An engine's `tile` sets
//   sums[m][n] = sum over taps t and units k of pixels[(m * step + tap[t]) + k] . panel[(t * units + k) * NR + n]
// for MR pixels and NR output channels, in the order of t and k.
#pragma once
#include "abi.h"
#include "simd.h"
#if defined(FG_LEVEL_AMX)
#include "tiles.h"
#endif

namespace {

constexpr int TAPS = 4;

FG_INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One float a unit; every element type is converted when it is packed.
struct FloatEngine {
  using unit = float;
  using element = float;  // of a unit, PER of them
  static constexpr int PER = 1, ALIGN = 1;  // input channels of a unit; a sum's units are a multiple of ALIGN
#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_NEON)
  static constexpr int MR = 8, NV = 3;
#elif defined(FG_LEVEL_AVX2)
  static constexpr int MR = 4, NV = 3;
#else
  static constexpr int MR = 2, NV = 4;
#endif
  static constexpr int NR = NV * W;
  static void begin() {}
  static void end() {}

  // The `n` channels of a pixel, contiguous.
  template <class T>
  FG_INLINE void pixel(const T *x, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i += W) {
      int some = n - i < W ? static_cast<int>(n - i) : W;
      store_n(to + i, load_n(x + i, some), some);
    }
  }
  // One tap: rows of `inputs` by `outputs` filters, `count` of them from `first` on.
  template <class T>
  FG_INLINE void filters(const T *f, int64_t inputs, int64_t outputs, int64_t first, int count, float *to) {
    for (int64_t k = 0; k < inputs; ++k)
      for (int v = 0; v < NV; ++v) {
        int some = count - v * W < 0 ? 0 : count - v * W < W ? count - v * W : W;
        const T *row = f + k * outputs + first + (some ? v * W : 0);
        store(to + k * NR + v * W, load_n(row, some));
      }
  }

  template <int VECTORS>
  FG_INLINE void product(const float *pixels, const int64_t *tap, int64_t step, int64_t units, const float *panel,
                         float *sums) {
    vf sum[MR][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[m][v] = set1(0.0f);
    for (int t = 0; t < TAPS; ++t) {
      const float *row = pixels + tap[t];
      for (int64_t k = 0; k < units; ++k, panel += NR) {
        vf f[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) f[v] = load(panel + v * W);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          vf x = set1(row[m * step + k]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[m][v] = fma(x, f[v], sum[m][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(sums + m * NR + v * W, sum[m][v]);
  }

  static void tile(const float *pixels, const int64_t *tap, int64_t step, int64_t units, const float *panel, int count,
                   float *sums) {
    if (count <= W)
      product<1>(pixels, tap, step, units, panel, sums);
    else if (count <= 2 * W)
      product<2>(pixels, tap, step, units, panel, sums);
    else
      product<NV>(pixels, tap, step, units, panel, sums);
  }
};

#if defined(FG_HAS_AVX512_BF16)

// Packing of bfloat16 pairs, for both of the engines below.
template <int COLUMNS>
struct Pairs {
  using unit = uint32_t;
  using element = bf16;
  static constexpr int PER = 2, NR = COLUMNS;

  FG_INLINE void pixel(const bf16 *x, int64_t n, uint32_t *to) { memcpy(to, x, static_cast<size_t>(n) * sizeof(bf16)); }
  FG_INLINE void filters(const bf16 *f, int64_t inputs, int64_t outputs, int64_t first, int count, uint32_t *to) {
    for (int64_t k = 0; k < inputs; k += 2)
      for (int n = 0; n < NR; n += 16) {
        int some = count - n < 0 ? 0 : count - n < 16 ? count - n : 16;
        const bf16 *row = f + k * outputs + first + (some ? n : 0);
        const __mmask16 low = lanes_below(some), high = k + 1 < inputs ? low : static_cast<__mmask16>(0);
        __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, row));
        __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, row + (high ? outputs : 0)));
        _mm512_storeu_si512(to + k / 2 * NR + n, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
  }
};

#endif

#if defined(FG_LEVEL_AMX)

// Tiles of 16 pixels by 32 input channels and of 32 input channels by 16 outputs, two of each: four tiles of sums.
struct Bf16Engine : Pairs<32> {
  static constexpr int MR = 32, ALIGN = 16;

  static void begin() { load_tiles(whole_tiles()); }
  static void end() { _tile_release(); }

  static void tile(const uint32_t *pixels, const int64_t *tap, int64_t step, int64_t units, const uint32_t *panel, int,
                   float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int t = 0; t < TAPS; ++t) {
      const uint32_t *row = pixels + tap[t];
      for (int64_t k = 0; k < units; k += 16, panel += 16 * NR) {
        _tile_loadd(4, row + k, step * 4);
        _tile_loadd(5, row + 16 * step + k, step * 4);
        _tile_loadd(6, panel, NR * 4);
        _tile_loadd(7, panel + 16, NR * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, NR * 4);
    _tile_stored(1, sums + 16, NR * 4);
    _tile_stored(2, sums + 16 * NR, NR * 4);
    _tile_stored(3, sums + 16 * NR + 16, NR * 4);
  }
};

#elif defined(FG_HAS_AVX512_BF16)

// vdpbf16ps: a broadcast pair of a pixel against pairs of three vectors of filters.
struct Bf16Engine : Pairs<48> {
  static constexpr int MR = 8, ALIGN = 1;
  static void begin() {}
  static void end() {}

  static void tile(const uint32_t *pixels, const int64_t *tap, int64_t step, int64_t units, const uint32_t *panel, int,
                   float *sums) {
    __m512 sum[MR][3];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) sum[m][v] = _mm512_setzero_ps();
    for (int t = 0; t < TAPS; ++t) {
      const uint32_t *row = pixels + tap[t];
      for (int64_t k = 0; k < units; ++k, panel += NR) {
        __m512bh f[3];
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) f[v] = (__m512bh)_mm512_loadu_si512(panel + 16 * v);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(row[m * step + k]));
#pragma GCC unroll 3
          for (int v = 0; v < 3; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, f[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) _mm512_storeu_ps(sums + m * NR + 16 * v, sum[m][v]);
  }
};

#endif

}  // namespace
