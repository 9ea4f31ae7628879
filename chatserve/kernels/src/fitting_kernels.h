// The 4-bit codes that are nearest to the groups of a row, over the level's `Simd`. Included by
// level_kernels.h.
#pragma once

namespace {

// How far the ends of a group are drawn in before codes are fitted: what little lies outside is
// rounded to the ends, and the steps for all others are finer.
constexpr float kReaches[] = {1.0f, 0.93f, 0.86f, 0.79f};
constexpr float kMostZero = 255.0f / kZeroSteps;  // a zero point has 8 bits
constexpr int kNumReaches = sizeof(kReaches) / sizeof(*kReaches);
constexpr int kReachesAtOnce = kLanes == 16 ? 4 : 2;  // whose sums fit into registers
constexpr int kFits = 2;  // of scale and minimum to the codes, and of the codes to them
constexpr int kMaxGroups = kMaxColumns / kGroup;
constexpr float kLeastRow = FLT_MIN * 65536;  // below it the steps would be subnormal

// What fits the groups of a row best, whose values times `inverse` are between -1 and 1: the scale of
// their 4-bit codes, and the means of these and of the weights, by which a line through the codes is given
// for any other scale. Room for lanes beyond the last.
struct Fits {
  bool is_zero;  // all codes are 0
  float inverse, unit;
  float scale[kMaxGroups + kLanes], mean_code[kMaxGroups + kLanes], mean[kMaxGroups + kLanes];
};

// Least squares for kLanes groups side by side: x[column][lane]. The best of several reaches. Changes x.
inline void fit_lanes(float (*x)[kLanes], float* scales, float* mean_codes, float* means) {
  const F top = Simd::set1(15.0f), none = Simd::zero(), count = Simd::set1(kGroup);
  const F share = Simd::set1(1.0f / kGroup);
  F least = none, most = none, total = none;  // a zero point lies among the codes
  for (int k = 0; k < kGroup; k++) {
    const F v = Simd::load(x[k]);
    least = Simd::min(v, least);
    most = Simd::max(v, most);
    total = Simd::add(total, v);
  }
  Simd::store(means, Simd::mul(total, share));
  const F range = Simd::sub(most, least), middle = Simd::fma(range, Simd::set1(0.5f), least);
  F sum = none, squares = none;
  for (int k = 0; k < kGroup; k++) {
    const F v = Simd::sub(Simd::load(x[k]), middle);
    Simd::store(x[k], v);
    sum = Simd::add(sum, v);
    squares = Simd::fma(v, v, squares);
  }
  alignas(64) float errors[kNumReaches][kLanes], fitted[kNumReaches][kLanes];
  alignas(64) float codes[kNumReaches][kLanes];
  for (int first = 0; first < kNumReaches; first += kReachesAtOnce) {
    // a code is v * inverse + shift, rounded
    F inverse[kReachesAtOnce], shift[kReachesAtOnce], scale[kReachesAtOnce];
    F code_sum[kReachesAtOnce], code_squares[kReachesAtOnce], products[kReachesAtOnce];
    CS_UNROLL for (int r = 0; r < kReachesAtOnce; r++) {
      inverse[r] = Simd::div(top, Simd::mul(range, Simd::set1(kReaches[first + r])));
      shift[r] = Simd::set1(7.5f);
    }
    for (int fit = 0; fit < kFits; fit++) {
      CS_UNROLL for (int r = 0; r < kReachesAtOnce; r++) {
        code_sum[r] = code_squares[r] = products[r] = none;
      }
      for (int k = 0; k < kGroup; k++) {
        const F v = Simd::load(x[k]);
        CS_UNROLL for (int r = 0; r < kReachesAtOnce; r++) {
          const F place = Simd::min(top, Simd::max(none, Simd::fma(v, inverse[r], shift[r])));
          const F code = Simd::to_float(Simd::to_int(place));
          code_sum[r] = Simd::add(code_sum[r], code);
          code_squares[r] = Simd::fma(code, code, code_squares[r]);
          products[r] = Simd::fma(code, v, products[r]);
        }
      }
      CS_UNROLL for (int r = 0; r < kReachesAtOnce; r++) {
        const F spread = Simd::sub(Simd::mul(count, code_squares[r]), Simd::mul(code_sum[r], code_sum[r]));
        const F slope = Simd::sub(Simd::mul(count, products[r]), Simd::mul(code_sum[r], sum));
        scale[r] = Simd::div(slope, spread);
        inverse[r] = Simd::div(spread, slope);
        // the line passes through the means
        shift[r] = Simd::mul(Simd::sub(code_sum[r], Simd::mul(sum, inverse[r])), share);
      }
    }
    CS_UNROLL for (int r = 0; r < kReachesAtOnce; r++) {
      const F minimum = Simd::mul(Simd::sub(sum, Simd::mul(scale[r], code_sum[r])), share);
      const F explained = Simd::fma(minimum, sum, Simd::mul(scale[r], products[r]));
      Simd::store(errors[first + r], Simd::sub(squares, explained));
      Simd::store(fitted[first + r], scale[r]);
      Simd::store(codes[first + r], Simd::mul(code_sum[r], share));
    }
  }
  alignas(64) float low[kLanes], high[kLanes];
  Simd::store(low, least);
  Simd::store(high, most);
  for (int lane = 0; lane < kLanes; lane++) {
    // of a group of one value, which no line fits, or of one so far from 0 that the best line's zero
    // point is no code: from the least to the most, 0 among them
    scales[lane] = (high[lane] - low[lane]) / 15;
    mean_codes[lane] = scales[lane] > 0 ? (means[lane] - low[lane]) / scales[lane] : 0.0f;
    float error = FLT_MAX;
    for (int r = 0; r < kNumReaches; r++) {
      const float zero = codes[r][lane] - means[lane] / fitted[r][lane];
      if (errors[r][lane] < error && fitted[r][lane] > 0 && zero >= 0 && zero <= kMostZero) {
        error = errors[r][lane];
        scales[lane] = fitted[r][lane];
        mean_codes[lane] = codes[r][lane];
      }
    }
  }
}

// Some neighbouring groups of one row, the first of them `start`.
inline void fit_groups(const float* x, int groups, int start, Fits* fits) {
  alignas(64) float columns[kGroup][kLanes];
  for (int first = 0; first < groups; first += kLanes) {
    for (int k = 0; k < kGroup; k += kLanes) {
      F part[kLanes];
      for (int lane = 0; lane < kLanes; lane++) {
        // lanes beyond the last group repeat it
        const int g = std::min(first + lane, groups - 1);
        part[lane] = Simd::load(x + g * kGroup + k);
      }
      Simd::transpose(part);
      for (int i = 0; i < kLanes; i++) Simd::store(columns[k + i], part[i]);
    }
    const int at = start + first;
    fit_lanes(columns, fits->scale + at, fits->mean_code + at, fits->mean + at);
  }
}

}  // namespace
