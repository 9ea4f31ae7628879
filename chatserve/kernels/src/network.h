// One step of a Llama-family network: embedding, blocks, head, over a flat batch of sequences.
#pragma once
#include <memory>
#include <vector>

#include "adapter.h"
#include "level.h"
#include "memory.h"
#include "sampling.h"
#include "team.h"

namespace chatserve {

// Owns what a Matrix points to.
class PackedMatrix {
 public:
  // False when there is no memory.
  bool create(const LevelKernels& level, int rows, int columns, int bits, Scaling scaling,
              int num_terms);
  void load(Team& team, int start, int num_rows, const void* rows, Dtype dtype, RowMap map);

  // y[num_rows][panels * kPanelRows] = x[num_rows][columns] W^T. False when there is no memory.
  bool multiply(Team& team, const float* x, int num_rows, float* y) const;

  // Row `row` of activations that this matrix can be multiplied with.
  Activations row_of(const Activations& all, int row) const;

  const Matrix& view() const { return view_; }
  const LevelKernels& level() const { return *level_; }
  int offset() const { return view_.bits == 4 ? level_->offset4 : level_->offset8; }
  size_t num_bytes() const {
    return codes_.num_bytes() + group_scales_.num_bytes() + row_scales_.num_bytes();
  }

 private:
  const LevelKernels* level_ = nullptr;
  Matrix view_{};
  Buffer<uint8_t> codes_;
  Buffer<uint16_t> group_scales_;
  Buffer<float> row_scales_;
};

struct NetworkShape {
  int hidden, num_heads, num_kv_heads, head_dim, ffn, num_layers, vocab;
  int max_rows;       // of one step
  int max_positions;  // of one sequence
  float eps;
};

// Pointers that the caller keeps alive; null where the family has no such part.
struct LayerParts {
  const PackedMatrix *qkv, *output, *gate_up, *down;
  const float *attention_norm, *mlp_norm;
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  const float *query_norm, *key_norm;
  int window;  // tokens that a query may look back, itself included; 0: all
};

struct EndParts {
  const PackedMatrix* head;
  const void* embedding;  // [vocab][hidden] of `embedding_dtype`; null: the head's rows
  Dtype embedding_dtype;
  const float* norm;
  const float *cos, *sin;  // [max_positions][head_dim / 2]
};

// Keys and values: [block][layer][KV head][keys, values] in half precision. Memory is committed as
// blocks are first used, so those of a block lie together.
class KVPool {
 public:
  bool create(const NetworkShape& shape, int num_blocks);
  // Whether a network of this shape may use it.
  bool fits(const NetworkShape& shape) const;
  void copy_block(int source, int target);
  // Commits the memory of the first blocks; may run while others are in use.
  void warm(int num_blocks);

  int num_blocks() const { return num_blocks_; }
  size_t block_stride() const { return block_stride_; }
  uint16_t* layer(int index) const { return data_.data() + layer_stride_ * index; }
  size_t num_bytes() const { return data_.num_bytes(); }

 private:
  int num_layers_ = 0, num_blocks_ = 0;
  size_t block_stride_ = 0, layer_stride_ = 0;
  Buffer<uint16_t> data_;
};

// Rows side by side by sequence, in order of positions.
struct StepInput {
  int num_rows, num_segments, num_outputs;
  const int *tokens, *positions;              // [num_rows]
  const int *segment_starts, *segment_rows;   // [num_segments]
  const int* const* block_tables;             // [num_segments]
  const Adapter* const* adapters;             // [num_segments], or null where none has one
  const int* output_rows;                     // [num_outputs]
  float* logits;                              // [num_outputs][logits_stride]
  size_t logits_stride;                       // at least vocab, rounded up to kPanelRows
  Sampler* sampler;                           // picks ahead as it has been told to; or null
};

// What a step's time is spent on; `wait` also holds the small work of `kSmallRows`.
enum class Part : int {
  embed, quantise, qkv, rotate, attend, output, gate_up, down, head, sample, wait
};
constexpr int kNumParts = 11;

class Network {
 public:
  Network(const NetworkShape& shape, const LevelKernels& level, Team& team);
  // False when there is no memory.
  bool create();
  // To be called again when the team's number of threads has changed.
  bool create_scores();
  void set_layer(int index, const LayerParts& parts) { layers_[index] = parts; }
  void set_ends(const EndParts& parts) { ends_ = parts; }

