// The kernels of one instruction set level, written over its `Simd`. Included once per level file.
//
// Everything is in an anonymous namespace: the same template compiled for two levels must never be
// merged by the linker.
#pragma once
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
using chatserve::kPanelRows;
using chatserve::LevelKernels;
using chatserve::Matrix;
using chatserve::Output;
using chatserve::RowMap;

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

// ---- packing ----

inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, bits = h & 0x7fff;
  if (bits >= 0x7c00) {
    bits = 0x7f800000 | (bits & 0x3ff) << 13;
  } else if (bits >= 0x400) {
    bits = (bits << 13) + (112u << 23);
  } else {  // subnormal
    float value = static_cast<float>(bits) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The smallest half that is not below a value >= 0; the largest half above its range, NaN for what is
// not finite.
inline uint16_t half_not_below(float value) {
  if (!std::isfinite(value)) return 0x7e00;
  if (value > 65504.0f) return 0x7bff;
  uint32_t low = 0, high = 0x7bff;  // halves in order of their bits
  while (low < high) {
    uint32_t middle = (low + high) / 2;
    if (half_to_float(static_cast<uint16_t>(middle)) >= value) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<uint16_t>(low);
}

inline void row_to_float(const void* rows, Dtype dtype, size_t first, int count, float* out) {
  if (dtype == Dtype::float32) {
    std::memcpy(out, static_cast<const float*>(rows) + first, sizeof(float) * count);
  } else if (dtype == Dtype::bfloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(rows) + first;
    for (int k = 0; k < count; k++) {
      uint32_t bits = static_cast<uint32_t>(in[k]) << 16;
      std::memcpy(out + k, &bits, 4);
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(rows) + first;
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) Simd::store(out + k, Simd::load_half(in + k));
    for (; k < count; k++) out[k] = half_to_float(in[k]);
  }
}

inline float largest_magnitude(const float* x, int count) {
  I most = Simd::izero();
  for (int k = 0; k < count; k += kLanes) most = Simd::umax(most, Simd::magnitude(Simd::load(x + k)));
  uint32_t bits = Simd::ulargest(most);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Signed codes of `count` columns under one scale.
inline void round_codes(const float* x, int count, float scale, int limit, int8_t* codes) {
  F inverse = Simd::set1(scale > 0 ? 1.0f / scale : 0.0f);
  F top = Simd::set1(static_cast<float>(limit)), bottom = Simd::set1(static_cast<float>(-limit));
  for (int k = 0; k < count; k += kLanes) {
    F v = Simd::mul(Simd::load(x + k), inverse);
    Simd::store_codes(codes + k, Simd::to_int(Simd::min(top, Simd::max(bottom, v))));
  }
}

// A group's 4-bit codes -8..7: the value of largest magnitude becomes -8, whatever its sign.
inline uint16_t round_group4(const float* x, int8_t* codes) {
  float extreme = 0;
  for (int k = 0; k < kGroup; k++) {
    if (std::fabs(x[k]) > std::fabs(extreme)) extreme = x[k];
  }
  const float largest = largest_magnitude(x, kGroup);  // NaN or infinite if any value is
  uint16_t half = half_not_below(largest / 8);
  if (!std::isfinite(largest)) {
    std::memset(codes, 0, kGroup);
    return half;
  }
  float scale = half_to_float(half);
  float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  if (extreme > 0) {
    inverse = -inverse;
    half |= 0x8000;
  }
  for (int k = 0; k < kGroup; k++) {
    const float code = x[k] * inverse;
    codes[k] = static_cast<int8_t>(std::lrintf(code < -8.0f ? -8.0f : code > 7.0f ? 7.0f : code));
  }
  return half;
}

struct Lane {
  int panel, lane;
};

inline Lane place_of(int row, RowMap map) {
  if (map == RowMap::plain) return {row / kPanelRows, row % kPanelRows};
  constexpr int half = kPanelRows / 2;
  return {row / half, row % half + (map == RowMap::up ? half : 0)};
}

inline void put_row(const Matrix& w, Lane at, const int8_t* codes) {
  uint8_t* panel = w.codes + w.panel_bytes * at.panel + 4 * at.lane;
  if (w.bits == 8) {
    for (int k = 0; k < w.columns; k += 4, panel += 4 * kPanelRows) {
      uint32_t word;
      std::memcpy(&word, codes + k, 4);
      // adding 128 to a byte flips its top bit
      if (Simd::kOffset8) word ^= 0x80808080u;
      std::memcpy(panel, &word, 4);
    }
    return;
  }
  for (int k = 0; k < w.columns; k += 8, panel += 4 * kPanelRows) {
    for (int j = 0; j < 4; j++) {
      int low = codes[k + j] + Simd::kOffset4, high = codes[k + 4 + j] + Simd::kOffset4;
      panel[j] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

void pack(const Matrix& w, int start, int num_rows, const void* rows, Dtype dtype, RowMap map) {
  static thread_local float x[kMaxColumns];
  static thread_local int8_t codes[kMaxColumns];
  for (int i = 0; i < num_rows; i++) {
    Lane at = place_of(start + i, map);
    row_to_float(rows, dtype, static_cast<size_t>(i) * w.columns, w.columns, x);
    if (w.is_grouped) {
      uint16_t* scales = w.group_scales + static_cast<size_t>(at.panel) * w.groups * kPanelRows;
      for (int g = 0; g < w.groups; g++) {
        uint16_t half;
        if (w.bits == 4) {
          half = round_group4(x + g * kGroup, codes + g * kGroup);
        } else {
          half = half_not_below(largest_magnitude(x + g * kGroup, kGroup) / 127);
          round_codes(x + g * kGroup, kGroup, half_to_float(half), 127, codes + g * kGroup);
        }
        scales[g * kPanelRows + at.lane] = half;
      }
    } else {
      float scale = largest_magnitude(x, w.columns) / 127;
      if (scale < FLT_MIN) scale = 0;  // its inverse would overflow; such a row is zero
      round_codes(x, w.columns, scale, 127, codes);
      w.row_scales[at.panel * kPanelRows + at.lane] = scale;
    }
    put_row(w, at, codes);
  }
}

void unpack_row(const Matrix& w, int row, float* out) {
  Lane at = place_of(row, RowMap::plain);
  const uint8_t* panel = w.codes + w.panel_bytes * at.panel + 4 * at.lane;
  const uint16_t* halves = w.group_scales + static_cast<size_t>(at.panel) * w.groups * kPanelRows;
  float scale = w.is_grouped ? 0 : w.row_scales[at.panel * kPanelRows + at.lane];
  for (int g = 0; g < w.groups; g++) {
    if (w.is_grouped) scale = half_to_float(halves[g * kPanelRows + at.lane]);
    float* x = out + g * kGroup;
    if (w.bits == 8) {
      for (int k = 0; k < kGroup; k += 4, panel += 4 * kPanelRows) {
        for (int j = 0; j < 4; j++) {
          int code = Simd::kOffset8 ? panel[j] - Simd::kOffset8 : static_cast<int8_t>(panel[j]);
          x[k + j] = static_cast<float>(code) * scale;
        }
      }
    } else {
      for (int k = 0; k < kGroup; k += 8, panel += 4 * kPanelRows) {
        for (int j = 0; j < 4; j++) {
          x[k + j] = static_cast<float>((panel[j] & 15) - Simd::kOffset4) * scale;
          x[k + 4 + j] = static_cast<float>((panel[j] >> 4) - Simd::kOffset4) * scale;
        }
      }
    }
  }
}

// ---- matrix product ----

inline I broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, 4);
  return Simd::iset1(word);
}

// M activation rows times the rows [part] of one panel -> tile[M][kPanelRows].
template <int M, int BITS, bool GROUPED, bool PREFETCH>
inline void multiply_tile(const Matrix& w, int panel, int part, const Activations& a, size_t ahead,
                          float (*tile)[kPanelRows]) {
  constexpr int kParts = M == 1 ? 1 : Simd::kParts;
  constexpr int kVectors = kPanelRows / kLanes / kParts;
  constexpr int kChains = M == 1 ? Simd::kMaxChains : M == 2 ? (Simd::kMaxChains + 1) / 2 : 1;
  const int columns = w.columns, groups = w.groups;
  const int first = part * kVectors * kLanes;  // row within the panel
  const uint8_t* codes = w.codes + w.panel_bytes * panel + 4 * first;
  const uint16_t* halves =
      GROUPED ? w.group_scales + static_cast<size_t>(panel) * groups * kPanelRows + first : nullptr;
  F sums[M][kVectors];
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) sums[m][v] = Simd::zero();
  }
  for (int g = 0; g < groups; g++) {
    I acc[kChains][M][kVectors];
    CS_UNROLL for (int m = 0; m < M; m++) {
      I start = Simd::iset1(a.corrections[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        acc[0][m][v] = start;
        CS_UNROLL for (int c = 1; c < kChains; c++) acc[c][m][v] = Simd::izero();
      }
    }
    const int8_t* x = a.codes + g * kGroup;
    constexpr int kColumns = BITS == 8 ? 4 : 8;  // of one chunk of codes
    constexpr int kStep = BITS == 8 ? kChains : (kChains + 1) / 2;
    for (int k = 0; k < kGroup; k += kColumns * kStep) {
      CS_UNROLL for (int s = 0; s < kStep; s++) {
        I weights[kVectors];
        CS_UNROLL for (int v = 0; v < kVectors; v++) {
          weights[v] = Simd::load_codes(codes + 4 * kLanes * v);
          if (PREFETCH) Simd::prefetch_l2(codes + 4 * kLanes * v + ahead);
        }
        codes += 4 * kPanelRows;
        const int8_t* xs = x + k + kColumns * s;
        if (BITS == 8) {
          CS_UNROLL for (int m = 0; m < M; m++) {
            I b = broadcast(xs + static_cast<size_t>(m) * columns);
            CS_UNROLL for (int v = 0; v < kVectors; v++) {
              acc[s % kChains][m][v] = Simd::dot8(acc[s % kChains][m][v], weights[v], b);
            }
          }
        } else {
          constexpr int kOther = kChains > 1 ? 1 : 0;
          CS_UNROLL for (int v = 0; v < kVectors; v++) {
            I low = Simd::low_codes(weights[v]), high = Simd::high_codes(weights[v]);
            CS_UNROLL for (int m = 0; m < M; m++) {
              const int8_t* xm = xs + static_cast<size_t>(m) * columns;
              I& one = acc[2 * s % kChains][m][v];
              one = Simd::dot4(one, low, broadcast(xm));
              I& two = acc[(2 * s + kOther) % kChains][m][v];
              two = Simd::dot4(two, high, broadcast(xm + 4));
            }
          }
        }
      }
    }
    CS_UNROLL for (int m = 0; m < M; m++) {
      F scale = Simd::set1(a.scales[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        I sum = acc[0][m][v];
        CS_UNROLL for (int c = 1; c < kChains; c++) sum = Simd::iadd(sum, acc[c][m][v]);
        F both = scale;
        if (GROUPED) {
          both = Simd::mul(scale, Simd::load_half(halves + g * kPanelRows + v * kLanes));
        }
        sums[m][v] = Simd::fma(Simd::to_float(sum), both, sums[m][v]);
      }
    }
  }
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F sum = sums[m][v];
      if (!GROUPED) {
        sum = Simd::mul(sum, Simd::load(w.row_scales + panel * kPanelRows + first + v * kLanes));
      }
      Simd::store(tile[m] + first + v * kLanes, sum);
    }
  }
}

template <int BITS, bool GROUPED, bool PREFETCH>
inline void multiply_panel(const Matrix& w, int panel, int num_rows, const Activations& a,
                           size_t ahead, float (*tile)[kPanelRows]) {
  for (int part = 0; part < (num_rows == 1 ? 1 : Simd::kParts); part++) {
    switch (num_rows) {
#define CS_CASE(n)                                                                \
  case n:                                                                         \
    if constexpr (n <= Simd::kMaxTile)                                            \
      multiply_tile<n, BITS, GROUPED, PREFETCH>(w, panel, part, a, ahead, tile);         \
    break;
      CS_CASE(1) CS_CASE(2) CS_CASE(3) CS_CASE(4) CS_CASE(5) CS_CASE(6)
#undef CS_CASE
    }
  }
}

inline void finish_row(const Output& to, size_t row, int panel, const float* tile) {
  if (to.epilogue == Epilogue::swiglu) {
    constexpr int half = kPanelRows / 2;
    float* out = to.out + row * to.stride + panel * half;
    for (int i = 0; i < half; i += kLanes) {
      F gate = Simd::load(tile + i), up = Simd::load(tile + half + i);
      if (to.bias) {
        gate = Simd::add(gate, Simd::load(to.bias + panel * kPanelRows + i));
        up = Simd::add(up, Simd::load(to.bias + panel * kPanelRows + half + i));
      }
      F divisor = Simd::add(Simd::set1(1.0f), exponential(Simd::sub(Simd::zero(), gate)));
      Simd::store(out + i, Simd::mul(Simd::div(gate, divisor), up));
    }
    return;
  }
  float* out = to.out + row * to.stride + panel * kPanelRows;
  for (int i = 0; i < kPanelRows; i += kLanes) {
    F v = Simd::load(tile + i);
    if (to.bias) v = Simd::add(v, Simd::load(to.bias + panel * kPanelRows + i));
    if (to.epilogue == Epilogue::add) v = Simd::add(v, Simd::load(out + i));
    Simd::store(out + i, v);
  }
}

template <int BITS, bool GROUPED>
void multiply_range(const Matrix& w, const Activations& a, int num_rows, int first_panel,
                    int last_panel, size_t ahead, const Output& to) {
  alignas(64) float tile[Simd::kMaxTile][kPanelRows];
  const int num_blocks = (num_rows + Simd::kMaxTile - 1) / Simd::kMaxTile;
  for (int panel = first_panel; panel < last_panel; panel++) {
    for (int block = 0; block < num_blocks; block++) {
      const long begin = static_cast<long>(num_rows) * block / num_blocks;
      const long end = static_cast<long>(num_rows) * (block + 1) / num_blocks;
      Activations part = {a.codes + begin * w.columns, a.scales + begin * w.groups,
                          a.corrections + begin * w.groups};
      const int count = static_cast<int>(end - begin);
      // the second pass over a panel finds it in the cache and has time to fetch the next one
      const size_t reach = block == 1 ? w.panel_bytes : num_blocks == 1 ? ahead : 0;
      if (reach) {
        multiply_panel<BITS, GROUPED, true>(w, panel, count, part, reach, tile);
      } else {
        multiply_panel<BITS, GROUPED, false>(w, panel, count, part, 0, tile);
      }
      for (int m = 0; m < count; m++) finish_row(to, begin + m, panel, tile[m]);
    }
  }
}

void multiply(const Matrix& w, const Activations& a, int num_rows, int first_panel, int last_panel,
              size_t ahead, const Output& to) {
  if (w.bits == 4) {
    multiply_range<4, true>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else if (w.is_grouped) {
    multiply_range<8, true>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else {
    multiply_range<8, false>(w, a, num_rows, first_panel, last_panel, ahead, to);
  }
}

// ---- rows: norm, quantisation, rotation ----

inline float norm_factor(const float* x, float eps, int columns) {
  F even = Simd::zero(), odd = Simd::zero();
  for (int k = 0; k < columns; k += 2 * kLanes) {
    F a = Simd::load(x + k);
    even = Simd::fma(a, a, even);
    if (k + kLanes < columns) {
      F b = Simd::load(x + k + kLanes);
      odd = Simd::fma(b, b, odd);
    }
  }
  return 1.0f / std::sqrt(Simd::sum(Simd::add(even, odd)) / static_cast<float>(columns) + eps);
}

void rms_norm(const float* x, const float* norm, float eps, int columns, float* out) {
  F factor = Simd::set1(norm_factor(x, eps, columns));
  for (int k = 0; k < columns; k += kLanes) {
    Simd::store(out + k,
                Simd::mul(Simd::mul(Simd::load(x + k), factor), Simd::load(norm + k)));
  }
}

void quantise(const float* x, const float* norm, float eps, int columns, int offset, int8_t* codes,
              float* scales, int32_t* corrections) {
  constexpr int kVectors = kGroup / kLanes;
  F factor = Simd::set1(norm ? norm_factor(x, eps, columns) : 1.0f);
  for (int g = 0; g < columns / kGroup; g++) {
    F values[kVectors];
    // magnitudes compare as integers: a NaN is the largest and makes the scale NaN
    I most = Simd::izero();
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      const int k = g * kGroup + v * kLanes;
      values[v] = Simd::load(x + k);
      if (norm) values[v] = Simd::mul(Simd::mul(values[v], factor), Simd::load(norm + k));
      most = Simd::umax(most, Simd::magnitude(values[v]));
    }
    const uint32_t bits = Simd::ulargest(most);
    float largest;
    std::memcpy(&largest, &bits, 4);
    // below the smallest normal number the inverse would overflow; such a group is zero
    const bool is_usable = bits >= 0x00800000u * 8 && bits < 0x7f800000u;
    F inverse = Simd::set1(is_usable ? 127.0f / largest : 0.0f);
    scales[g] = bits < 0x7f800000u ? (is_usable ? largest / 127.0f : 0.0f) : NAN;
    I total = Simd::izero();
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F scaled = is_usable ? Simd::mul(values[v], inverse) : Simd::zero();
      I rounded = Simd::to_int(scaled);
      total = Simd::iadd(total, rounded);
      Simd::store_codes(codes + g * kGroup + v * kLanes, rounded);
    }
    corrections[g] = -offset * Simd::isum(total);
  }
}

void rotate(float* head, const float* norm, float eps, const float* cos, const float* sin,
            int head_dim) {
  if (norm) rms_norm(head, norm, eps, head_dim, head);
  const int half = head_dim / 2;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    F a = Simd::load(head + i), b = Simd::load(head + half + i);
    F c = Simd::load(cos + i), s = Simd::load(sin + i);
    Simd::store(head + i, Simd::sub(Simd::mul(a, c), Simd::mul(b, s)));
    Simd::store(head + half + i, Simd::fma(b, c, Simd::mul(a, s)));
  }
  for (; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = std::fma(b, cos[i], a * sin[i]);
  }
}

inline F within_half(F v) {
  return Simd::min(Simd::set1(65504.0f), Simd::max(Simd::set1(-65504.0f), v));
}

void store_kv(const float* key, const float* value, int head_dim, int place, uint16_t* block) {
  uint16_t halves[kMaxHeadDim];
  uint16_t* keys = block + static_cast<size_t>(place / kKeyLanes) * head_dim * kKeyLanes +
                   place % kKeyLanes;
  for (int d = 0; d < head_dim; d += kLanes) {
    Simd::store_half(halves + d, within_half(Simd::load(key + d)));
  }
  for (int d = 0; d < head_dim; d++) keys[d * kKeyLanes] = halves[d];
  uint16_t* values = block + static_cast<size_t>(kBlockSize + place) * head_dim;
  for (int d = 0; d < head_dim; d += kLanes) {
    Simd::store_half(values + d, within_half(Simd::load(value + d)));
  }
}

// ---- attention ----

template <int R>
inline void score_keys(const AttentionJob& job, int first_block, int num_keys) {
  constexpr int kVectors = kKeyLanes / kLanes;
  constexpr int kChains = Simd::kScoreChains;
  const int dim = job.head_dim;
  const F scale = Simd::set1(job.scale), nothing = Simd::set1(-1e30f);
  for (int at = first_block * kBlockSize; at < num_keys; at += kKeyLanes) {
    const int block = at / kBlockSize, sub = at % kBlockSize / kKeyLanes;
    const uint16_t* keys = job.keys + job.block_stride * job.block_ids[block] +
                           static_cast<size_t>(sub) * dim * kKeyLanes;
    // Fetched meanwhile: the keys of the next block or job, and this block's values.
    const bool has_next = (block + 1) * kBlockSize < num_keys;
    const uint16_t* next =
        has_next ? job.keys + job.block_stride * job.block_ids[block + 1] : job.next;
    next += static_cast<size_t>(sub) * dim * kKeyLanes;
    const uint16_t* values = keys + static_cast<size_t>(kBlockSize) * dim;
    F acc[R][kVectors][kChains];
    CS_UNROLL for (int r = 0; r < R; r++) {
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        CS_UNROLL for (int c = 0; c < kChains; c++) acc[r][v][c] = Simd::zero();
      }
    }
    for (int d = 0; d < dim; d += 2) {
      Simd::prefetch_l2(next + d * kKeyLanes);
      Simd::prefetch_l2(values + d * kKeyLanes);
      CS_UNROLL for (int e = 0; e < 2; e++) {
        CS_UNROLL for (int v = 0; v < kVectors; v++) {
          F k = Simd::load_half(keys + (d + e) * kKeyLanes + v * kLanes);
          CS_UNROLL for (int r = 0; r < R; r++) {
            F& sum = acc[r][v][e % kChains];
            sum = Simd::fma(Simd::set1(job.queries[r][d + e]), k, sum);
          }
        }
      }
    }
    CS_UNROLL for (int r = 0; r < R; r++) {
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        F sum = acc[r][v][0];
        if (kChains == 2) sum = Simd::add(sum, acc[r][v][kChains - 1]);
        const int position = at + v * kLanes;
        I index = Simd::iadd(Simd::iset1(position), Simd::lane_index());
        sum = Simd::select(index, job.first[r], job.last[r], Simd::mul(sum, scale), nothing);
        Simd::store(job.scores + r * job.score_stride + position - first_block * kBlockSize, sum);
      }
    }
  }
}

