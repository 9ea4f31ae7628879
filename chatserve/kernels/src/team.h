// Threads that run one job together, meet at barriers and sleep between jobs.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace chatserve {

constexpr int kMaxThreads = 64;

// Units 0..n-1 of one stage, handed out in chunks. Each thread starts in a range of its own, which
// it reads from front to back; one that is done early takes chunks of the others.
class Units {
 public:
  void reset(int num_units, int num_threads);
  // The next chunk [begin, end) for `thread`; false when none is left.
  bool claim(int thread, int* begin, int* end);

 private:
  struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
  };
  Range ranges_[kMaxThreads];
  int num_threads_ = 1;
  int chunk_ = 1;
};

class Team {
 public:
  explicit Team(int num_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int num_threads() const { return num_threads_; }
  // Between jobs only.
  void set_num_threads(int num_threads);

  // Runs job(context, thread) on threads 0..num_threads-1 and returns when all are done; the
  // calling thread is thread 0. One caller at a time.
  void run(void (*job)(void*, int), void* context);

  // All threads of a job wait for each other; the last to come calls `last` first.
  template <typename Last>
  void barrier(Last last) {
    if (num_threads_ == 1) {
      last();
      return;
    }
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      last();
      publish(round_, round + 1);
    } else {
      await(round_, round);
    }
  }

 private:
  void start(int num_threads);
  void stop();
  void loop(int thread, uint32_t seen);
  // Spins for a moment, then sleeps, until `word` is no longer `old`.
  void await(std::atomic<uint32_t>& word, uint32_t old);
  void publish(std::atomic<uint32_t>& word, uint32_t value);

  int num_threads_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> job_number_{0};
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace chatserve
