// simd.h with one lane: the level that every CPU runs, and the twin that the others are read against.
#pragma once

namespace {

using vf = float;
constexpr int W = 1;

FG_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
FG_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FG_INLINE float from_fp16(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + (112u << 23)));
  float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // a subnormal counts units of 2^-24
  return from_bits(sign | to_bits(small));
}
FG_INLINE uint16_t to_fp16(float x) {
  uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves it, rounded, in the low bits of the sum
    return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  }
  rest += 0xfffu + (rest >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rest - (112u << 23)) >> 13));
}
FG_INLINE uint16_t to_bf16(float x) {
  uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

FG_INLINE vf load(const float *p) { return *p; }
FG_INLINE vf load(const bf16 *p) { return from_bits(static_cast<uint32_t>(p->bits) << 16); }
FG_INLINE vf load(const fp16 *p) { return from_fp16(p->bits); }
FG_INLINE void store(float *p, vf x) { *p = x; }
FG_INLINE void store(bf16 *p, vf x) { p->bits = to_bf16(x); }
FG_INLINE void store(fp16 *p, vf x) { p->bits = to_fp16(x); }
template <class T>
FG_INLINE vf load_n(const T *p, int n) {
  return n > 0 ? load(p) : 0.0f;
}
template <class T>
FG_INLINE void store_n(T *p, vf x, int n) {
  if (n > 0) store(p, x);
}

FG_INLINE vf set1(float x) { return x; }
FG_INLINE vf add(vf a, vf b) { return a + b; }
FG_INLINE vf sub(vf a, vf b) { return a - b; }
FG_INLINE vf mul(vf a, vf b) { return a * b; }
FG_INLINE vf div(vf a, vf b) { return a / b; }
FG_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // two roundings: baseline CPUs have no fused form
FG_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FG_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FG_INLINE vf sqrt(vf a) { return __builtin_sqrtf(a); }
FG_INLINE vf round(vf a) {  // to nearest even, for |a| < 2^22: all that exp needs
  return (a + 12582912.0f) - 12582912.0f;
}
FG_INLINE vf floor(vf a) {  // for |a| < 2^22, as round
  float n = round(a);
  return n > a ? n - 1.0f : n;
}
FG_INLINE vf select_gt(vf a, vf b, vf x, vf y) { return a > b ? x : y; }
FG_INLINE vf scale2(vf a, vf n) {
  if (n != n) return n;
  int whole = static_cast<int>(n), half = whole >> 1;
  return a * from_bits(static_cast<uint32_t>(half + 127) << 23) * from_bits(static_cast<uint32_t>(whole - half + 127) << 23);
}
FG_INLINE vf power2_in(vf m) { return from_bits(to_bits(m) << 23); }
FG_INLINE void interleave(vf a, vf b, vf &low, vf &high) {
  low = a;
  high = b;
}
FG_INLINE void deinterleave(vf low, vf high, vf &even, vf &odd) {
  even = low;
  odd = high;
}
FG_INLINE float hsum(vf a) { return a; }
FG_INLINE float hmax(vf a) { return a; }

}  // namespace