// Scores to weights that are not divided yet; returns their sum.
inline float soften(const AttentionJob& job, int r, int first_block, int num_keys) {
  float* scores = job.scores + r * job.score_stride;
  const int origin = first_block * kBlockSize;
  F most = Simd::set1(-1e30f);
  for (int at = origin; at < num_keys; at += kLanes) {
    most = Simd::max(most, Simd::load(scores + at - origin));
  }
  const F top = Simd::set1(Simd::largest(most));
  F sum = Simd::zero();
  // whole groups of kKeyLanes, so that rows with neighbours and without add in the same order
  const int end = (num_keys + kKeyLanes - 1) / kKeyLanes * kKeyLanes;
  for (int at = origin; at < end; at += kLanes) {
    F e = exponential(Simd::sub(Simd::load(scores + at - origin), top));
    I index = Simd::iadd(Simd::iset1(at), Simd::lane_index());
    e = Simd::select(index, job.first[r], job.last[r], e, Simd::zero());
    sum = Simd::add(sum, e);
    Simd::store(scores + at - origin, e);
  }
  return Simd::sum(sum);
}

template <int R, int S>
inline void mix_values(const AttentionJob& job, int first_block, int num_keys, int d,
                       const float* inverse) {
  F acc[R][S];
  CS_UNROLL for (int r = 0; r < R; r++) {
    CS_UNROLL for (int s = 0; s < S; s++) acc[r][s] = Simd::zero();
  }
  const int dim = job.head_dim, origin = first_block * kBlockSize;
  for (int start = origin; start < num_keys; start += kBlockSize) {
    const uint16_t* values = job.keys + job.block_stride * job.block_ids[start / kBlockSize] +
                             static_cast<size_t>(kBlockSize) * dim + d;
    const int end = start + kBlockSize < num_keys ? start + kBlockSize : num_keys;
    for (int at = start; at < end; at++, values += dim) {
      F v[S];
      CS_UNROLL for (int s = 0; s < S; s++) v[s] = Simd::load_half(values + s * kLanes);
      CS_UNROLL for (int r = 0; r < R; r++) {
        F p = Simd::set1(job.scores[r * job.score_stride + at - origin]);
        CS_UNROLL for (int s = 0; s < S; s++) acc[r][s] = Simd::fma(p, v[s], acc[r][s]);
      }
    }
  }
  CS_UNROLL for (int r = 0; r < R; r++) {
    F factor = Simd::set1(inverse[r]);
    CS_UNROLL for (int s = 0; s < S; s++) {
      Simd::store(job.outputs[r] + d + s * kLanes, Simd::mul(acc[r][s], factor));
    }
  }
}

