#include "sampling.h"

#include <atomic>
#include <cstring>
#include <new>

#include "level.h"

namespace chatserve {
namespace {

// Logits that are read, in all passes, for less than which no other thread is worth waking: some
// 100 microseconds.
constexpr long kSharedWork = 400'000;
constexpr int kDrawPasses = 3;  // a sampled row costs so many times a greedy one

}  // namespace

bool Sampler::create(const LevelKernels& level, int vocab, const int32_t* forbidden_ids,
                     int num_forbidden) {
  level_ = &level;
  vocab_ = vocab;
  num_forbidden_ = num_forbidden;
  if (!forbidden_ids_.allocate(num_forbidden)) return false;
  if (num_forbidden) {
    std::memcpy(forbidden_ids_.data(), forbidden_ids, sizeof(int32_t) * num_forbidden);
  }
  return true;
}

bool Sampler::sample(float* logits, size_t stride, const int32_t* places,
                     const cs_sampling* const* rows, int num_rows, int32_t* out) {
  long work = 0;
  for (int r = 0; r < num_rows; r++) {
    work += static_cast<long>(vocab_) * (rows[r]->is_greedy ? 1 : kDrawPasses);
  }
  const bool is_shared = num_rows > 1 && work >= kSharedWork;
  const int num_threads = is_shared ? team_.num_threads() : 1;
  const int num_blocks = (vocab_ + kSamplingBlock - 1) / kSamplingBlock;
  for (int t = 0; t < num_threads; t++) {
    if (scratch_[t]) continue;
    std::unique_ptr<ThreadScratch> s(new (std::nothrow) ThreadScratch);
    if (!s || !s->maxima.allocate(num_blocks * kMaxSamplingLanes) ||
        !s->block_mass.allocate(num_blocks) || !s->values.allocate(vocab_) ||
        !s->weights.allocate(vocab_) || !s->ids.allocate(vocab_)) {
      return false;
    }
    scratch_[t] = std::move(s);
  }

  struct Shared {
    Sampler* self;
    float* logits;
    size_t stride;
    const int32_t* places;
    const cs_sampling* const* rows;
    int num_rows;
    int32_t* out;
    std::atomic<int> next{0};
  } shared{this, logits, stride, places, rows, num_rows, out};
  auto job = [](void* context, int thread) {
    Shared& all = *static_cast<Shared*>(context);
    Sampler& self = *all.self;
    ThreadScratch& s = *self.scratch_[thread];
    for (int r; (r = all.next.fetch_add(1, std::memory_order_relaxed)) < all.num_rows;) {
      all.out[r] = self.level_->sample(
          {all.logits + all.stride * (all.places ? all.places[r] : r), self.vocab_, all.rows[r],
           self.forbidden_ids_.data(), self.num_forbidden_,
           {s.maxima.data(), s.block_mass.data(), s.values.data(), s.weights.data(),
            s.ids.data()}});
    }
  };
  if (is_shared) {
    team_.run(job, &shared);
  } else {
    job(&shared, 0);
  }
  return true;
}

}  // namespace chatserve
