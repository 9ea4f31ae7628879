// Logits to token ids, row by row: penalties, temperature, top-k, top-p, min-p, and the draw.
//
// A row is looked at block by block, by whichever thread has the block's logits in its cache; then
// its token is picked from what that has left and from the few blocks with a candidate in them.
#pragma once
#include <memory>
#include <vector>

#include "interface.h"
#include "memory.h"
#include "team.h"

namespace chatserve {

struct LevelKernels;

constexpr int kSamplingBlock = 1024;  // ids of a block
constexpr int kMaxSamplingLanes = 16;

// What the first look leaves of a row's blocks.
struct SamplingBlocks {
  float* maxima;   // of each lane of each block
  float* largest;  // logit of a block; NaN if one of them is NaN
  float* mass;     // weights of a block, added; only where the pick asks for them
};

// Room for one pick. Filled from the front, with room for whole vectors behind the last one.
struct SamplingScratch {
  float* values;   // candidates: logits,
  float* weights;  // e^((logit - largest) / temperature),
  int32_t* ids;    // and ids, ascending
};

// What a row's logits are changed by, and how a token is picked of them.
struct SamplingJob {
  float* logits;  // [vocab]
  int vocab;
  const cs_sampling* params;
  const int32_t* forbidden_ids;
  int num_forbidden;
  SamplingBlocks blocks;
  SamplingScratch scratch;
};

// Picks the tokens of a step, rows side by side on the team's threads.
class Sampler {
 public:
  explicit Sampler(Team& team) : team_(team) {}
  // False when there is no memory.
  bool create(const LevelKernels& level, int vocab, const int32_t* forbidden_ids,
              int num_forbidden);
  int vocab() const { return vocab_; }
  const Team& team() const { return team_; }

  // Changes the logits, of which row i's begin at places[i] * stride, or at i * stride. out[i]: an
  // id, or -1 where no logit is finite or any is NaN or +inf. False when there is no memory.
  bool sample(float* logits, size_t stride, const int32_t* places, const cs_sampling* const* rows,
              int num_rows, int32_t* out);

  // See cs_sampler_logprobs. False when there is no memory.
  bool logprobs(float* logits, size_t stride, const int32_t* places, const cs_sampling* const* rows,
                const int32_t* ids, const int32_t* num_tops, int num_rows, int max_tops, float* out,
                int32_t* top_ids);

  // Picking ahead: a network that computes the logits has them looked at while they are in its
  // caches, and picks.

  // For logits[num_rows][stride] that are about to be computed; rows[i] is null for a row that is
  // not picked. False when there is no memory.
  bool begin_ahead(float* logits, size_t stride, const cs_sampling* const* rows, int num_rows,
                   int32_t* out);
  // Blocks [first, last) of each of these rows, by any thread.
  void look_ahead(int first, int last);
  // After all blocks.
  void pick_ahead(int thread, int row);
  int num_blocks() const { return (vocab_ + kSamplingBlock - 1) / kSamplingBlock; }

 private:
  struct RowBlocks {
    Buffer<float> maxima, largest, mass;
  };
  struct ThreadScratch {
    Buffer<float> values, weights;
    Buffer<int32_t> ids;
  };
  struct Ahead {
    float* logits;
    size_t stride;
    const cs_sampling* const* rows;
    int num_rows;
    int32_t* out;
  };

  bool reserve(int num_rows, int num_threads);
  int threads_for(int num_rows, int num_passes) const;
  template <typename Work>
  void for_rows(int num_rows, int num_threads, const Work& work);
  SamplingJob job(float* logits, const cs_sampling* params, int row, int thread) const;

  Team& team_;
  const LevelKernels* level_ = nullptr;
  int vocab_ = 0;
  int num_forbidden_ = 0;
  Buffer<int32_t> forbidden_ids_;
  std::vector<std::unique_ptr<RowBlocks>> blocks_;
  std::unique_ptr<ThreadScratch> scratch_[kMaxThreads];
  Ahead ahead_{};
};

}  // namespace chatserve
