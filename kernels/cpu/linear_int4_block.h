// Rows of x by 4-bit weights, six by four panels at a time, a group's sums in registers (int8 inputs: on AMX tiles
// where there are any).
//
// A block of the panels is unpacked once for all rows of a strip, into the first-level cache.  Every step takes 4 bytes
// of a row of x: four codes by the weight's as they are, the sums beginning at -zero times the sum of x's codes; or two
// bfloat16 or one float32 by the weight's codes less their zero points, exact in either.
#pragma once
#include "linear_int4.h"

namespace {

enum Kind : int { FLOATS = 1, HALVES = 2, BYTES = 4 };  // columns of a step

constexpr int64_t kShared = 128;    // rows of int8 inputs past which sharing pays, but for groups of 32
constexpr int64_t kLong = 512;      // rows of a strip: their block of x, and their sums, stay in the second-level cache
constexpr int64_t kSteps = 128;     // of a block: 32 KiB, whole groups
constexpr int kWide = 4, kTall = 6;  // panels, rows of x: 24 sums

struct Block {
  const int8_t *x;                                    // of the job: rows of `stride` bytes
  int64_t first, last;                                // rows of x
  alignas(64) uint8_t w[kSteps][kWide][64];
  alignas(64) float scale[kSteps / 8][kWide][16];     // of the block's groups
  alignas(64) int32_t zero[kSteps / 8][kWide][16];
  alignas(64) float acc[kLong][kWide][16];
};

// f(row, panel) for each of a tile's: unrolled before the compiler decides what lies in registers.
template <int ROWS, int I = 0, class F>
FG_INLINE void each(const F &f) {
  if constexpr (I < ROWS * kWide) {
    f(I / kWide, I % kWide);
    each<ROWS, I + 1>(f);
  }
}

// Eight columns of sixteen rows, to the steps that begin with `to`.
template <Kind KIND>
FG_INLINE void unpack_word(const uint8_t *w, __m512i zero, uint8_t (*to)[kWide][64]) {
  if constexpr (KIND == BYTES) {
    const Nibbles codes = unpack(w);
    _mm512_store_si512(to[0][0], codes.low);
    _mm512_store_si512(to[1][0], codes.high);
  } else if constexpr (KIND == HALVES) {  // code - zero + 16 finds a bfloat16 among thirty-two
    alignas(64) static constexpr uint16_t table[32] = {
        0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0,
        0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i shift = _mm512_sub_epi32(_mm512_set1_epi32(16), zero);
    const __m512i offset = _mm512_or_si512(shift, _mm512_slli_epi32(shift, 16));
    const Nibbles codes = unpack(w);
    const __m512i mask = _mm512_set1_epi16(255), values = _mm512_load_si512(table);
    const __m512i half[2] = {codes.low, codes.high};
    for (int h = 0; h < 2; ++h) {  // bytes 0 to 3 of a lane are columns: pairs are bytes 0 and 1, 2 and 3
      const __m512i even = _mm512_and_si512(half[h], mask), odd = _mm512_srli_epi16(half[h], 8);
      const __m512i a = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
      const __m512i b = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
      _mm512_store_si512(to[2 * h][0], _mm512_permutexvar_epi16(_mm512_add_epi16(a, offset), values));
      _mm512_store_si512(to[2 * h + 1][0], _mm512_permutexvar_epi16(_mm512_add_epi16(b, offset), values));
    }
  } else {
    const __m512i words = _mm512_loadu_si512(w);
    const vf less = to_float(zero);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(words, 8 * (j % 4) + 4 * (j / 4)), _mm512_set1_epi32(15));
      _mm512_store_ps(to[j][0], sub(to_float(code), less));
    }
  }
}

// Columns [k, k + depth) of four panels, their scales and zero points.
template <Kind KIND, class S, bool ZEROS>
inline void unpack_block(const Job &job, int64_t panel, int64_t k, int64_t depth, Block *block) {
  const fg_linear_int4_args *a = job.a;
  for (int p = 0; p < kWide; ++p) {
    const uint8_t *w = weights_at(job, panel + p, k);
    const int64_t at = (panel_of(job, panel + p) * a->groups + k / a->group) * 16;
    for (int64_t g = 0, i = 0; g < depth / a->group; ++g) {
      __m512i zero = _mm512_set1_epi32(8);
      if (ZEROS) zero = _mm512_cvtps_epi32(load_zeros(static_cast<const uint8_t *>(a->zeros) + at + g * 16));
      store(block->scale[g][p], load(static_cast<const S *>(a->scales) + at + g * 16));
      _mm512_store_si512(block->zero[g][p], zero);
      for (const int64_t end = i + a->group; i < end; i += 8, w += 64)
        unpack_word<KIND>(w, zero, reinterpret_cast<uint8_t(*)[kWide][64]>(block->w[i / KIND][p]));
    }
  }
}

template <Kind KIND>
FG_INLINE __m512i multiply_add(__m512i sum, __m512i w, __m512i x) {
  if constexpr (KIND == BYTES) return _mm512_dpbusd_epi32(sum, w, x);
  const __m512 y = _mm512_castsi512_ps(sum);
  if constexpr (KIND == HALVES) return _mm512_castps_si512(_mm512_dpbf16_ps(y, (__m512bh)w, (__m512bh)x));
  return _mm512_castps_si512(fma(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), y));
}

