// What one instruction set level offers: plain functions over raw memory. No threads, no allocation.
//
// Every function treats each activation row by itself and in one fixed order of additions, so a
// row's result does not depend on how many rows come with it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace chatserve {

constexpr int kGroup = 32;      // columns that share one activation scale, and a group's weight scale
constexpr int kPanelRows = 32;  // output rows that are packed together
constexpr int kBlockSize = 32;  // token places of a KV block
constexpr int kKeyLanes = 16;   // positions side by side in a block's keys
constexpr int kMaxHeadDim = 256;
constexpr int kMaxColumns = 1 << 16;
constexpr int kMaxTerms = 2;

constexpr int kMaxWideRows = 16;  // that a product takes through the weights together

// From one row of codes to the next: rows a power of two apart would crowd into few sets of the cache.
constexpr size_t code_stride(int columns) { return columns + 64; }


enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// How rows of a checkpoint tensor spread over panels: `gate` and `up` share panels, 16 rows each.
enum class RowMap : int { plain = 0, gate = 1, up = 2 };

// How a weight comes from its code: times a scale per output row, times one per 32 columns, or that
// and plus a minimum per 32 columns. `centred`: less a zero point and times a scale per 32 columns,
// each of 8 bits, then times a scale per output row.
enum class Scaling : int { row = 0, group = 1, affine = 2, centred = 3 };

// Steps of a zero point in one code.
constexpr int kZeroSteps = 16;

constexpr bool has_row_scales(Scaling scaling) {
  return scaling == Scaling::row || scaling == Scaling::centred;
}

// Halves of one group of one panel.
constexpr int group_halves(Scaling scaling) {
  return scaling == Scaling::affine ? 2 * kPanelRows : kPanelRows;
}

// A packed weight (rows, columns). Codes: [panel][columns / 4][32 rows][4 columns] bytes for 8 bits,
// [panel][columns / 8][32 rows][4] for 4 bits, where a byte's low half is column j and its high half
// column j + 4. Codes are stored with the level's offset added, those of `affine` and `centred` as they are.
struct Matrix {
  int rows, columns, panels, groups, bits;
  Scaling scaling;
  int num_terms;           // rows of 8-bit codes that stand for one activation row, 1 or 2
  size_t panel_bytes;
  uint8_t* codes;
  // [panel][group][32 rows] halves; `affine`: each followed by 32 minima; `centred`: scales in the
  // low byte, zero points in the high one
  uint16_t* group_scales;
  float* row_scales;       // [panel][32 rows]
};

// Quantised activation rows: codes[M][terms][stride], scales[M][terms][groups], and what an
// accumulator starts with, -offset * sum(codes), in corrections[M][terms][groups]. A second term holds
// what the first one rounds away, in steps 254 times finer.
struct Activations {
  size_t stride;  // `code_stride` of the columns
  int8_t* codes;
  float* scales;
  int32_t* corrections;
};

enum class Epilogue : int { store, add, swiglu };

// Where a product goes: out[M][stride]; `bias` per output row or null (for `swiglu` in panel order).
// `deltas`, where any row has one: [M] -> [kPanelRows] or null, added before the bias; of one panel, so
// that a call computes no other.
struct Output {
  Epilogue epilogue;
  float* out;
  size_t stride;
  const float* bias;
  const float* const* deltas = nullptr;
};

constexpr int kSpanRows = 16;  // output rows of a panel that one adapter's matrix changes together
constexpr int kPanelSpans = kPanelRows / kSpanRows;
constexpr int kRankUnit = 4;
constexpr int kMaxRank = 1 << 12;

// Which ranks change `kSpanRows` output rows: `count` from `first` on. Their part of `LowRank::b`
// begins `start` times kSpanRows halves behind its beginning.
struct RankSpan {
  int32_t first, count, start;
};

// What an adapter adds to a matrix's output for a row x: b diag(scales) a x. Fused matrices have
// ranks of their own for each part.
struct LowRank {
  const uint16_t* a;      // [rank][columns] halves
  const uint16_t* b;      // by span: [count][kSpanRows] halves
  const float* scales;    // [rank]
  const RankSpan* spans;  // [panels][kPanelSpans]
  int rank;               // a multiple of kRankUnit; 0: the matrix stays as it is
};

constexpr int kMaxAttentionRows = 6;

// Rows of query heads that share the keys and values of one KV head of one sequence.
struct AttentionJob {
  const float* const* queries;   // [rows] -> [head_dim]
  float* const* outputs;         // [rows] -> [head_dim]
  const int* first;              // [rows] first position that the row sees
  const int* last;               // [rows] last position that the row sees
  int num_rows;                  // at most kMaxAttentionRows
  int head_dim;
  float scale;
  const uint16_t* keys;          // this layer's and KV head's place in block 0; values follow keys
  size_t block_stride;           // from one block to the next, in elements
  const int* block_ids;          // the sequence's block table
  const uint16_t* next;          // where the job after this one begins to read; a hint
  float* scores;                 // [rows][score_stride]
  size_t score_stride;
};

struct SamplingJob;

struct LevelKernels {
  const char* name;
  bool (*is_supported)();
  int offset8, offset4;  // added to signed codes in storage
  void (*pack)(const Matrix&, int start, int num_rows, const void* rows, Dtype, RowMap);
  void (*unpack_row)(const Matrix&, int row, float* out);
  // `ahead`: bytes by which codes are prefetched when they are read only once; 0 leaves it to the
  // processor. A hint: it changes no result.
  void (*multiply)(const Matrix&, const Activations&, int num_rows, int first_panel, int last_panel,
                   size_t ahead, const Output&);
  // One row's place in `Activations`, after RMSNorm where `norm` is given. Non-finite input gives NaN
  // scales.
  void (*quantise)(const float* x, const float* norm, float eps, int columns, int offset,
                   int num_terms, const Activations& row);
  // In place: optional RMSNorm over the head, then rotation by cos, sin [head_dim / 2].
  void (*rotate)(float* head, const float* norm, float eps, const float* cos, const float* sin,
                 int head_dim);
  // One token's key and value into a KV block at `place`.
  void (*store_kv)(const float* key, const float* value, int head_dim, int place, uint16_t* block);
  void (*attend)(const AttentionJob&);
  void (*rms_norm)(const float* x, const float* norm, float eps, int columns, float* out);
  // The first look at blocks [first, last) of a row's logits; then a token id, or -1. See sampling.h.
  void (*look)(const SamplingJob&, int first, int last);
  int32_t (*pick)(const SamplingJob&);
  // The logprob of an id into out[0], those of so many likeliest ids behind it.
  void (*logprobs)(const SamplingJob&, int32_t id, int num_tops, float* out, int32_t* top_ids);
  // One row's ranks [rank] of x [columns], and what they add to the rows of one panel [kPanelRows].
  void (*shrink)(const LowRank&, const float* x, int columns, float* ranks);
  void (*expand)(const LowRank&, const float* ranks, int panel, float* delta);
};

extern const LevelKernels kAvx512, kAvx2, kNeonI8mm, kNeon;

}  // namespace chatserve
