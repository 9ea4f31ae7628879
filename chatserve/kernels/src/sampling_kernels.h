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

constexpr double kLog2E = 1.4426950408889634;
constexpr int kStride = 4 * kLanes;  // of loops with four accumulators
static_assert(kSamplingBlock % kStride == 0 && kLanes <= chatserve::kMaxSamplingLanes);
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

// What the logits of a block or of all say together.
struct Extremes {
  F largest = Simd::set1(-INFINITY);
  I most = Simd::izero();  // magnitudes as integers, of which a NaN has the largest

  void add(F x) {
    largest = Simd::max(x, largest);
    most = Simd::umax(most, Simd::magnitude(x));
  }
  void add(const Extremes& other) {
    largest = Simd::max(largest, other.largest);
    most = Simd::umax(most, other.most);
  }
  // NaN if any logit is NaN.
  float value() const {
    return Simd::ulargest(most) > 0x7f800000u ? NAN : Simd::largest(largest);
  }
};

template <bool kIsFetching>
inline Extremes block_extremes(const SamplingJob& job, int begin, int end) {
  Extremes parts[4];
  int i = begin;
  for (; i + kStride <= end; i += kStride) {
    CS_UNROLL for (int j = 0; j < 4; j++) {
      const float* x = job.logits + i + j * kLanes;
      parts[j].add(Simd::load(x));
      if (kIsFetching) Simd::prefetch_l2(x + 2 * kSamplingBlock);
    }
  }
  // -inf, behind the end, is never the largest and never a NaN
  visit_vectors(job.logits, i, end, [&](F x, int) { parts[0].add(x); });
  parts[0].add(parts[1]);
  parts[2].add(parts[3]);
  parts[0].add(parts[2]);
  return parts[0];
}