  // Bytes by which a matrix that is read once is fetched ahead: a hint, best measured.
  void set_prefetch(size_t one_row, size_t more_rows) {
    ahead_of_one_ = one_row;
    ahead_of_more_ = more_rows;
  }
  // From now on the first thread adds its nanoseconds to nanoseconds[kNumParts]; null: no more.
  void set_profile(uint64_t* nanoseconds) { profile_ = nanoseconds; }

  const NetworkShape& shape() const { return shape_; }
  const LevelKernels& level() const { return level_; }
  // Whether all layers and both ends have been set.
  bool is_complete() const;
  // The caller has checked `input` against the shape and the pool. False when there is no memory for
  // what its adapters need.
  bool forward(KVPool& pool, const StepInput& input);
  // [max_rows][hidden]: what the last layer of the last step has left.
  const float* rows() const { return x_.data(); }

 private:
  struct Job {  // of one KV head of one sequence
    int segment, kv_head, first_row, first_head, num_rows;
  };

  // Those that an adapter may change, in the order of `Adapter::changes`.
  int num_matrices() const { return 4 * shape_.num_layers + 1; }
  const PackedMatrix& matrix(int index) const;

  void work(int thread);
  void embed(int row);
  // What `next` reads of `row`: codes, and ranks where an adapter changes it.
  void prepare(int thread, const float* x, const float* norm, int next, int row);
  const LowRank* change(int index, int row) const {
    return adapted_.change(index, is_head(index) ? input_.output_rows[row] : row);
  }
  bool is_head(int index) const { return index == num_matrices() - 1; }
  // The buffers as they hold the input of `next`.
  Activations activations(const PackedMatrix& next) {
    return {code_stride(next.view().columns), codes_.data(), scales_.data(), corrections_.data()};
  }
  size_t ahead(int num_rows) const { return num_rows == 1 ? ahead_of_one_ : ahead_of_more_; }
  void quantise_stage(int thread, const float* x, size_t stride, const float* norm, int next);
  void multiply_stage(int thread, int index, int num_rows, const Output& to);
  // Panels [begin, end), and what adapters add to each, in the thread that computes it.
  void multiply_panels(int thread, int index, int num_rows, int begin, int end, Output to);
  void rotate_and_store(const LayerParts& layer, int index, int row);
  void head_stage(int thread);
  void attend_stage(int thread, const LayerParts& layer, int index);
  void plan_jobs();
  template <typename Last>
  void meet(int thread, Part part, int next_units, Last last);
  void count(int thread, Part part);

  NetworkShape shape_;
  const LevelKernels& level_;
  Team& team_;
  std::vector<LayerParts> layers_;
  EndParts ends_{};
  int qkv_stride_;

  Buffer<float> x_, qkv_, mixed_, ffn_;
  Buffer<int8_t> codes_;
  Buffer<float> scales_;
  Buffer<int32_t> corrections_;
  std::vector<std::unique_ptr<Buffer<float>>> scores_;  // by thread

  size_t ahead_of_one_ = 0, ahead_of_more_ = 0;
  uint64_t* profile_ = nullptr;
  uint64_t profile_time_ = 0;

  KVPool* pool_ = nullptr;
  StepInput input_{};
  AdapterRows adapted_;
  bool is_small_ = false;
  std::vector<int> row_segments_;
  std::vector<Job> jobs_;
  Units units_;
};

}  // namespace chatserve
