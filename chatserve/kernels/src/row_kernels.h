// One row: norm, quantisation, rotation, and its place in the KV cache. Included by level_kernels.h.
#pragma once

namespace {

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

template <int TERMS>
void quantise_terms(const float* x, const float* norm, float eps, int columns, int offset,
                    const Activations& row) {
  constexpr int kVectors = kGroup / kLanes;
  const int groups = columns / kGroup;
  F factor = Simd::set1(norm ? norm_factor(x, eps, columns) : 1.0f);
  for (int g = 0; g < groups; g++) {
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
    const float scale = bits < 0x7f800000u ? (is_usable ? largest / 127.0f : 0.0f) : NAN;
    I totals[TERMS];
    CS_UNROLL for (int t = 0; t < TERMS; t++) totals[t] = Simd::izero();
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F scaled = is_usable ? Simd::mul(values[v], inverse) : Simd::zero();
      CS_UNROLL for (int t = 0; t < TERMS; t++) {
        I rounded = Simd::to_int(scaled);
        totals[t] = Simd::iadd(totals[t], rounded);
        Simd::store_codes(row.codes + t * row.stride + g * kGroup + v * kLanes, rounded);
        // at most half a step is left: 127 finer ones
        scaled = Simd::mul(Simd::sub(scaled, Simd::to_float(rounded)), Simd::set1(254.0f));
      }
    }
    CS_UNROLL for (int t = 0; t < TERMS; t++) {
      row.scales[t * groups + g] = t ? scale / 254.0f : scale;
      row.corrections[t * groups + g] = -offset * Simd::isum(totals[t]);
    }
  }
}

void quantise(const float* x, const float* norm, float eps, int columns, int offset, int num_terms,
              const Activations& row) {
  (num_terms == 1 ? quantise_terms<1> : quantise_terms<2>)(x, norm, eps, columns, offset, row);
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

}  // namespace
