// Many rows of x by int8 weights with VNNI: six rows of x by 64 rows of the weight at a time, sums in registers; fewer
// rows of x as linear_int8_vnni_some.h does.
//
// A block of the weight is packed once for all rows of a strip, into the first-level cache: four columns of sixteen
// rows a vector, 128 added since the instruction wants one operand unsigned.  A row's sums begin at -128 times the sum
// of its codes, which takes that back.
#pragma once
#include "linear_int8_vnni_some.h"

namespace {

constexpr int64_t kStrip = 512;      // rows of x: their codes of a block, and their sums, stay in the next cache
constexpr int64_t kDeep = 512;       // columns of a block: 64 rows of it are 32 KiB
constexpr int kWide = 4, kTall = 6;  // vectors of the weight's rows, rows of x: 24 sums

struct Strip {
  int64_t first, last;                           // rows of x
  alignas(64) uint8_t w[kDeep / 4][kWide][64];  // a block of the weight
  alignas(64) int32_t c[kStrip][kWide * 16];
};

// Columns [k, k + depth) of rows [n, n + 64) of the weight, `depth` up to whole steps of 64; zero beyond its end.
inline void pack_block(const Job &job, int64_t n, int64_t k, int64_t depth, Strip *strip) {
  for (int v = 0; v < kWide; ++v)
    for (int64_t i = 0; i < depth; i += 64) {
      const int64_t left = job.a->width - k - i;
      const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const int64_t row = n + v * 16 + r;
        x[r] = row < job.a->out_features ? _mm512_maskz_loadu_epi8(mask, weight_row(job, row) + k + i) : zero_i();
        x[r] = _mm512_xor_si512(x[r], _mm512_set1_epi8(-128));
      }
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(strip->w[i / 4 + r][v], x[r]);
    }
}

// Rows [m, m + ROWS) of the output in columns [n, n + 64), from their sums.
template <class T, int ROWS>
FG_INLINE void put_tile(const Job &job, int64_t n, int64_t m, const __m512i (&sums)[ROWS][kWide]) {
  const float *scale = static_cast<const float *>(job.a->scale) + n;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const vf own = set1(job.scale[m + r]);
    vf y[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) y[v] = mul(to_float(sums[r][v]), mul(own, load(scale + v * W)));
    tail_of<T>(job.a, job.bias, m + r).put_all(y, n);
  }
}

// Adds the block's `depth` columns, times those of ROWS rows of x from row m on, to their sums; or begins these.  What
// comes of the last block goes to columns [n, n + 64) of the output, all of them: n is -1 where that is not so.
template <class T, int ROWS>
inline void multiply(const Job &job, Strip *strip, int64_t n, int64_t m, int64_t k, int64_t depth,
                     Ahead<kDeep / 64> next) {
  const int8_t *x = job.codes + m * job.stride + k;
  int32_t *c = strip->c[m - strip->first];
  __m512i acc[ROWS][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const auto offset = static_cast<uint32_t>(static_cast<int32_t>(job.sum[m + r])) << 7;
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v)
      acc[r][v] = k ? _mm512_load_si512(c + r * kWide * 16 + v * 16) : _mm512_set1_epi32(static_cast<int32_t>(-offset));
  }
  for (int64_t i = 0; i < depth / 4; ++i) {
    next.ask();
    __m512i w[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) w[v] = _mm512_load_si512(strip->w[i][v]);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512i codes = four(x + r * job.stride + i * 4);
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], w[v], codes);
    }
  }
  next.rest();
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) asm("" : "+v"(acc[r][v]));  // GCC 12 would keep each sum twice, and spill
  if (n >= 0) return put_tile<T, ROWS>(job, n, m, acc);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) _mm512_store_si512(c + r * kWide * 16 + v * 16, acc[r][v]);
}

template <class T>
inline void any_rows(const Job &job, Strip *strip, int64_t rows, int64_t n, int64_t m, int64_t k, int64_t depth,
                     const Ahead<kDeep / 64> &next) {
  switch (rows) {
    case 1: return multiply<T, 1>(job, strip, n, m, k, depth, next);
    case 2: return multiply<T, 2>(job, strip, n, m, k, depth, next);
    case 3: return multiply<T, 3>(job, strip, n, m, k, depth, next);
    case 4: return multiply<T, 4>(job, strip, n, m, k, depth, next);
    case 5: return multiply<T, 5>(job, strip, n, m, k, depth, next);
    default: return multiply<T, kTall>(job, strip, n, m, k, depth, next);
  }
}

