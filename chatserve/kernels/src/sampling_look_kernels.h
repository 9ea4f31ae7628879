// Sampling, the first look at a row's logits, block by block: penalties, the largest logit, the
// weight. Over the level's `Simd`; included by level_kernels.h.
#pragma once
#include <cmath>

#include "level.h"
#include "sampling.h"

namespace {

using chatserve::kSamplingBlock;
using chatserve::SamplingJob;

constexpr double kLog2E = 1.4426950408889634;
constexpr int kStride = 4 * kLanes;  // of loops with four accumulators
static_assert(kSamplingBlock % kStride == 0 && kLanes <= chatserve::kMaxSamplingLanes);

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

// `last` is a multiple of 32, or the end of the vocabulary.
inline void remove_not_allowed(float* x, const uint32_t* allowed, int first, int last) {
  for (int begin = first; begin < last; begin += 32) {
    uint32_t removed = ~allowed[begin / 32];
    if (last - begin < 32) removed &= (1u << (last - begin)) - 1;
    if (removed == ~0u) {
      for (int i = 0; i < 32; i++) x[begin + i] = -INFINITY;
      continue;
    }
    for (; removed; removed &= removed - 1) x[begin + __builtin_ctz(removed)] = -INFINITY;
  }
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
  if (p.allowed) remove_not_allowed(x, p.allowed, first, last);
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

// Blocks [first, last): the largest logits, and the weights against each block's own.
inline void survey(const SamplingJob& job, int first, int last) {
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

// Blocks [first, last): penalties, then what is left.
void look(const SamplingJob& job, int first, int last) {
  apply_lists(job, first * kSamplingBlock, block_end((last - 1) * kSamplingBlock, job.vocab));
  survey(job, first, last);
}

}  // namespace
