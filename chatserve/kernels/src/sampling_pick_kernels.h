// Sampling, the pick of a token from what the first look has left. Over the level's `Simd`; included by
// level_kernels.h.
//
// The kept tokens are always the first so many in the order of falling logits, equal ones by rising
// id. Nothing is sorted for that: the logit where they end is found by halving the range of floats
// between two that enclose it, and only among candidates that a cheap bound leaves.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>

#include "sampling_look_kernels.h"

namespace {

// How far below what top-p may drop a logit must be to be dropped at first glance; the largest logit
// has weight 1.
constexpr double kFewParts = 256, kManyParts = 4096, kSteepTotal = 4;

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

// ---- what the blocks say together ----

// NaN if any logit is NaN.
inline float largest_of_all(const SamplingJob& job) {
  float best = -INFINITY;
  bool is_healthy = true;
  for (int b = 0, count = num_blocks(job); b < count; b++) {
    const float x = job.blocks.largest[b];
    is_healthy &= x == x;
    best = x > best ? x : best;
  }
  return is_healthy ? best : NAN;
}

inline int32_t first_equal(const SamplingJob& job, float best) {
  int b = 0;
  while (job.blocks.largest[b] != best) b++;
  int id = b * kSamplingBlock;
  while (job.logits[id] != best) id++;
  return id;
}

// Weights of blocks against the largest logit of all from now on. Returns their sum.
inline double weigh_blocks(const SamplingJob& job, const Weigher& weigh) {
  float* mass = job.blocks.mass;
  double total = 0;
  visit_vectors(job.blocks.largest, 0, num_blocks(job), [&](F largest, int first) {
    float factors[kLanes];
    Simd::store(factors, weigh(largest));
    for (int lane = 0; lane < kLanes && first + lane < num_blocks(job); lane++) {
      total += mass[first + lane] *= factors[lane];
    }
  });
  return total;
}

// Everything with a logit >= limit becomes a candidate; limit > -inf. Returns how many.
inline int gather(const SamplingJob& job, float limit) {
  const F bound = Simd::set1(limit);
  const auto& s = job.scratch;
  int n = 0;
  for (int b = 0, count = num_blocks(job); b < count; b++) {
    if (job.blocks.largest[b] < limit) continue;
    const int begin = b * kSamplingBlock;
    visit_vectors(job.logits, begin, block_end(begin, job.vocab), [&](F x, int first) {
      for (uint32_t bits = Simd::not_below(x, bound); bits; bits &= bits - 1) {
        const int id = first + __builtin_ctz(bits);
        s.ids[n] = id;
        s.values[n++] = job.logits[id];
      }
    });
  }
  return n;
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
  for (int i = 0; i < n; i++) {  // no branch on what nobody can foretell
    const float x = s.values[i];
    bool is_kept = x > limit;
    if (x == limit && kept < wanted) {
      kept += measure.of(i);
      is_kept = true;
    }
    s.values[count] = x;
    s.weights[count] = s.weights[i];
    s.ids[count] = s.ids[i];
    count += is_kept;
  }
  pad(s.values, count);
  return count;
}

// The k largest become candidates.
inline int gather_top_k(const SamplingJob& job, float best, int k) {
  const int num_maxima = num_blocks(job) * kLanes;
  // at least k logits are not below the k-th largest of the maxima
  float low = -FLT_MAX;
  if (k <= num_maxima) {
    low = find_limit(job.blocks.maxima, num_maxima, low, best, k, Count{});
  }
  const int n = gather(job, low);
  pad(job.scratch.values, n);
  return keep_largest(job, n, low, best, k, Count{});
}

// Candidates that top-p leaves of the whole vocabulary.
inline int gather_top_p(const SamplingJob& job, float best, double total, const Weigher& weigh) {
  const auto& s = job.scratch;
  const double top_p = job.params->top_p, wanted = top_p * total;
  // All that weigh less than 1 - top_p of the total, divided by the size of the vocabulary, are not
  // missed. Mostly a far higher bound does: even more so where one id has much of the weight.
  for (double parts = total < kSteepTotal ? kFewParts : kManyParts;; parts *= 16) {
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

inline int32_t draw_of_all(const SamplingJob& job, double target, const Weigher& weigh) {
  const float* mass = job.blocks.mass;
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

// Candidates that min-p leaves of the first n.
inline int keep_min_p(const SamplingJob& job, int n, float best) {
  const auto& s = job.scratch;
  const float limit = min_p_limit(job, best);
  int count = 0;
  for (int i = 0; i < n; i++) {
    const float x = s.values[i];
    s.values[count] = x;
    s.weights[count] = s.weights[i];
    s.ids[count] = s.ids[i];
    count += x >= limit;
  }
  return count;
}

inline bool is_finite(float x) { return std::fabs(x) <= FLT_MAX; }

// What may be drawn: so many candidates with their weights, or kAll, whose weights the blocks have.
constexpr int kAll = -1;

struct Kept {
  int count;
  double total;  // of their weights
};

inline double candidates_total(const SamplingJob& job, int n) {
  double total = 0;
  for (int i = 0; i < n; i++) total += job.scratch.weights[i];
  return total;
}

// With the weights of the whole vocabulary.
inline Kept keep_by_mass(const SamplingJob& job, const Weigher& weigh, float best) {
  const double total = weigh_blocks(job, weigh);
  if (!(job.params->top_p < 1)) return {kAll, total};
  int n = gather_top_p(job, best, total, weigh);
  if (job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return {n, candidates_total(job, n)};
}

// With the weights of the few that top-k or min-p leave.
inline Kept keep_by_rank(const SamplingJob& job, const Weigher& weigh, float best) {
  const bool is_ranked = has_top_k(job);
  int n = is_ranked ? gather_top_k(job, best, job.params->top_k)
                    : gather(job, min_p_limit(job, best));
  weigh_candidates(job, n, weigh);
  if (is_ranked && job.params->top_p < 1) {
    // behind the candidates stand -inf values, so their weights do not count
    const Mass mass{job.scratch.weights};
    const double total = mass(job.scratch.values, n, -FLT_MAX);
    n = keep_largest(job, n, -FLT_MAX, best, job.params->top_p * total, mass);
  }
  if (is_ranked && job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return {n, candidates_total(job, n)};
}

inline Kept keep(const SamplingJob& job, const Weigher& weigh, float best) {
  return needs_mass(job) ? keep_by_mass(job, weigh, best) : keep_by_rank(job, weigh, best);
}

int32_t pick(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  const float best = largest_of_all(job);
  if (!is_finite(best)) return -1;
  if (p.is_greedy) return first_equal(job, best);
  const Weigher weigh(best, p.temperature);
  const double u = uniform(p.stream, static_cast<uint64_t>(p.position));
  const Kept kept = keep(job, weigh, best);
  if (kept.count == kAll) return draw_of_all(job, u * kept.total, weigh);
  return job.scratch.ids[walk(job.scratch.weights, kept.count, 0, u * kept.total)];
}

}  // namespace