template <class T>
inline void write_row(const Job &job, int64_t n, int64_t m, const int32_t *sums) {
  int64_t v = 0, left = job.a->out_features - n;
  for (; v < kWide && left >= 16; ++v, left -= 16) write<T>(job, n + v * 16, m, load_i(sums + v * 16), 16);
  if (v < kWide && left > 0) write<T>(job, n + v * 16, m, load_i(sums + v * 16), static_cast<int>(left));
}

// Asks for the residual of the next tile's rows, which lie too far apart for the CPU to foresee.
template <class T>
FG_INLINE void ask_for_residual(const Job &job, int64_t n, int64_t m, int64_t last) {
  const T *from = static_cast<const T *>(job.a->residual) + n;
  for (int64_t r = m; r < m + kTall && r < last; ++r)
    for (int64_t i = 0; i < kWide * 16; i += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(from + r * job.a->out_features + i);
}

// The strip's rows of the output in columns [n, n + 64).
template <class T>
void strip_by(const Job &job, Strip *strip, int64_t n) {
  const int64_t tiles = (strip->last - strip->first + kTall - 1) / kTall;
  const int64_t width = job.padded ? job.padded : 1;  // of no columns the sums are still to begin
  constexpr int64_t lines = 64 * (kDeep / 64);         // of a block
  for (int64_t k = 0; k < width; k += kDeep) {
    const int64_t depth = job.padded - k < kDeep ? job.padded - k : kDeep;
    const bool more = k + kDeep < width, whole = !more && n + kWide * W <= job.a->out_features;
    pack_block(job, n, k, depth, strip);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = strip->first + tile * kTall, rows = strip->last - m < kTall ? strip->last - m : kTall;
      if (!more && job.a->residual) ask_for_residual<T>(job, n, m + kTall, strip->last);
      const int8_t *then = more ? weight_row(job, n) + k + kDeep : weight_row(job, n + 64);
      any_rows<T>(job, strip, rows, whole ? n : -1, m, k, depth,
                  {then, job.a->width, lines * tile / tiles, lines * (tile + 1) / tiles});
      if (!more && !whole)
        for (int64_t r = m; r < m + rows; ++r) write_row<T>(job, n, r, strip->c[r - strip->first]);
    }
  }
}

// How the work is cut: items of `step` neighbouring blocks, each of which asks for the next one's weights, by strips of
// `tall` rows.
struct Cut {
  int64_t blocks, tall, strips, step, runs;
  Cut(int64_t rows, int64_t out_features) : blocks((out_features + 63) / 64), tall(kStrip) {
    const int64_t wanted = 4 * fg_threads();
    strips = (rows + tall - 1) / tall;
    for (; blocks * strips < wanted && tall > 8 * kTall; strips = (rows + tall - 1) / tall) tall /= 2;
    step = blocks * strips / wanted;
    step = step < 1 ? 1 : step > 16 ? 16 : step;
    runs = (blocks + step - 1) / step;
  }
};

// `quantized(first, last)` makes the codes of these rows: here where one item takes all of a strip's products, so that
// they are in its core's cache; where several do, they were made before.
template <class T, class F>
int tiled(const Job &job, const F &quantized) {
  const Cut cut(job.rows, job.a->out_features);
  return parallel_for(cut.runs * cut.strips, 1, [&](int64_t item) {
    Strip strip;
    strip.first = item / cut.runs * cut.tall;
    strip.last = strip.first + cut.tall < job.rows ? strip.first + cut.tall : job.rows;
    if (cut.runs == 1) quantized(strip.first, strip.last);
    const int64_t from = item % cut.runs * cut.step;
    for (int64_t block = from; block < from + cut.step && block < cut.blocks; ++block)
      strip_by<T>(job, &strip, block * 64);
    return 0;
  });
}

}  // namespace
