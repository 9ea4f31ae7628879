// 128-bit vectors: 4 floats, with the dot product extension. Included by level_neon.cpp, and by
// simd_neon_i8mm.h, which adds to it.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace {

struct NeonSimd {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kParts = 2;
  static constexpr bool kHasMatrixProduct = false;
  static constexpr int kMaxTile = 3;
  static constexpr int kWideTile = 5;  // rows whose sums of integers fit into registers
  static constexpr int kOffset8 = 0, kOffset4 = 8;
  static constexpr int kMaxChains = 1;
  static constexpr int kScoreChains = 1;
  static constexpr int kMixAccumulators = 16;

  static F zero() { return vdupq_n_f32(0); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static float sum(F v) { return vaddvq_f32(v); }
  static float largest(F v) { return vmaxvq_f32(v); }

  static I izero() { return vdupq_n_s32(0); }
  static I iset1(int32_t v) { return vdupq_n_s32(v); }
  static I lane_index() {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vld1q_s32(lanes);
  }
  static I iadd(I a, I b) { return vaddq_s32(a, b); }
  static int32_t isum(I v) { return vaddvq_s32(v); }
  static I magnitude(F v) {
    return vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fffffff));
  }
  static I umax(I a, I b) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
  }
  static uint32_t ulargest(I v) { return vmaxvq_u32(vreinterpretq_u32_s32(v)); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static I to_int(F v) { return vcvtnq_s32_f32(v); }
  static F power_of_two(I n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  static F times_power(F p, F shifted) {
    return vreinterpretq_f32_s32(vaddq_s32(
        vreinterpretq_s32_f32(p), vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23)));
  }
  static F select(I index, int first, int last, F v, F other) {
    uint32x4_t in = vandq_u32(vcleq_s32(index, vdupq_n_s32(last)),
                              vcgeq_s32(index, vdupq_n_s32(first)));
    return vbslq_f32(in, v, other);
  }
  static uint32_t not_below(F x, F limit) {
    const uint32_t bits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(x, limit), vld1q_u32(bits)));
  }
  static F keep_not_below(F v, F x, F limit) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vcgeq_f32(x, limit)));
  }
  static void store_codes(int8_t* p, I v) {
    int8_t codes[8];
    int16x4_t words = vqmovn_s32(v);
    vst1_s8(codes, vqmovn_s16(vcombine_s16(words, words)));
    __builtin_memcpy(p, codes, 4);
  }
  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void load_bytes(const uint16_t* p, F* low, F* high) {
    const uint32x4_t both = vmovl_u16(vld1_u16(p));
    *low = vcvtq_f32_u32(vandq_u32(both, vdupq_n_u32(0xff)));
    *high = vcvtq_f32_u32(vshrq_n_u32(both, 8));
  }
  static void store_half(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  static void transpose(F (&v)[kLanes]) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
    v[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    v[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    v[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    v[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }

  static I load_codes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I low_codes(I v) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(0x0f)));
  }
  static I high_codes(I v) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4));
  }
  static I dot8(I acc, I weights, I activations) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(activations));
  }
  static I dot4(I acc, I weights, I activations) {  // 0..15 is the same signed or not
    return dot8(acc, weights, activations);
  }
  static void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace
