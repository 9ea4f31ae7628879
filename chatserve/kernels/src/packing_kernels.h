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

inline I largest_lanes(const float* x, int count, I most) {
  for (int k = 0; k < count; k += kLanes) most = Simd::umax(most, Simd::magnitude(Simd::load(x + k)));
  return most;
}

// NaN or infinite if any value is.
inline float largest_of(I lanes) {
  const uint32_t bits = Simd::ulargest(lanes);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float largest_magnitude(const float* x, int count) {
  return largest_of(largest_lanes(x, count, Simd::izero()));
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

// Rows side by side in one panel are packed together, so that whole lines of the cache are written;
// some columns of them at a time, which stay in the first cache.
constexpr int kTileRows = kPanelRows / 2;
constexpr int kTileColumns = 512;
constexpr int kTileStride = static_cast<int>(chatserve::code_stride(kTileColumns));

// Consecutive rows of the weight whose places in one panel are neighbours, as they are in the file.
struct RowRun {
  Lane at;
  int count;
  const void* rows;
  size_t first;  // value in `rows`
  Dtype dtype;
};

// The low half bytes of eight codes, interleaved in four bytes.
inline uint32_t half_bytes_of(uint64_t codes, uint32_t flip) {
  constexpr uint32_t kHalfBytes = 0x0f0f0f0fu;
  const uint32_t low = static_cast<uint32_t>(codes), high = static_cast<uint32_t>(codes >> 32);
  return ((low & kHalfBytes) ^ flip) | ((high & kHalfBytes) ^ flip) << 4;
}

// Codes [kRows][kTileStride] of eight columns at a time.
template <int kRows>
inline void put_rows(const Matrix& w, int columns, const int8_t* codes, uint8_t* out) {
  // adding half of their range to codes flips their top bits
  static_assert(Simd::kOffset4 == 8);
  const uint32_t flip4 = has_floor(w.scaling) ? 0 : 0x08080808u;
  constexpr uint64_t kFlip8 = Simd::kOffset8 ? 0x8080808080808080u : 0;
  const int words = w.bits / 4;
  for (int k = 0; k < columns; k += 8, out += words * 4 * kPanelRows) {
    uint32_t first[kRows], second[kRows];
    CS_UNROLL for (int r = 0; r < kRows; r++) {
      uint64_t eight;
      std::memcpy(&eight, codes + r * kTileStride + k, 8);
      if (w.bits == 4) {
        first[r] = half_bytes_of(eight, flip4);
      } else {
        eight ^= kFlip8;
        first[r] = static_cast<uint32_t>(eight);
        second[r] = static_cast<uint32_t>(eight >> 32);
      }
    }
    std::memcpy(out, first, sizeof(first));
    if (w.bits == 8) std::memcpy(out + 4 * kPanelRows, second, sizeof(second));
  }
}

// Codes [row][kTileStride] of columns [first, first + columns).
inline void put_tile(const Matrix& w, const RowRun& run, int first, int columns, const int8_t* codes) {
  uint8_t* out = w.codes + w.panel_bytes * run.at.panel + 4 * run.at.lane;
  out += static_cast<size_t>(first) / 8 * w.bits / 4 * 4 * kPanelRows;
  if (run.count == kTileRows) return put_rows<kTileRows>(w, columns, codes, out);
  for (int r = 0; r < run.count; r++) put_rows<1>(w, columns, codes + r * kTileStride, out + 4 * r);
}

// Where the scale of a row's group from column `first` on lies.
inline uint16_t* halves_at(const Matrix& w, Lane at, int first) {
  const size_t group = static_cast<size_t>(at.panel) * w.groups + first / kGroup;
  return w.group_scales + group * group_halves(w.scaling) + at.lane;
}

// One row's codes of groups [first, first + columns) / kGroup, and their scales.
inline void round_row_groups(const Matrix& w, Lane at, int first, int columns, const float* x,
                             int8_t* codes) {
  const int stride = group_halves(w.scaling);
  uint16_t* halves = halves_at(w, at, first);
  for (int k = 0; k < columns; k += kGroup, halves += stride) {
    uint16_t half;
    if (w.scaling == Scaling::affine) {
      const Affine affine = round_affine4(x + k, codes + k);
      half = affine.scale;
      halves[kPanelRows] = affine.minimum;
    } else if (w.bits == 4) {
      half = round_group4(x + k, codes + k);
    } else {
      half = half_not_below(largest_magnitude(x + k, kGroup) / 127);
      round_codes(x + k, kGroup, half_to_float(half), 127, codes + k);
    }
    *halves = half;
  }
}

inline void load_columns(const Matrix& w, const RowRun& run, int row, int first, int columns, float* x) {
  row_to_float(run.rows, run.dtype, run.first + static_cast<size_t>(row) * w.columns + first, columns, x);
}

inline float largest_of_row(const Matrix& w, const RowRun& run, int row) {
  float x[kTileColumns];
  I most = Simd::izero();
  for (int k = 0; k < w.columns; k += kTileColumns) {
    const int columns = std::min(kTileColumns, w.columns - k);
    load_columns(w, run, row, k, columns, x);
    most = largest_lanes(x, columns, most);
  }
  return largest_of(most);
}

// One scale for a row: it is looked through before it is rounded.
inline float scale_of_row(const Matrix& w, const RowRun& run, int row) {
  const float scale = largest_of_row(w, run, row) / 127;
  return scale < FLT_MIN ? 0 : scale;  // its inverse would overflow; such a row is zero
}

inline void scale_columns(float* x, int columns, float factor) {
  const F all = Simd::set1(factor);
  for (int k = 0; k < columns; k += kLanes) Simd::store(x + k, Simd::mul(Simd::load(x + k), all));
}

// The fits of a row's groups. Returns the row's scale.
inline float fit_row(const Matrix& w, const RowRun& run, int row, Fits* fits) {
  const float largest = largest_of_row(w, run, row);
  fits->is_zero = !std::isfinite(largest) || largest < kLeastRow;
  if (fits->is_zero) return std::isfinite(largest) ? 0 : NAN;
  fits->inverse = 1.0f / largest;
  float x[kTileColumns];
  for (int k = 0; k < w.columns; k += kTileColumns) {
    const int columns = std::min(kTileColumns, w.columns - k);
    load_columns(w, run, row, k, columns, x);
    scale_columns(x, columns, fits->inverse);
    fit_groups(x, columns / kGroup, k / kGroup, fits);
  }
  const float widest = *std::max_element(fits->scale, fits->scale + w.columns / kGroup);
  fits->unit = widest / 255;
  return fits->unit * largest;
}

// 4-bit codes 0..15 of a row's columns [first, first + columns); scales and zero points go to `halves`,
// a panel's rows apart. Changes x.
inline void round_fitted(const Fits& fits, int first, int columns, float* x, int8_t* codes,
                         uint16_t* halves) {
  const int groups = columns / kGroup;
  if (fits.is_zero) {
    std::memset(codes, 0, columns);
    for (int g = 0; g < groups; g++) halves[static_cast<size_t>(g) * kPanelRows] = 0;
    return;
  }
  scale_columns(x, columns, fits.inverse);
  const int last = first / kGroup + groups;
  for (int g = first / kGroup; g < last; g++, x += kGroup, codes += kGroup, halves += kPanelRows) {
    const long scale_code =
        fits.scale[g] > 0 ? std::max(1L, std::lrintf(fits.scale[g] / fits.unit)) : 0;
    const float scale = static_cast<float>(scale_code) * fits.unit;
    const float per_code = scale > 0 ? 1.0f / scale : 0.0f;
    const float zero = kZeroSteps * (fits.mean_code[g] - fits.mean[g] * per_code);
    const long zero_code = std::lrintf(zero < 0.0f ? 0.0f : zero > 255.0f ? 255.0f : zero);
    *halves = static_cast<uint16_t>(zero_code << 8 | scale_code);
    const F step = Simd::set1(per_code), top = Simd::set1(15.0f);
    const F shift = Simd::set1(static_cast<float>(zero_code) / kZeroSteps);
    for (int k = 0; k < kGroup; k += kLanes) {
      const F place = Simd::fma(Simd::load(x + k), step, shift);
      Simd::store_codes(codes + k, Simd::to_int(Simd::min(top, Simd::max(Simd::zero(), place))));
    }
  }
}

inline void pack_run(const Matrix& w, const RowRun& run) {
  static thread_local Fits fits[kTileRows];  // resident as far as rows are wide
  const bool is_centred = w.scaling == Scaling::centred;
  float scales[kTileRows] = {};
  for (int r = 0; r < run.count && has_row_scales(w.scaling); r++) {
    scales[r] = is_centred ? fit_row(w, run, r, &fits[r]) : scale_of_row(w, run, r);
    w.row_scales[run.at.panel * kPanelRows + run.at.lane + r] = scales[r];
  }
  float x[kTileColumns];
  int8_t codes[kTileRows * kTileStride];
  for (int k = 0; k < w.columns; k += kTileColumns) {
    const int columns = std::min(kTileColumns, w.columns - k);
    for (int r = 0; r < run.count; r++) {
      const Lane at = {run.at.panel, run.at.lane + r};
      int8_t* row_codes = codes + r * kTileStride;
      load_columns(w, run, r, k, columns, x);
      if (w.scaling == Scaling::row) {
        round_codes(x, columns, scales[r], 127, row_codes);
      } else if (is_centred) {
        round_fitted(fits[r], k, columns, x, row_codes, halves_at(w, at, k));
      } else {
        round_row_groups(w, at, k, columns, x, row_codes);
      }
    }
    put_tile(w, run, k, columns, codes);
  }
}

void pack(const Matrix& w, int start, int num_rows, const void* rows, Dtype dtype, RowMap map) {
  for (int i = 0, count; i < num_rows; i += count) {
    const Lane at = place_of(start + i, map);
    count = std::min(num_rows - i, kTileRows - at.lane % kTileRows);
    pack_run(w, {at, count, rows, static_cast<size_t>(i) * w.columns, dtype});
  }
}

void unpack_row(const Matrix& w, int row, float* out) {
  Lane at = place_of(row, RowMap::plain);
  const uint8_t* panel = w.codes + w.panel_bytes * at.panel + 4 * at.lane;
  const int stride = group_halves(w.scaling);
  const uint16_t* halves =
      w.group_scales + static_cast<size_t>(at.panel) * w.groups * stride + at.lane;
  const bool is_affine = w.scaling == Scaling::affine;
  const int offset = has_floor(w.scaling) ? 0 : Simd::kOffset4;
  const float row_scale =
      has_row_scales(w.scaling) ? w.row_scales[at.panel * kPanelRows + at.lane] : 0;
  float scale = row_scale;
  for (int g = 0; g < w.groups; g++, halves += stride) {
    float minimum = 0;
    if (w.scaling == Scaling::centred) {
      scale = row_scale * static_cast<float>(*halves & 0xff);
      minimum = -scale * (static_cast<float>(*halves >> 8) / kZeroSteps);
    } else if (w.scaling != Scaling::row) {
      scale = half_to_float(*halves);
      if (is_affine) minimum = half_to_float(halves[kPanelRows]);
    }
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