template <int R>
void attend_rows(const AttentionJob& job) {
  constexpr int kRoom = Simd::kMixAccumulators / R;
  constexpr int kSlice = kRoom >= 8 ? 8 : kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
  int first = job.first[0], last = job.last[0];
  for (int r = 1; r < R; r++) {
    first = job.first[r] < first ? job.first[r] : first;
    last = job.last[r] > last ? job.last[r] : last;
  }
  const int first_block = first / kBlockSize, num_keys = last + 1;
  score_keys<R>(job, first_block, num_keys);
  float inverse[R];
  for (int r = 0; r < R; r++) inverse[r] = 1.0f / soften(job, r, first_block, num_keys);
  int d = 0;
  for (; d + kSlice * kLanes <= job.head_dim; d += kSlice * kLanes) {
    mix_values<R, kSlice>(job, first_block, num_keys, d, inverse);
  }
  for (; d < job.head_dim; d += kLanes) mix_values<R, 1>(job, first_block, num_keys, d, inverse);
}

void attend(const AttentionJob& job) {
  switch (job.num_rows) {
    case 1: return attend_rows<1>(job);
    case 2: return attend_rows<2>(job);
    case 3: return attend_rows<3>(job);
    case 4: return attend_rows<4>(job);
    case 5: return attend_rows<5>(job);
    default: return attend_rows<6>(job);
  }
}

}  // namespace

#include "sampling_kernels.h"

namespace {

constexpr LevelKernels level_kernels(const char* name, bool (*is_supported)()) {
  return {name,     is_supported, Simd::kOffset8, Simd::kOffset4, pack,   unpack_row,
          multiply, quantise,     rotate,         store_kv,       attend, rms_norm,
          sample};
}

}  // namespace
