// Sampling, told afterwards: with which probability a token is picked, and which tokens are likeliest.
// Over the level's `Simd`; included by level_kernels.h.
#pragma once
#include <cmath>

#include "sampling_pick_kernels.h"

namespace {

// The `count` largest of n candidates come first, falling, equal ones by rising id. Returns how many
// there are.
inline int sort_largest(const SamplingJob& job, int n, float best, int count) {
  const auto& s = job.scratch;
  if (n > count) {
    pad(s.values, n);
    n = keep_largest(job, n, -FLT_MAX, best, count, Count{});
  }
  for (int i = 1; i < n; i++) {
    const float value = s.values[i];
    const int32_t id = s.ids[i];
    int j = i;
    for (; j > 0 && s.values[j - 1] < value; j--) {
      s.values[j] = s.values[j - 1];
      s.ids[j] = s.ids[j - 1];
    }
    s.values[j] = value;
    s.ids[j] = id;
  }
  return n;
}

// Of a greedy row: as the model has it, at temperature 1.
inline cs_sampling unfiltered() {
  cs_sampling params{};
  params.temperature = 1;
  params.top_p = 1;
  params.min_p_margin = -INFINITY;
  return params;
}

// Logits are changed already. See cs_sampler_logprobs.
void logprobs(const SamplingJob& asked, int32_t id, int num_tops, float* out, int32_t* top_ids) {
  const cs_sampling plain = unfiltered();
  SamplingJob job = asked;
  if (job.params->is_greedy) job.params = &plain;
  survey(job, 0, num_blocks(job));
  const float best = largest_of_all(job);
  if (!is_finite(best)) {
    out[0] = NAN;
    return;
  }
  const double temperature = job.params->temperature;
  const Weigher weigh(best, temperature);
  const Kept kept = keep(job, weigh, best);
  const double log_total = std::log(kept.total);
  const auto logprob = [&](float logit) {
    return static_cast<float>((static_cast<double>(logit) - best) / temperature - log_total);
  };
  out[0] = logprob(job.logits[id]);
  if (num_tops == 0) return;
  int n = kept.count == kAll ? gather_top_k(job, best, num_tops) : kept.count;
  n = sort_largest(job, n, best, num_tops);
  for (int i = 0; i < n; i++) {
    top_ids[i] = job.scratch.ids[i];
    out[1 + i] = logprob(job.scratch.values[i]);
  }
}

}  // namespace
