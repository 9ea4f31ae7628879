#include "team.h"

#include <chrono>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace chatserve {
namespace {

// A stage of a step lasts some ten microseconds. Who has waited longer waits for a thread that has
// lost its core, and should not keep another one busy.
constexpr std::chrono::microseconds kSpin{60};

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

}  // namespace

void Units::reset(int num_units, int num_threads) {
  num_threads_ = num_threads;
  chunk_ = num_units / (num_threads * 12);
  if (chunk_ < 1) chunk_ = 1;
  for (int t = 0; t < num_threads; t++) {
    ranges_[t].next.store(static_cast<int>(static_cast<long>(num_units) * t / num_threads),
                          std::memory_order_relaxed);
    ranges_[t].end = static_cast<int>(static_cast<long>(num_units) * (t + 1) / num_threads);
  }
}

bool Units::claim(int thread, int* begin, int* end) {
  for (int i = 0; i < num_threads_; i++) {
    Range& range = ranges_[(thread + i) % num_threads_];
    if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
    const int first = range.next.fetch_add(chunk_, std::memory_order_relaxed);
    if (first >= range.end) continue;
    *begin = first;
    *end = first + chunk_ < range.end ? first + chunk_ : range.end;
    return true;
  }
  return false;
}

Team::Team(int num_threads) { start(num_threads); }

Team::~Team() { stop(); }

void Team::start(int num_threads) {
  num_threads_ = num_threads < 1 ? 1 : num_threads < kMaxThreads ? num_threads : kMaxThreads;
  const uint32_t seen = job_number_.load(std::memory_order_relaxed);
  try {
    for (int t = 1; t < num_threads_; t++) threads_.emplace_back(&Team::loop, this, t, seen);
  } catch (const std::system_error&) {  // the system gives no more threads: do with these
    num_threads_ = static_cast<int>(threads_.size()) + 1;
  }
}

void Team::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  publish(job_number_, job_number_.load(std::memory_order_relaxed) + 1);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  is_stopping_ = false;
}

void Team::set_num_threads(int num_threads) {
  stop();
  start(num_threads);
}

void Team::run(void (*job)(void*, int), void* context) {
  job_ = job;
  context_ = context;
  if (num_threads_ == 1) {
    job(context, 0);
    return;
  }
  num_done_.store(0, std::memory_order_relaxed);
  publish(job_number_, job_number_.load(std::memory_order_relaxed) + 1);
  job(context, 0);
  const uint32_t others = static_cast<uint32_t>(threads_.size());
  for (uint32_t done; (done = num_done_.load(std::memory_order_acquire)) != others;) {
    await(num_done_, done);
  }
}

void Team::loop(int thread, uint32_t seen) {
  for (;;) {
    await(job_number_, seen);
    seen++;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (is_stopping_) return;
    }
    job_(context_, thread);
    // published one by one: the caller may be asleep
    num_done_.fetch_add(1, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) != 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      changed_.notify_all();
    }
  }
}

void Team::publish(std::atomic<uint32_t>& word, uint32_t value) {
  word.store(value, std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

void Team::await(std::atomic<uint32_t>& word, uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; i++) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  std::unique_lock<std::mutex> lock(mutex_);
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  changed_.wait(lock, [&] { return word.load(std::memory_order_seq_cst) != old; });
  num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace chatserve
