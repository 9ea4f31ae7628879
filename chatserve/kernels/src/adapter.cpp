#include "adapter.h"

#include <algorithm>

namespace chatserve {

bool AdapterRows::begin(int num_threads, int max_rows, int widest) {
  is_empty_ = true;
  adapters_.assign(max_rows, nullptr);
  if (num_threads == num_threads_) return true;  // a network's sizes stay
  num_threads_ = 0;
  max_rows_ = max_rows;
  widest_ = widest;
  const size_t threads = num_threads;
  if (!normed_.allocate(threads * widest) || !deltas_.allocate(threads * panel_room())) {
    return false;
  }
  delta_rows_.assign(threads * max_rows, nullptr);
  num_threads_ = num_threads;
  return true;
}

bool AdapterRows::add(const Adapter& adapter, int first_row, int num_rows) {
  int rank = 0;
  for (const LowRank& change : adapter.changes) rank = std::max(rank, change.rank);
  if (rank > rank_stride_) {
    rank_stride_ = 0;
    if (!ranks_.allocate(static_cast<size_t>(max_rows_) * rank)) return false;
    rank_stride_ = rank;
  }
  std::fill_n(adapters_.begin() + first_row, num_rows, &adapter);
  is_empty_ = false;
  return true;
}

}  // namespace chatserve