// The largest logit, NaN if any is NaN; the lane maxima of each block, and how many they are.
inline float find_largest(const SamplingJob& job, int* num_maxima) {
  Extremes all;
  float* maxima = job.scratch.maxima;
  for (int begin = 0; begin < job.vocab; begin += kSamplingBlock, maxima += kLanes) {
    const Extremes block = block_extremes<true>(job, begin, block_end(begin, job.vocab));
    Simd::store(maxima, block.largest);
    all.add(block);
  }
  *num_maxima = static_cast<int>(maxima - job.scratch.maxima);
  return all.value();
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

// e^((x - best) / temperature) for x <= best as a power of 2, 0 below its range; relative error
// about 1e-7. A polynomial of degree 5 whose largest relative error over [-1/2, 1/2] is 7e-8.
struct Weigher {
  F best, scale;  // scale: log2(e) / temperature

  F operator()(F x) const {
    const F lowest = Simd::set1(-126.0f);
    const F exponent = Simd::mul(Simd::sub(x, best), scale);
    const F t = Simd::max(exponent, lowest);
    const I n = Simd::to_int(t);
    const F r = Simd::sub(t, Simd::to_float(n));
    F p = Simd::set1(1.327647152e-3f);
    p = Simd::fma(p, r, Simd::set1(9.675541331e-3f));
    p = Simd::fma(p, r, Simd::set1(5.550713275e-2f));
    p = Simd::fma(p, r, Simd::set1(2.402211972e-1f));
    p = Simd::fma(p, r, Simd::set1(6.931469671e-1f));
    p = Simd::fma(p, r, Simd::set1(1.0f));
    return Simd::keep_not_below(Simd::mul(p, Simd::power_of_two(n)), exponent, lowest);
  }
};

inline float block_mass(const SamplingJob& job, int begin, int end, const Weigher& weigh) {
  F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int i = begin;
  for (; i + kStride <= end; i += kStride) {
    CS_UNROLL for (int j = 0; j < 4; j++) {
      const float* x = job.logits + i + j * kLanes;
      Simd::prefetch_l2(x + kSamplingBlock);  // the next block arrives during the sums
      sums[j] = Simd::add(sums[j], weigh(Simd::load(x)));
    }
  }
  visit_vectors(job.logits, i, end, [&](F x, int) { sums[0] = Simd::add(sums[0], weigh(x)); });
  return Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}

// The largest logit, as above; the weights of each block, and added up. A block is weighed against
// its own largest logit while it is at hand, and against that of all afterwards.
inline float weigh_blocks(const SamplingJob& job, F scale, double* total) {
  Extremes all;
  float* maxima = job.scratch.maxima;
  double* mass = job.scratch.block_mass;
  int num_blocks = 0;
  for (int begin = 0; begin < job.vocab; begin += kSamplingBlock) {
    const int end = block_end(begin, job.vocab);
    const Extremes block = block_extremes<false>(job, begin, end);
    const float largest = Simd::largest(block.largest);
    maxima[num_blocks] = largest;
    mass[num_blocks++] = block_mass(job, begin, end, {Simd::set1(largest), scale});
    all.add(block);
  }
  const float best = all.value();
  *total = 0;
  for (int b = 0; b < num_blocks; b++) {
    // a block of -inf alone has mass 0
    mass[b] *= std::exp((static_cast<double>(maxima[b]) - best) / job.params->temperature);
    *total += mass[b];
  }
  return best;
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

inline int32_t draw_of_all(const SamplingJob& job, double u, double all, const Weigher& weigh) {
  const double target = u * all;
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

// Candidates that min-p leaves of the first n.
inline int keep_min_p(const SamplingJob& job, int n, float best) {
  const auto& s = job.scratch;
  const float limit = min_p_limit(job, best);
  int count = 0;
  for (int i = 0; i < n; i++) {
    s.weights[count] = s.weights[i];
    s.ids[count] = s.ids[i];
    count += s.values[i] >= limit;
  }
  return count;
}

inline bool is_finite(float x) { return std::fabs(x) <= FLT_MAX; }

// With the weights of the whole vocabulary.
inline int32_t sample_by_mass(const SamplingJob& job, double u, F scale) {
  double total;
  const float best = weigh_blocks(job, scale, &total);
  if (!is_finite(best)) return -1;
  const Weigher weigh = {Simd::set1(best), scale};
  if (!(job.params->top_p < 1)) return draw_of_all(job, u, total, weigh);
  int n = gather_top_p(job, best, total, weigh);
  if (job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return draw_of_candidates(job, n, u);
}

// With the weights of the few that top-k or min-p leave.
inline int32_t sample_by_rank(const SamplingJob& job, double u, F scale, bool has_top_k) {
  int num_maxima;
  const float best = find_largest(job, &num_maxima);
  if (!is_finite(best)) return -1;
  int n = has_top_k ? gather_top_k(job, num_maxima, best) : gather(job, min_p_limit(job, best));
  weigh_candidates(job, n, {Simd::set1(best), scale});
  if (has_top_k && job.params->top_p < 1) {
    // behind the candidates stand -inf values, so their weights do not count
    const Mass mass{job.scratch.weights};
    const double total = mass(job.scratch.values, n, -FLT_MAX);
    n = keep_largest(job, n, -FLT_MAX, best, job.params->top_p * total, mass);
  }
  if (has_top_k && job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return draw_of_candidates(job, n, u);
}

int32_t sample(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  apply_lists(job);
  if (p.is_greedy) {
    int num_maxima;
    const float best = find_largest(job, &num_maxima);
    return is_finite(best) ? first_equal(job, best) : -1;
  }
  const F scale = Simd::set1(static_cast<float>(kLog2E / p.temperature));
  const double u = uniform(p.stream, static_cast<uint64_t>(p.position));
  const bool has_top_k = p.top_k > 0 && p.top_k < job.vocab;
  if (has_top_k || (p.min_p_margin > -INFINITY && !(p.top_p < 1))) {
    return sample_by_rank(job, u, scale, has_top_k);
  }
  return sample_by_mass(job, u, scale);
}

}  // namespace