// Adds the block's `depth` columns, times those of ROWS rows of x from row m on, to their sums.
template <Kind KIND, bool ZEROS, int ROWS>
inline void multiply(const Job &job, Block *block, int64_t m, int64_t k, int64_t depth, Ahead<16 * KIND> next) {
  const int64_t group = job.a->group, stride = job.stride;
  float(*acc)[kWide][16] = block->acc + m - block->first;
  for (int64_t g = 0; g < depth / group; ++g) {
    const int64_t at = (k / group + g) * job.rows + m;
    __m512i sum[ROWS][kWide];
    each<ROWS>([&](int r, int p) __attribute__((always_inline)) {
      const int32_t total = KIND == BYTES ? static_cast<int32_t>(job.sum[at + r]) : 0;
      sum[r][p] = _mm512_set1_epi32(KIND == BYTES && ZEROS ? -total : -8 * total);
      if (KIND == BYTES && ZEROS) sum[r][p] = _mm512_mullo_epi32(sum[r][p], _mm512_load_si512(block->zero[g][p]));
    });
    const uint8_t(*w)[kWide][64] = block->w + g * group / KIND;
    const int8_t *x = block->x + m * stride + (k + g * group) / KIND * 4;
    for (int64_t i = 0; i < group / KIND; ++i) {
      next.ask();
      __m512i codes[kWide];
#pragma GCC unroll 4
      for (int p = 0; p < kWide; ++p) codes[p] = _mm512_load_si512(w[i][p]);
      each<ROWS>([&](int r, int p) __attribute__((always_inline)) {
        sum[r][p] = multiply_add<KIND>(sum[r][p], codes[p], four(x + r * stride + i * 4));
      });
    }
    each<ROWS>([&](int r, int p) __attribute__((always_inline)) {
      asm("" : "+v"(sum[r][p]));  // GCC 12 would mix in what follows, and spill
    });
    each<ROWS>([&](int r, int p) __attribute__((always_inline)) {
      const vf scale = load(block->scale[g][p]), so_far = load(acc[r][p]);
      store(acc[r][p], KIND == BYTES ? group_into(so_far, to_float(sum[r][p]), scale, job.scale[at + r])
                                     : fma(_mm512_castsi512_ps(sum[r][p]), scale, so_far));
    });
  }
  next.rest();
}

template <Kind KIND, bool ZEROS>
inline void any_rows(const Job &job, Block *block, int64_t rows, int64_t m, int64_t k, int64_t depth,
                     const Ahead<16 * KIND> &next) {
  switch (rows) {
    case 1: return multiply<KIND, ZEROS, 1>(job, block, m, k, depth, next);
    case 2: return multiply<KIND, ZEROS, 2>(job, block, m, k, depth, next);
    case 3: return multiply<KIND, ZEROS, 3>(job, block, m, k, depth, next);
    case 4: return multiply<KIND, ZEROS, 4>(job, block, m, k, depth, next);
    case 5: return multiply<KIND, ZEROS, 5>(job, block, m, k, depth, next);
    default: return multiply<KIND, ZEROS, kTall>(job, block, m, k, depth, next);
  }
}

// The strip's rows of the output in the columns of four panels.
template <Kind KIND, class T, class S, bool ZEROS>
void strip_of(const Job &job, Block *block, int64_t panel) {
  const int64_t tiles = (block->last - block->first + kTall - 1) / kTall, deep = kSteps * KIND;
  constexpr int64_t lines = kWide * 16 * KIND;  // of a block as it lies
  memset(block->acc, 0, static_cast<size_t>(block->last - block->first) * sizeof(block->acc[0]));
  for (int64_t k = 0; k < job.padded; k += deep) {
    const int64_t depth = job.padded - k < deep ? job.padded - k : deep;
    const bool more = k + deep < job.padded;
    unpack_block<KIND, S, ZEROS>(job, panel, k, depth, block);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = block->first + tile * kTall, rows = block->last - m < kTall ? block->last - m : kTall;
      const uint8_t *then = more ? weights_at(job, panel, k + deep) : weights_at(job, panel + kWide, 0);
      any_rows<KIND, ZEROS>(job, block, rows, m, k, depth,
                            {then, job.padded * 8, lines * tile / tiles, lines * (tile + 1) / tiles});
    }
  }
  for (int64_t m = block->first; m < block->last; ++m)
    for (int64_t p = 0; p < kWide && (panel + p) * 16 < job.a->out_features; ++p)
      write<T>(job, panel + p, m, block->acc[m - block->first][p]);
}

// x: rows of job.stride bytes, zero past their ends.
template <Kind KIND, class T, class S, bool ZEROS>
int blocked(const Job &job, const void *x) {
  const int64_t wide = (job.a->out_features + 63) / 64, wanted = 4 * fg_threads();
  int64_t tall = kLong, strips = (job.rows + tall - 1) / tall;
  for (; wide * strips < wanted && tall > 8 * kTall; strips = (job.rows + tall - 1) / tall) tall /= 2;
  return parallel_for(wide * strips, 1, [&](int64_t item) {
    Block block;
    block.x = static_cast<const int8_t *>(x);
    block.first = item / wide * tall;
    block.last = block.first + tall < job.rows ? block.first + tall : job.rows;
    strip_of<KIND, T, S, ZEROS>(job, &block, item % wide * kWide);
    return 0;
  });
}

}  // namespace
