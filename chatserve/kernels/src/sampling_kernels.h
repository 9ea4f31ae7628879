// Sampling of one row over the level's `Simd`; included by level_kernels.h.
//
// The kept tokens are always the first so many in the order of falling logits, equal ones by rising
// id. Nothing is sorted for that: the logit where they end is found by halving the range of floats
// between two that enclose it, and only among candidates that a cheap bound leaves.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>

#include "level.h"
#include "sampling.h"

namespace {

using chatserve::kSamplingBlock;
using chatserve::SamplingJob;

constexpr int kStride = 4 * kLanes;  // of loops with four accumulators
static_assert(kSamplingBlock % kStride == 0 && kLanes <= chatserve::kMaxSamplingLanes);
constexpr float kSmallestExponent = -87.0f;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Integers in the order of finite floats, and back.
inline int32_t key_of(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<int32_t>(bits >> 31 ? bits ^ 0x7fffffffu : bits);
}

inline float value_of(int32_t key) {
  const uint32_t bits = static_cast<uint32_t>(key);
  return float_of(key < 0 ? bits ^ 0x7fffffffu : bits);
}

// Number `position` of the stream that SplitMix64 (Steele, Lea & Flood 2014) draws from `stream`,
// in [0, 1).
inline double uniform(uint64_t stream, uint64_t position) {
  uint64_t z = stream + (position + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// visit(vector, first index) over [begin, end); behind the end stands -inf.
template <typename Visit>
inline void visit_vectors(const float* x, int begin, int end, Visit visit) {
  int i = begin;
  for (; i + kLanes <= end; i += kLanes) visit(Simd::load(x + i), i);
  if (i == end) return;
  float rest[kLanes];
  for (int lane = 0; lane < kLanes; lane++) rest[lane] = i + lane < end ? x[i + lane] : -INFINITY;
  visit(Simd::load(rest), i);
}

inline int block_end(int begin, int count) {
  return begin + kSamplingBlock < count ? begin + kSamplingBlock : count;
}

// ---- penalties ----

inline void apply_lists(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  float* x = job.logits;
  for (int i = 0; i < p.num_seen; i++) {
    float& logit = x[p.seen_ids[i]];
    logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
  }
  for (int i = 0; i < p.num_offsets; i++) x[p.offset_ids[i]] += p.offsets[i];
  if (p.position < p.masked_until) {
    for (int i = 0; i < p.num_masked; i++) x[p.masked_ids[i]] = -INFINITY;
  }
  for (int i = 0; i < job.num_forbidden; i++) x[job.forbidden_ids[i]] = -INFINITY;
}

// ---- passes over the vocabulary ----

// The largest logit, NaN if any is NaN; the lane maxima of each block. Returns their number too.
inline float find_largest(const SamplingJob& job, int* num_maxima) {
  const F nothing = Simd::set1(-INFINITY);
  F best = nothing;
  I most = Simd::izero();  // a NaN has more bits than anything else
  float* maxima = job.scratch.maxima;
  for (int begin = 0; begin < job.vocab; begin += kSamplingBlock, maxima += kLanes) {
    F m[4] = {nothing, nothing, nothing, nothing};
    I n[4] = {most, most, most, most};
    const int end = block_end(begin, job.vocab);
    int i = begin;
    for (; i + kStride <= end; i += kStride) {
      CS_UNROLL for (int j = 0; j < 4; j++) {
        F x = Simd::load(job.logits + i + j * kLanes);
        m[j] = Simd::max(x, m[j]);
        n[j] = Simd::umax(n[j], Simd::magnitude(x));
      }
    }
    visit_vectors(job.logits, i, end, [&](F x, int) {
      m[0] = Simd::max(x, m[0]);
      // -inf, also behind the end, is no more than the limit
      n[0] = Simd::umax(n[0], Simd::magnitude(x));
    });
    m[0] = Simd::max(Simd::max(m[0], m[1]), Simd::max(m[2], m[3]));
    most = Simd::umax(Simd::umax(n[0], n[1]), Simd::umax(n[2], n[3]));
    Simd::store(maxima, m[0]);
    best = Simd::max(best, m[0]);
  }
  *num_maxima = static_cast<int>(maxima - job.scratch.maxima);
  return Simd::ulargest(most) > 0x7f800000u ? NAN : Simd::largest(best);
}

inline int32_t first_equal(const SamplingJob& job, float best) {
  const float* maxima = job.scratch.maxima;
  int begin = 0;
  for (;; begin += kSamplingBlock, maxima += kLanes) {
    if (Simd::largest(Simd::load(maxima)) == best) break;
  }
  while (job.logits[begin] != best) begin++;
  return begin;
}

// Everything with a logit >= limit becomes a candidate; limit > -inf. Returns how many.
inline int gather(const SamplingJob& job, float limit) {
  const F bound = Simd::set1(limit);
  const auto& s = job.scratch;
  int n = 0;
  visit_vectors(job.logits, 0, job.vocab, [&](F x, int first) {
    for (uint32_t bits = Simd::not_below(x, bound); bits; bits &= bits - 1) {
      const int id = first + __builtin_ctz(bits);
      s.ids[n] = id;
      s.values[n++] = job.logits[id];
    }
  });
  return n;
}

struct Weigher {
  F best, inverse;

  F operator()(F x) const {
    const F exponent = Simd::mul(Simd::sub(x, best), inverse);
    return Simd::keep_not_below(exponential(exponent), exponent, Simd::set1(kSmallestExponent));
  }
};

// Weights of the whole vocabulary: of each block, and added up.
inline double weigh_all(const SamplingJob& job, const Weigher& weigh) {
  double total = 0;
  double* mass = job.scratch.block_mass;
  for (int begin = 0; begin < job.vocab; begin += kSamplingBlock) {
    F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    const int end = block_end(begin, job.vocab);
    int i = begin;
    for (; i + kStride <= end; i += kStride) {
      CS_UNROLL for (int j = 0; j < 4; j++) {
        sums[j] = Simd::add(sums[j], weigh(Simd::load(job.logits + i + j * kLanes)));
      }
    }
    visit_vectors(job.logits, i, end, [&](F x, int) { sums[0] = Simd::add(sums[0], weigh(x)); });
    const F sum = Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3]));
    *mass = Simd::sum(sum);
    total += *mass++;
  }
  return total;
}

