// NEON with products of two rows by two rows as well. Included by level_neon_i8mm.cpp alone.
#pragma once
#include "simd_neon.h"

namespace {

struct Simd : NeonSimd {
  static constexpr bool kHasMatrixProduct = true;
  // 6 activation rows by 8 output rows: 12 sums of integers and 12 of floats in 32 registers
  static constexpr int kParts = 4;
  static constexpr int kMaxTile = 6;

  // [a][a][b][b]: what the sums of activation rows a and b start with.
  static I start_pair(int32_t a, int32_t b) { return vcombine_s32(vdup_n_s32(a), vdup_n_s32(b)); }
  // 8 columns of two activation rows.
  static I load_pair(const int8_t* a, const int8_t* b) {
    return vreinterpretq_s32_s8(vcombine_s8(vld1_s8(a), vld1_s8(b)));
  }
  // 4 output rows x 4 columns, and the next 4 columns -> 8 columns of rows 0 and 1, of rows 2 and 3.
  static I rows01(I columns, I next) { return vzip1q_s32(columns, next); }
  static I rows23(I columns, I next) { return vzip2q_s32(columns, next); }
  // acc + [a.row0][a.row1][b.row0][b.row1]
  static I product(I acc, I activations, I weights) {
    return vmmlaq_s32(acc, vreinterpretq_s8_s32(activations), vreinterpretq_s8_s32(weights));
  }
  // Sums of output rows 0 and 1, and of rows 2 and 3 -> all four of activation row a, of row b.
  static I sums_of_a(I rows01, I rows23) {
    return vreinterpretq_s32_s64(
        vzip1q_s64(vreinterpretq_s64_s32(rows01), vreinterpretq_s64_s32(rows23)));
  }
  static I sums_of_b(I rows01, I rows23) {
    return vreinterpretq_s32_s64(
        vzip2q_s64(vreinterpretq_s64_s32(rows01), vreinterpretq_s64_s32(rows23)));
  }
};

}  // namespace
