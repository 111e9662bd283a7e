// simd.h with AArch64's Advanced SIMD: four lanes.
#pragma once
#include <arm_neon.h>

namespace {

using vf = float32x4_t;
constexpr int W = 4;

FG_INLINE vf load(const float *p) { return vld1q_f32(p); }
FG_INLINE vf load(const bf16 *p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16));
}
FG_INLINE vf load(const fp16 *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p))));
}
FG_INLINE void store(float *p, vf x) { vst1q_f32(p, x); }
FG_INLINE void store(bf16 *p, vf x) {
  uint32x4_t bits = vreinterpretq_u32_f32(x), high = vshrq_n_u32(bits, 16);
  uint32x4_t bias = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
  uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
  uint32x4_t ordered = vceqq_f32(x, x);
  uint32x4_t wide = vbslq_u32(ordered, rounded, vorrq_u32(high, vdupq_n_u32(0x40)));
  vst1_u16(reinterpret_cast<uint16_t *>(p), vmovn_u32(wide));
}
FG_INLINE void store(fp16 *p, vf x) {
  vst1_u16(reinterpret_cast<uint16_t *>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
template <class T>
FG_INLINE vf load_n(const T *p, int n) {
  T part[W] = {};
  if (n > 0) memcpy(part, p, sizeof(T) * static_cast<size_t>(n));
  return load(part);
}
template <class T>
FG_INLINE void store_n(T *p, vf x, int n) {
  T part[W];
  store(part, x);
  if (n > 0) memcpy(p, part, sizeof(T) * static_cast<size_t>(n));
}

FG_INLINE vf set1(float x) { return vdupq_n_f32(x); }
FG_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
FG_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
FG_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
FG_INLINE vf div(vf a, vf b) { return vdivq_f32(a, b); }
FG_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
// As on x86: the second operand where either is NaN.
FG_INLINE vf max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
FG_INLINE vf min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
FG_INLINE vf sqrt(vf a) { return vsqrtq_f32(a); }
FG_INLINE vf round(vf a) { return vrndnq_f32(a); }
FG_INLINE vf floor(vf a) { return vrndmq_f32(a); }
FG_INLINE vf select_gt(vf a, vf b, vf x, vf y) { return vbslq_f32(vcgtq_f32(a, b), x, y); }
FG_INLINE vf swap_pairs(vf a) { return vrev64q_f32(a); }
FG_INLINE vf power2(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
FG_INLINE vf scale2(vf a, vf n) {  // in two factors, so that neither overflows or is subnormal
  int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return mul(mul(a, power2(half)), power2(vsubq_s32(whole, half)));
}
FG_INLINE vf power2_in(vf m) { return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(m), 23)); }
FG_INLINE void interleave(vf a, vf b, vf &low, vf &high) {
  low = vzip1q_f32(a, b);
  high = vzip2q_f32(a, b);
}
FG_INLINE void deinterleave(vf low, vf high, vf &even, vf &odd) {
  even = vuzp1q_f32(low, high);
  odd = vuzp2q_f32(low, high);
}
FG_INLINE float hsum(vf a) {
  float32x2_t x = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(x, 0) + vget_lane_f32(x, 1);
}
FG_INLINE float hmax(vf a) { return vmaxvq_f32(a); }

}  // namespace
