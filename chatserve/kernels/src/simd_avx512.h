// 512-bit vectors: 16 floats. Included by level_avx512.cpp alone.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kParts = 1;  // a panel's 32 rows are computed in so many parts
  static constexpr bool kHasMatrixProduct = false;  // see simd_neon_i8mm.h
  static constexpr int kMaxTile = 6;
  static constexpr int kWideTile = 8;  // rows whose sums of integers fit into registers
  static constexpr int kOffset8 = 128, kOffset4 = 8;
  static constexpr int kMaxChains = 4;     // accumulators per vector that hide the latency of a dot
  static constexpr int kScoreChains = 2;   // the same for attention scores
  static constexpr int kMixAccumulators = 24;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float largest(F v) { return _mm512_reduce_max_ps(v); }

  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static I lane_index() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static int32_t isum(I v) { return _mm512_reduce_add_epi32(v); }
  static I magnitude(F v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  }
  static I umax(I a, I b) { return _mm512_max_epu32(a, b); }
  static uint32_t ulargest(I v) { return _mm512_reduce_max_epu32(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static F power_of_two(I n) {  // 2^n for -126 <= n <= 127
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, iset1(127)), 23));
  }
  // p * 2^n; the lowest bits of `shifted` are n, as after adding 1.5 * 2^23 to it
  static F times_power(F p, F shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
  // v where first <= index <= last, `other` elsewhere
  static F select(I index, int first, int last, F v, F other) {
    __mmask16 in = _mm512_cmple_epi32_mask(index, iset1(last)) &
                   _mm512_cmpge_epi32_mask(index, iset1(first));
    return _mm512_mask_blend_ps(in, other, v);
  }
  // bit i: x[i] >= limit[i]; false for NaN
  static uint32_t not_below(F x, F limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ); }
  // v where x >= limit, 0 elsewhere
  static F keep_not_below(F v, F x, F limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), v);
  }
  static void store_codes(int8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
  }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The low bytes of halves, and their high ones.
  static void load_bytes(const uint16_t* p, F* low, F* high) {
    const I both = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    *low = to_float(_mm512_and_si512(both, iset1(0xff)));
    *high = to_float(_mm512_srli_epi32(both, 8));
  }
  static void store_half(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
  }

  // v[i] becomes what was in lane i of all.
  static void transpose(F (&v)[kLanes]) {
    F t[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      v[i] = low_pairs(t[i], t[i + 2]);
      v[i + 1] = high_pairs(t[i], t[i + 2]);
      v[i + 2] = low_pairs(t[i + 1], t[i + 3]);
      v[i + 3] = high_pairs(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // quarters: 0x88 takes the even ones of both, 0xdd the odd ones
      const F even = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88);
      const F odd = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
      const F later_even = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
      const F later_odd = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
      t[i] = _mm512_shuffle_f32x4(even, later_even, 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(odd, later_odd, 0x88);
      t[8 + i] = _mm512_shuffle_f32x4(even, later_even, 0xdd);
      t[12 + i] = _mm512_shuffle_f32x4(odd, later_odd, 0xdd);
    }
    for (int i = 0; i < kLanes; i++) v[i] = t[i];
  }
  static F low_pairs(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static F high_pairs(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }

  // Bytes of a packed weight: 16 output rows x 4 columns.
  static I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I low_codes(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(0x0f)); }
  static I high_codes(I v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(0x0f));
  }
  static I dot8(I acc, I weights, I activations) {
    return _mm512_dpbusd_epi32(acc, weights, activations);
  }
  static I dot4(I acc, I weights, I activations) { return dot8(acc, weights, activations); }
  static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace
