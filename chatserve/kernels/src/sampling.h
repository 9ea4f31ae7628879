// Logits to token ids, row by row: penalties, temperature, top-k, top-p, min-p, and the draw.
#pragma once
#include <memory>

#include "interface.h"
#include "memory.h"
#include "team.h"

namespace chatserve {

struct LevelKernels;

// Room for one row's sampling. Filled from the front; `candidates` have room for whole vectors
// behind the last one.
struct SamplingScratch {
  float* maxima;       // of each lane of each block of ids
  double* block_mass;  // weights of a block, added
  float* values;       // candidates: logits,
  float* weights;      // e^((logit - largest) / temperature),
  int32_t* ids;        // and ids, ascending
};

constexpr int kSamplingBlock = 1024;  // ids of a block
constexpr int kMaxSamplingLanes = 16;

// What a row's logits are changed by, and how a token is picked of them.
struct SamplingJob {
  float* logits;  // [vocab]
  int vocab;
  const cs_sampling* params;
  const int32_t* forbidden_ids;
  int num_forbidden;
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

  // Changes the logits, of which row i's begin at places[i] * stride, or at i * stride. out[i]: an
  // id, or -1 where no logit is finite or any is NaN or +inf. False when there is no memory.
  bool sample(float* logits, size_t stride, const int32_t* places, const cs_sampling* const* rows,
              int num_rows, int32_t* out);

 private:
  struct ThreadScratch {
    Buffer<float> maxima, values, weights;
    Buffer<double> block_mass;
    Buffer<int32_t> ids;
  };

  Team& team_;
  const LevelKernels* level_ = nullptr;
  int vocab_ = 0;
  int num_forbidden_ = 0;
  Buffer<int32_t> forbidden_ids_;
  std::unique_ptr<ThreadScratch> scratch_[kMaxThreads];
};

}  // namespace chatserve