// ---- candidates ----

inline void weigh_candidates(const SamplingJob& job, int n, const Weigher& weigh) {
  for (int i = 0; i < n; i += kLanes) {
    Simd::store(job.scratch.weights + i, weigh(Simd::load(job.scratch.values + i)));
  }
}

// Until the next whole stride the candidates are followed by some that no limit lets pass.
inline void pad(float* values, int n) {
  for (int i = n; i % kStride; i++) values[i] = -INFINITY;
}

struct Count {
  double operator()(const float* values, int n, float limit) const {
    const F bound = Simd::set1(limit);
    int count = 0;
    for (int i = 0; i < n; i += kLanes) {
      count += __builtin_popcount(Simd::not_below(Simd::load(values + i), bound));
    }
    return count;
  }
  double of(int) const { return 1; }
};

struct Mass {
  const float* weights;

  double operator()(const float* values, int n, float limit) const {
    const F bound = Simd::set1(limit);
    double total = 0;
    for (int begin = 0; begin < n; begin += kSamplingBlock) {
      F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
      const int end = block_end(begin, n);
      for (int i = begin; i < end; i += kStride) {
        CS_UNROLL for (int j = 0; j < 4; j++) {
          const int k = i + j * kLanes;
          sums[j] = Simd::add(sums[j], Simd::keep_not_below(Simd::load(weights + k),
                                                            Simd::load(values + k), bound));
        }
      }
      total += Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
    }
    return total;
  }
  double of(int index) const { return weights[index]; }
};

