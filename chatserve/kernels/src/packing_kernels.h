// Weights from checkpoint rows to panels and back, over the level's `Simd`. Included by level_kernels.h.
#pragma once

namespace {

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

constexpr uint16_t kHalfNaN = 0x7e00;

// The smallest half that is not below a value >= 0; the largest half above its range, NaN for what is
// not finite.
inline uint16_t half_not_below(float value) {
  if (!std::isfinite(value)) return kHalfNaN;
  if (value > 65504.0f) return 0x7bff;
  if (value < 0x1p-14f) return static_cast<uint16_t>(std::ceil(value * 0x1p24f));  // subnormal
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(((bits + 0x1fff) >> 13) - (112u << 10));
}

inline F within_half(F v) {
  return Simd::min(Simd::set1(65504.0f), Simd::max(Simd::set1(-65504.0f), v));
}

// The nearest half of a finite value; the largest above the range.
inline uint16_t half_near(float value) {
  uint16_t halves[kLanes];
  Simd::store_half(halves, within_half(Simd::set1(value)));
  return halves[0];
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

struct Affine {
  uint16_t scale, minimum;
};

// A group's 4-bit codes 0..15 from its smallest value to its largest. What has been packed so before
// comes back exactly: the smallest is the minimum then, and the largest 15 steps away.
inline Affine round_affine4(const float* x, int8_t* codes) {
  float least = x[0], most = x[0];
  bool is_finite = true;
  for (int k = 0; k < kGroup; k++) {
    is_finite = is_finite && std::isfinite(x[k]);
    least = x[k] < least ? x[k] : least;
    most = x[k] > most ? x[k] : most;
  }
  if (!is_finite) {
    std::memset(codes, 0, kGroup);
    return {kHalfNaN, kHalfNaN};
  }
  const Affine affine = {half_near((most - least) / 15), half_near(least)};
  const float scale = half_to_float(affine.scale), minimum = half_to_float(affine.minimum);
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int k = 0; k < kGroup; k++) {
    const float code = (x[k] - minimum) * inverse;
    codes[k] = static_cast<int8_t>(std::lrintf(code < 0.0f ? 0.0f : code > 15.0f ? 15.0f : code));
  }
  return affine;
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
  const int offset = w.scaling == Scaling::affine ? 0 : Simd::kOffset4;
  for (int k = 0; k < w.columns; k += 8, panel += 4 * kPanelRows) {
    for (int j = 0; j < 4; j++) {
      int low = codes[k + j] + offset, high = codes[k + 4 + j] + offset;
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
    if (w.scaling != Scaling::row) {
      const int stride = group_halves(w.scaling);
      uint16_t* halves = w.group_scales + static_cast<size_t>(at.panel) * w.groups * stride;
      for (int g = 0; g < w.groups; g++, halves += stride) {
        uint16_t half;
        if (w.scaling == Scaling::affine) {
          const Affine affine = round_affine4(x + g * kGroup, codes + g * kGroup);
          half = affine.scale;
          halves[kPanelRows + at.lane] = affine.minimum;
        } else if (w.bits == 4) {
          half = round_group4(x + g * kGroup, codes + g * kGroup);
        } else {
          half = half_not_below(largest_magnitude(x + g * kGroup, kGroup) / 127);
          round_codes(x + g * kGroup, kGroup, half_to_float(half), 127, codes + g * kGroup);
        }
        halves[at.lane] = half;
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
  const int stride = group_halves(w.scaling);
  const uint16_t* halves =
      w.group_scales + static_cast<size_t>(at.panel) * w.groups * stride + at.lane;
  const bool is_affine = w.scaling == Scaling::affine;
  const int offset = is_affine ? 0 : Simd::kOffset4;
  float scale = w.scaling == Scaling::row ? w.row_scales[at.panel * kPanelRows + at.lane] : 0;
  for (int g = 0; g < w.groups; g++, halves += stride) {
    if (w.scaling != Scaling::row) scale = half_to_float(*halves);
    const float minimum = is_affine ? half_to_float(halves[kPanelRows]) : 0;
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
          x[k + j] = static_cast<float>((panel[j] & 15) - offset) * scale + minimum;
          x[k + 4 + j] = static_cast<float>((panel[j] >> 4) - offset) * scale + minimum;
        }
      }
    }
  }
}

}  // namespace
