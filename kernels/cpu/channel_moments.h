// The mean and variance of channels that a convolution leaves band by band: 32 channels' sums of each band lie together,
// and are merged in order (Chan, Golub & LeVeque 1979), so that neither threads nor batch change a bit.
#pragma once
#include "simd.h"

namespace {

constexpr int64_t kColumns = 32;         // channels whose sums lie together
constexpr int64_t kBand = 3 * kColumns;  // floats of a band: their centres, sums and squares

// What a band has of some channels: a value that is near theirs, the sums of what is apart from it, and of its square.
// The centre is of the band itself: its distance from the mean costs no more roundings than the band has pixels for each
// that it was taken from (moments.h).
struct Sums {
  vf centre, sum, square;
  inline __attribute__((always_inline)) void add_one(vf x) {
    const vf d = sub(x, centre);
    sum = add(sum, d), square = fma(d, d, square);
  }
  // The same with the mean of its n pixels as centre.
  inline __attribute__((always_inline)) void settle(float n) {
    const vf from = centre, all = set1(n);
    centre = add(centre, mul(sum, set1(1 / n)));
    const vf moved = sub(centre, from), rest = sub(sum, mul(all, moved));
    square = sub(square, mul(moved, add(sum, rest))), sum = rest;
  }
};

#if defined(FG_HAS_AVX512_BF16)
// A band of pixels of 32 channels in bfloat16, the even ones and the odd ones; the first pixel is its centre, near
// enough for values of eight bits.
struct PairSums {
  Sums even{}, odd{};
  bool begun = false;

  inline __attribute__((always_inline)) void add(__m512i x) {
    const vf low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    const vf high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    if (!begun) even = {low, set1(0.0f), set1(0.0f)}, odd = {high, set1(0.0f), set1(0.0f)}, begun = true;
    even.add_one(low), odd.add_one(high);
  }
  inline __attribute__((always_inline)) void leave(float *to) const {
    store(to, even.centre), store(to + kColumns, even.sum), store(to + 2 * kColumns, even.square);
    store(to + W, odd.centre), store(to + kColumns + W, odd.sum), store(to + 2 * kColumns + W, odd.square);
  }
  inline __attribute__((always_inline)) void settle(int64_t n) {
    even.settle(static_cast<float>(n)), odd.settle(static_cast<float>(n));
  }
  // More of a band that was left, and what it has added to that: pixels by the dozen keep roundings few.
  inline __attribute__((always_inline)) void resume(const float *from) {
    even = {load(from), set1(0.0f), set1(0.0f)}, odd = {load(from + W), set1(0.0f), set1(0.0f)}, begun = true;
  }
  inline __attribute__((always_inline)) void join(float *to) const {
    more(to + kColumns, even.sum), more(to + 2 * kColumns, even.square);
    more(to + kColumns + W, odd.sum), more(to + 2 * kColumns + W, odd.square);
  }

 private:
  FG_INLINE void more(float *to, vf x) { store(to, ::add(load(to), x)); }
};
#endif

// The mean and variance of the first `left` of 32 channels, from all bands, `step` floats apart; `pixels(i)`: of a band.
// PAIRS: even channels' sums lie before the odd ones'.
template <bool PAIRS, class F>
void merge_bands(const float *partial, int64_t step, int64_t bands, const F &pixels, int64_t left, double *mean,
                 double *variance) {
  double middle[kColumns] = {}, m2[kColumns] = {}, all = 0;
  for (int64_t i = 0; i < bands; ++i) {
    const float *centre = partial + i * step, *sum = centre + kColumns;
    const double n = static_cast<double>(pixels(i));
    for (int64_t c = 0; c < kColumns; ++c) middle[c] += n * static_cast<double>(centre[c]) + static_cast<double>(sum[c]);
    all += n;
  }
  for (int64_t c = 0; c < kColumns; ++c) middle[c] /= all;
  for (int64_t i = 0; i < bands; ++i) {
    const float *centre = partial + i * step, *sum = centre + kColumns, *square = sum + kColumns;
    const double n = static_cast<double>(pixels(i)), share = 1 / n;
    for (int64_t c = 0; c < kColumns; ++c) {
      const double s = static_cast<double>(sum[c]), apart = static_cast<double>(centre[c]) + s * share - middle[c];
      m2[c] += static_cast<double>(square[c]) - s * s * share + n * apart * apart;
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    const int64_t to = PAIRS ? 2 * (c % (kColumns / 2)) + c / (kColumns / 2) : c;
    if (to < left) mean[to] = middle[c], variance[to] = m2[c] < 0 ? 0 : m2[c] / all;
  }
}

}  // namespace