// The largest limit in [low, high] at which the values not below it measure `wanted`; `low` when
// none does. `values` are padded.
template <typename Measure>
inline float find_limit(const float* values, int n, float low, float high, double wanted,
                        const Measure& measure) {
  int64_t first = key_of(low), last = key_of(high);
  while (first < last) {
    const int64_t middle = first + (last - first + 1) / 2;
    if (measure(values, n, value_of(static_cast<int32_t>(middle))) >= wanted) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return value_of(static_cast<int32_t>(first)) + 0.0f;  // never -0
}

// Drops all but the first candidates, by falling logits and rising ids, that measure `wanted`.
template <typename Measure>
inline int keep_largest(const SamplingJob& job, int n, float low, float high, double wanted,
                        const Measure& measure) {
  const auto& s = job.scratch;
  const float limit = find_limit(s.values, n, low, high, wanted, measure);
  double kept = measure(s.values, n, value_of(key_of(limit) + 1));
  int count = 0;
  for (int i = 0; i < n; i++) {
    const float x = s.values[i];
    if (x < limit) continue;
    if (x == limit) {
      if (kept >= wanted) continue;
      kept += measure.of(i);
    }
    s.values[count] = x;
    s.weights[count] = s.weights[i];
    s.ids[count++] = s.ids[i];
  }
  pad(s.values, count);
  return count;
}

// Candidates that top-k leaves.
inline int gather_top_k(const SamplingJob& job, int num_maxima, float best) {
  const int k = job.params->top_k;
  // at least k logits are not below the k-th largest of the maxima
  float low = -FLT_MAX;
  if (k <= num_maxima) {
    low = find_limit(job.scratch.maxima, num_maxima, low, best, k, Count{});
  }
  const int n = gather(job, low);
  pad(job.scratch.values, n);
  return keep_largest(job, n, low, best, k, Count{});
}

// Candidates that top-p leaves of the whole vocabulary.
inline int gather_top_p(const SamplingJob& job, float best, const Weigher& weigh) {
  const auto& s = job.scratch;
  const double top_p = job.params->top_p, total = weigh_all(job, weigh);
  const double wanted = top_p * total;
  // All logits of less than a share of 1 - top_p divided by the size of the vocabulary together
  // are not missed; mostly a far higher bound does.
  for (double parts = 256;; parts *= 16) {
    float low = -FLT_MAX;
    if (parts < job.vocab) {
      const double weight = (1 - top_p) / parts * total;
      const double bound = best + job.params->temperature * std::log(weight);
      low = bound < -FLT_MAX ? -FLT_MAX : bound < best ? static_cast<float>(bound) : best;
    }
    const int n = gather(job, low);
    pad(s.values, n);
    weigh_candidates(job, (n + kStride - 1) / kStride * kStride, weigh);
    const Mass mass{s.weights};
    if (parts >= job.vocab || mass(s.values, n, low) >= wanted) {
      return keep_largest(job, n, low, best, wanted, mass);
    }
  }
}

// The smallest logit that min-p keeps.
inline float min_p_limit(const SamplingJob& job, float best) {
  const double exact = best + job.params->min_p_margin;
  if (!(exact > -FLT_MAX)) return -FLT_MAX;
  const float limit = static_cast<float>(exact);
  return limit < exact ? value_of(key_of(limit) + 1) : limit;
}

// ---- the draw ----

// The first of weights[n] where the running total, from `before`, passes `target`; the last that
// has any weight where rounding lets none pass it.
inline int walk(const float* weights, int n, double before, double target) {
  int last = 0;
  for (int i = 0; i < n; i++) {
    if (weights[i] > 0) last = i;
    before += weights[i];
    if (before > target) return i;
  }
  return last;
}

inline int32_t draw_of_all(const SamplingJob& job, double u, const Weigher& weigh) {
  const double target = u * weigh_all(job, weigh);
  const double* mass = job.scratch.block_mass;
  double before = 0, total = 0;
  int begin = 0;
  for (int b = 0; b * kSamplingBlock < job.vocab; b++) {
    if (mass[b] == 0) continue;
    begin = b * kSamplingBlock;
    before = total;
    total += mass[b];
    if (total > target) break;
  }
  const int count = block_end(begin, job.vocab) - begin;
  float weights[kSamplingBlock];
  visit_vectors(job.logits + begin, 0, count,
                [&](F x, int i) { Simd::store(weights + i, weigh(x)); });
  return begin + walk(weights, count, before, target);
}

inline int32_t draw_of_candidates(const SamplingJob& job, int n, double u) {
  double total = 0;
  for (int i = 0; i < n; i++) total += job.scratch.weights[i];
  return job.scratch.ids[walk(job.scratch.weights, n, 0, u * total)];
}

int32_t sample(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  apply_lists(job);
  int num_maxima;
  const float best = find_largest(job, &num_maxima);
  if (!(std::fabs(best) <= FLT_MAX)) return -1;
  if (p.is_greedy) return first_equal(job, best);
  const Weigher weigh = {Simd::set1(best), Simd::set1(static_cast<float>(1 / p.temperature))};
  const double u = uniform(p.stream, static_cast<uint64_t>(p.position));
  const bool has_top_k = p.top_k > 0 && p.top_k < job.vocab, has_top_p = p.top_p < 1;
  const bool has_min_p = p.min_p_margin > -INFINITY;
  int n;
  if (has_top_k) {
    n = gather_top_k(job, num_maxima, best);
    weigh_candidates(job, n, weigh);
    if (has_top_p) {
      // behind the candidates stand -inf values, so their weights do not count
      const Mass mass{job.scratch.weights};
      const double total = mass(job.scratch.values, n, -FLT_MAX);
      n = keep_largest(job, n, -FLT_MAX, best, p.top_p * total, mass);
    }
  } else if (has_top_p) {
    n = gather_top_p(job, best, weigh);
  } else if (has_min_p) {
    n = gather(job, min_p_limit(job, best));
    weigh_candidates(job, n, weigh);
    return draw_of_candidates(job, n, u);
  } else {
    return draw_of_all(job, u, weigh);
  }
  if (has_min_p) {
    const float limit = min_p_limit(job, best);
    int count = 0;
    for (int i = 0; i < n; i++) {
      if (job.scratch.values[i] < limit) continue;
      job.scratch.weights[count] = job.scratch.weights[i];
      job.scratch.ids[count++] = job.scratch.ids[i];
    }
    n = count;
  }
  return draw_of_candidates(job, n, u);
}

}  // namespace
