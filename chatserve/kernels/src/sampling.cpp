#include "sampling.h"

#include <algorithm>
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
                          int num_rows, int32_t* out) {
  ahead_ = {logits, stride, rows, num_rows, out};
  return reserve(num_rows, team_.num_threads());
}

void Sampler::look_ahead(int first, int last) {
  for (int r = 0; r < ahead_.num_rows; r++) {
    if (!ahead_.rows[r]) continue;
    level_->look(job(ahead_.logits + ahead_.stride * r, ahead_.rows[r], r, 0), first, last);
  }
}

void Sampler::pick_ahead(int thread, int row) {
  if (!ahead_.rows[row]) return;
  ahead_.out[row] =
      level_->pick(job(ahead_.logits + ahead_.stride * row, ahead_.rows[row], row, thread));
}

// work(row, thread) for every row, on all threads where they have enough to do.
template <typename Work>
void Sampler::for_rows(int num_rows, int num_threads, const Work& work) {
  struct Shared {
    const Work& work;
    int num_rows;
    std::atomic<int> next{0};
  } shared{work, num_rows};
  auto run = [](void* context, int thread) {
    Shared& all = *static_cast<Shared*>(context);
    for (int r; (r = all.next.fetch_add(1, std::memory_order_relaxed)) < all.num_rows;) {
      all.work(r, thread);
    }
  };
  if (num_threads > 1) {
    team_.run(run, &shared);
  } else {
    run(&shared, 0);
  }
}

int Sampler::threads_for(int num_rows, int num_passes) const {
  const bool is_shared = num_rows > 1 && static_cast<long>(vocab_) * num_passes >= kSharedWork;
  return is_shared ? team_.num_threads() : 1;
}

bool Sampler::sample(float* logits, size_t stride, const int32_t* places,
                     const cs_sampling* const* rows, int num_rows, int32_t* out) {
  int num_passes = 0;
  for (int r = 0; r < num_rows; r++) num_passes += rows[r]->is_greedy ? 1 : kDrawPasses;
  const int num_threads = threads_for(num_rows, num_passes);
  if (!reserve(num_threads, num_threads)) return false;
  for_rows(num_rows, num_threads, [&](int r, int thread) {
    const SamplingJob row = job(logits + stride * (places ? places[r] : r), rows[r], thread, thread);
    level_->look(row, 0, num_blocks());
    out[r] = level_->pick(row);
  });
  return true;
}

bool Sampler::logprobs(float* logits, size_t stride, const int32_t* places,
                       const cs_sampling* const* rows, const int32_t* ids, const int32_t* num_tops,
                       int num_rows, int max_tops, float* out, int32_t* top_ids) {
  const int num_threads = threads_for(num_rows, num_rows * kDrawPasses);
  if (!reserve(num_threads, num_threads)) return false;
  for_rows(num_rows, num_threads, [&](int r, int thread) {
    int32_t* tops = top_ids + static_cast<size_t>(max_tops) * r;
    std::fill(tops, tops + max_tops, -1);
    level_->logprobs(job(logits + stride * (places ? places[r] : r), rows[r], thread, thread),
                     ids[r], num_tops[r], out + (1 + static_cast<size_t>(max_tops)) * r, tops);
  });
  return true;
}

}  // namespace chatserve
