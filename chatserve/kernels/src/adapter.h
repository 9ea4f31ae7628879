// Low-rank changes of a network's matrices (LoRA), and which rows of a step they are for.
#pragma once
#include <vector>

#include "level.h"
#include "memory.h"

namespace chatserve {

// Of one network: [layer][qkv, output, gate_up, down], then the head. What `changes` point to lies in
// one piece, in the order in which a step reads it.
struct Adapter {
  std::vector<LowRank> changes;
  Buffer<char> numbers;
};

// A step's rows with their adapters. In one matrix's product a row takes two small steps: `shrink`
// to its ranks where the row is quantised, and `expand` panel by panel where the panel is computed.
// Each row is treated by itself, in one fixed order of additions.
class AdapterRows {
 public:
  // Rooms for `num_threads`, rows of at most `widest` values, and the ranks of what follows. False
  // when there is no memory.
  bool begin(int num_threads, int max_rows, int widest);
  // False when there is no memory for its ranks.
  bool add(const Adapter& adapter, int first_row, int num_rows);
  void clear() { is_empty_ = true; }
  bool is_empty() const { return is_empty_; }

  // What changes matrix `index` for a row; null: nothing does.
  const LowRank* change(int index, int row) const {
    const Adapter* adapter = is_empty_ ? nullptr : adapters_[row];
    if (!adapter || !adapter->changes[index].rank) return nullptr;
    return &adapter->changes[index];
  }
  float* ranks(int row) { return ranks_.data() + static_cast<size_t>(row) * rank_stride_; }
  // One row after its norm.
  float* normed(int thread) { return normed_.data() + static_cast<size_t>(thread) * widest_; }
  // [max_rows][kPanelRows]
  float* deltas(int thread) { return deltas_.data() + static_cast<size_t>(thread) * panel_room(); }
  const float** delta_rows(int thread) {
    return delta_rows_.data() + static_cast<size_t>(thread) * max_rows_;
  }

 private:
  size_t panel_room() const { return static_cast<size_t>(max_rows_) * kPanelRows; }

  bool is_empty_ = true;
  int num_threads_ = 0, max_rows_ = 0, widest_ = 0, rank_stride_ = 0;
  std::vector<const Adapter*> adapters_;  // by row
  std::vector<const float*> delta_rows_;
  Buffer<float> ranks_, normed_, deltas_;
};

}  // namespace chatserve
