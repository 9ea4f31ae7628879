// The kernels of one instruction set level, written over its `Simd`. Included once per level file.
//
// Everything is in an anonymous namespace: the same template compiled for two levels must never be
// merged by the linker.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "level.h"

namespace {

using chatserve::Activations;
using chatserve::AttentionJob;
using chatserve::Dtype;
using chatserve::Epilogue;
using chatserve::kBlockSize;
using chatserve::kGroup;
using chatserve::kKeyLanes;
using chatserve::kMaxAttentionRows;
using chatserve::kMaxColumns;
using chatserve::kMaxHeadDim;
using chatserve::kMaxWideRows;
using chatserve::kPanelRows;
using chatserve::kPanelSpans;
using chatserve::kRankUnit;
using chatserve::kSpanRows;
using chatserve::kZeroSteps;
using chatserve::LevelKernels;
using chatserve::LowRank;
using chatserve::Matrix;
using chatserve::Output;
using chatserve::RankSpan;
using chatserve::RowMap;
using chatserve::Scaling;
using chatserve::group_halves;
using chatserve::has_row_scales;

using F = Simd::F;
using I = Simd::I;
constexpr int kLanes = Simd::kLanes;

#define CS_UNROLL _Pragma("GCC unroll 32")

// e^x, relative error about 1e-7 (Cephes' polynomial); NaN stays NaN. `max` and `min` give their
// second operand where either is NaN.
inline F exponential(F x) {
  x = Simd::min(Simd::set1(87.0f), Simd::max(Simd::set1(-87.0f), x));
  I n = Simd::to_int(Simd::mul(x, Simd::set1(1.44269504f)));
  F whole = Simd::to_float(n);
  F r = Simd::fma(whole, Simd::set1(-0.693359375f), x);
  r = Simd::fma(whole, Simd::set1(2.12194440e-4f), r);
  F p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::fma(p, Simd::mul(r, r), Simd::add(r, Simd::set1(1.0f)));
  return Simd::mul(p, Simd::power_of_two(n));
}

}  // namespace

#include "adapter_kernels.h"
#include "attention_kernels.h"
#include "dot_product_kernels.h"
#include "matrix_product_kernels.h"
#include "fitting_kernels.h"
#include "packing_kernels.h"
#include "wide_tile_kernels.h"
#include "product_kernels.h"
#include "row_kernels.h"
#include "sampling_look_kernels.h"
#include "sampling_pick_kernels.h"
#include "logprob_kernels.h"

namespace {

constexpr LevelKernels level_kernels(const char* name, bool (*is_supported)()) {
  return {name,     is_supported, Simd::kOffset8, Simd::kOffset4, pack,   unpack_row,
          multiply, quantise,     rotate,         store_kv,       attend, rms_norm,
          look,     pick,         logprobs,       shrink,         expand};
}

}  // namespace
