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

inline int num_blocks(const SamplingJob& job) {
  return (job.vocab + kSamplingBlock - 1) / kSamplingBlock;
}

// ---- penalties ----

// The first of ascending ids[count] that is not below `value`; no branch on what nobody can foretell.
inline int first_from(const int32_t* ids, int count, int value) {
  const int32_t* at = ids;
  for (int left = count; left > 0;) {
    const int half = (left + 1) / 2;
    at = at[half - 1] < value ? at + half : at;
    left -= half;
  }
  return static_cast<int>(at - ids);
}

// Whether an id lies in [first, last); also keeps lists that do not ascend within the logits.
inline bool is_between(int32_t id, int first, int last) {
  return static_cast<uint32_t>(id) - first < static_cast<uint32_t>(last - first);
}

inline void remove_between(float* x, const int32_t* ids, int count, int first, int last) {
  int i = first_from(ids, count, first);
  for (; i < count && is_between(ids[i], first, last); i++) x[ids[i]] = -INFINITY;
}

// The next blocks' entries come from memory, one after the other, unless somebody asks early.
inline void fetch(const void* entries) {
  for (int i = 0; i < 4; i++) __builtin_prefetch(static_cast<const char*>(entries) + 64 * i);
}

inline void apply_lists(const SamplingJob& job, int first, int last) {
  const cs_sampling& p = *job.params;
  float* x = job.logits;
  int i = first_from(p.seen_ids, p.num_seen, first);
  for (; i < p.num_seen && is_between(p.seen_ids[i], first, last); i++) {
    float& logit = x[p.seen_ids[i]];
    const float less = logit / p.repetition_penalty, more = logit * p.repetition_penalty;
    logit = logit > 0 ? less : more;  // no branch here either
  }
  fetch(p.seen_ids + i);
  i = first_from(p.offset_ids, p.num_offsets, first);
  for (; i < p.num_offsets && is_between(p.offset_ids[i], first, last); i++) {
    x[p.offset_ids[i]] += p.offsets[i];
  }
  fetch(p.offset_ids + i);
  fetch(p.offsets + i);
  if (p.position < p.masked_until) remove_between(x, p.masked_ids, p.num_masked, first, last);
  remove_between(x, job.forbidden_ids, job.num_forbidden, first, last);
}

// ---- the first look: one pass over the vocabulary ----

// Leaves the lane maxima of a block. Returns its largest logit, NaN if any is NaN.
inline float find_largest(const SamplingJob& job, int begin, int end, float* maxima) {
  F largest[4];
  I most[4];  // magnitudes as integers, of which a NaN has the largest
  for (int j = 0; j < 4; j++) {
    largest[j] = Simd::set1(-INFINITY);
    most[j] = Simd::izero();
  }
  auto add = [&](F x, int j) {
    largest[j] = Simd::max(x, largest[j]);
    most[j] = Simd::umax(most[j], Simd::magnitude(x));
  };
  int i = begin;
  for (; i + kStride <= end; i += kStride) {
    CS_UNROLL for (int j = 0; j < 4; j++) {
      add(Simd::load(job.logits + i + j * kLanes), j);
    }
  }
  // -inf, behind the end, is never the largest and never a NaN
  visit_vectors(job.logits, i, end, [&](F x, int) { add(x, 0); });
  const F all = Simd::max(Simd::max(largest[0], largest[1]), Simd::max(largest[2], largest[3]));
  Simd::store(maxima, all);
  const I magnitude = Simd::umax(Simd::umax(most[0], most[1]), Simd::umax(most[2], most[3]));
  return Simd::ulargest(magnitude) > 0x7f800000u ? NAN : Simd::largest(all);
}

// e^((x - best) / temperature) for x <= best as a power of 2; relative error about 1e-7. A
// polynomial of degree 5 whose largest relative error over [-1/2, 1/2] is 7e-8.
class Weigher {
 public:
  Weigher(float best, double temperature)
      : best_(Simd::set1(best)),
        scale_(Simd::set1(static_cast<float>(kLog2E / temperature))),
        lowest_(Simd::set1(static_cast<float>(-125 * temperature / kLog2E))) {}

  // The same temperature, another largest logit.
  Weigher against(float best) const {
    Weigher other = *this;
    other.best_ = Simd::set1(best);
    return other;
  }
  // 0 below its range
  F operator()(F x) const {
    const F difference = Simd::sub(x, best_);
    return Simd::keep_not_below(power(difference), difference, lowest_);
  }
  // 2^-125 below its range: nothing to a sum, and two operations less
  F roughly(F x) const { return power(Simd::sub(x, best_)); }

