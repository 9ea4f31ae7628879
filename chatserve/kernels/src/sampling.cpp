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

// Room for the blocks of rows [0, num_rows) and for the picks of threads [0, num_threads).
bool Sampler::reserve(int num_rows, int num_threads) {
  while (static_cast<int>(blocks_.size()) < num_rows) {
    std::unique_ptr<RowBlocks> b(new (std::nothrow) RowBlocks);
    if (!b || !b->maxima.allocate(num_blocks() * kMaxSamplingLanes) ||
        !b->largest.allocate(num_blocks()) || !b->mass.allocate(num_blocks())) {
      return false;
    }
    blocks_.push_back(std::move(b));
  }
  for (int t = 0; t < num_threads; t++) {
    if (scratch_[t]) continue;
    std::unique_ptr<ThreadScratch> s(new (std::nothrow) ThreadScratch);
    if (!s || !s->values.allocate(vocab_) || !s->weights.allocate(vocab_) ||
        !s->ids.allocate(vocab_)) {
      return false;
    }
    scratch_[t] = std::move(s);
  }
  return true;
}

SamplingJob Sampler::job(float* logits, const cs_sampling* params, int row, int thread) const {
  const RowBlocks& b = *blocks_[row];
  const ThreadScratch& s = *scratch_[thread];
  return {logits,
          vocab_,
          params,
          forbidden_ids_.data(),
          num_forbidden_,
          {b.maxima.data(), b.largest.data(), b.mass.data()},
          {s.values.data(), s.weights.data(), s.ids.data()}};
}

bool Sampler::begin_ahead(float* logits, size_t stride, const cs_sampling* const* rows,
                          int num_rows) {
  ahead_.clear();
  if (!reserve(num_rows, team_.num_threads())) return false;
  ahead_logits_ = logits;
  ahead_stride_ = stride;
  for (int r = 0; r < num_rows; r++) {
    ahead_.push_back({rows[r], rows[r] ? rows[r]->position : 0, -1});
  }
  return true;
}

void Sampler::look_ahead(int first, int last) {
  for (size_t r = 0; r < ahead_.size(); r++) {
    if (!ahead_[r].params) continue;
    level_->look(job(ahead_logits_ + ahead_stride_ * r, ahead_[r].params, r, 0), first, last);
  }
}

void Sampler::pick_ahead(int thread, int row) {
  Ahead& ahead = ahead_[row];
  if (!ahead.params) return;
  ahead.picked = level_->pick(job(ahead_logits_ + ahead_stride_ * row, ahead.params, row, thread));
}

bool Sampler::take_ahead(const float* logits, int place, const cs_sampling* params, int32_t* out) {
  if (logits != ahead_logits_ || place >= static_cast<int>(ahead_.size())) return false;
  Ahead& ahead = ahead_[place];
  if (ahead.params != params || ahead.position != params->position) return false;
  ahead.params = nullptr;
  *out = ahead.picked;
  return true;
}

bool Sampler::sample(float* logits, size_t stride, const int32_t* places,
                     const cs_sampling* const* rows, int num_rows, int32_t* out) {
  std::vector<int> left;  // rows that are not picked yet
  long work = 0;
  for (int r = 0; r < num_rows; r++) {
    if (take_ahead(logits, places ? places[r] : r, rows[r], out + r)) continue;
    left.push_back(r);
    work += static_cast<long>(vocab_) * (rows[r]->is_greedy ? 1 : kDrawPasses);
  }
  if (left.empty()) return true;
  const bool is_shared = left.size() > 1 && work >= kSharedWork;
  const int num_threads = is_shared ? team_.num_threads() : 1;
  if (!reserve(num_threads, num_threads)) return false;

  struct Shared {
    Sampler* self;
    float* logits;
    size_t stride;
    const int32_t* places;
    const cs_sampling* const* rows;
    const std::vector<int>& left;
    int32_t* out;
    std::atomic<size_t> next{0};
  } shared{this, logits, stride, places, rows, left, out};
  auto work_of = [](void* context, int thread) {
    Shared& all = *static_cast<Shared*>(context);
    Sampler& self = *all.self;
    for (size_t i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.left.size();) {
      const int r = all.left[i];
      const SamplingJob job = self.job(all.logits + all.stride * (all.places ? all.places[r] : r),
                                       all.rows[r], thread, thread);
      self.level_->look(job, 0, self.num_blocks());
      all.out[r] = self.level_->pick(job);
    }
  };
  if (is_shared) {
    team_.run(work_of, &shared);
  } else {
    work_of(&shared, 0);
  }
  return true;
}

}  // namespace chatserve