 private:
  F power(F difference) const {
    const F shift = Simd::set1(12582912.0f);  // 1.5 * 2^23: rounds to whole numbers
    const F d = Simd::max(difference, lowest_);
    const F shifted = Simd::fma(d, scale_, shift);
    const F r = Simd::fma(d, scale_, Simd::sub(shift, shifted));
    F p = Simd::set1(1.327647152e-3f);
    p = Simd::fma(p, r, Simd::set1(9.675541331e-3f));
    p = Simd::fma(p, r, Simd::set1(5.550713275e-2f));
    p = Simd::fma(p, r, Simd::set1(2.402211972e-1f));
    p = Simd::fma(p, r, Simd::set1(6.931469671e-1f));
    p = Simd::fma(p, r, Simd::set1(1.0f));
    return Simd::times_power(p, shifted);
  }

  F best_, scale_, lowest_;
};

inline float block_mass(const SamplingJob& job, int begin, int end, const Weigher& weigh) {
  F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int i = begin;
  for (; i + kStride <= end; i += kStride) {
    CS_UNROLL for (int j = 0; j < 4; j++) {
      sums[j] = Simd::add(sums[j], weigh.roughly(Simd::load(job.logits + i + j * kLanes)));
    }
  }
  visit_vectors(job.logits, i, end, [&](F x, int) { sums[0] = Simd::add(sums[0], weigh.roughly(x)); });
  return Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}

inline bool has_top_k(const SamplingJob& job) {
  return job.params->top_k > 0 && job.params->top_k < job.vocab;
}

// Whether the pick asks for the weights of the whole vocabulary.
inline bool needs_mass(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  return !p.is_greedy && !has_top_k(job) && (p.top_p < 1 || p.min_p_margin == -INFINITY);
}

// Blocks [first, last): penalties, the largest logits, and the weights against each block's own.
void look(const SamplingJob& job, int first, int last) {
  const int begin = first * kSamplingBlock;
  const int end = block_end((last - 1) * kSamplingBlock, job.vocab);
  apply_lists(job, begin, end);
  const bool is_weighed = needs_mass(job);
  const Weigher weigh(0, is_weighed ? job.params->temperature : 1);
  for (int b = first; b < last; b++) {
    const int from = b * kSamplingBlock, to = block_end(from, job.vocab);
    const float largest = find_largest(job, from, to, job.blocks.maxima + b * kLanes);
    job.blocks.largest[b] = largest;
    if (is_weighed) {
      // a block of -inf alone has nearly no mass, and none once it is weighed against all
      const float best = largest > -INFINITY ? largest : 0;
      job.blocks.mass[b] = block_mass(job, from, to, weigh.against(best));
    }
  }
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

// Candidates that top-k leaves.
inline int gather_top_k(const SamplingJob& job, float best) {
  const int k = job.params->top_k;
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

inline int32_t draw_of_all(const SamplingJob& job, double u, double all, const Weigher& weigh) {
  const double target = u * all;
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
inline int32_t pick_by_mass(const SamplingJob& job, double u, const Weigher& weigh, float best) {
  const double total = weigh_blocks(job, weigh);
  if (!(job.params->top_p < 1)) return draw_of_all(job, u, total, weigh);
  int n = gather_top_p(job, best, total, weigh);
  if (job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return draw_of_candidates(job, n, u);
}

// With the weights of the few that top-k or min-p leave.
inline int32_t pick_by_rank(const SamplingJob& job, double u, const Weigher& weigh, float best) {
  const bool is_ranked = has_top_k(job);
  int n = is_ranked ? gather_top_k(job, best) : gather(job, min_p_limit(job, best));
  weigh_candidates(job, n, weigh);
  if (is_ranked && job.params->top_p < 1) {
    // behind the candidates stand -inf values, so their weights do not count
    const Mass mass{job.scratch.weights};
    const double total = mass(job.scratch.values, n, -FLT_MAX);
    n = keep_largest(job, n, -FLT_MAX, best, job.params->top_p * total, mass);
  }
  if (is_ranked && job.params->min_p_margin > -INFINITY) n = keep_min_p(job, n, best);
  return draw_of_candidates(job, n, u);
}

int32_t pick(const SamplingJob& job) {
  const cs_sampling& p = *job.params;
  const float best = largest_of_all(job);
  if (!is_finite(best)) return -1;
  if (p.is_greedy) return first_equal(job, best);
  const Weigher weigh(best, p.temperature);
  const double u = uniform(p.stream, static_cast<uint64_t>(p.position));
  return needs_mass(job) ? pick_by_mass(job, u, weigh, best) : pick_by_rank(job, u, weigh, best);
}

}  // namespace
