// The library's C interface: raw pointers, int results, no exceptions, no globals.
//
// 0 is success; other results are the codes below. Handles are freed by the matching _destroy. One
// caller at a time per team.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every change of this file; the Python side refuses another number.
#define CS_VERSION 11

enum { CS_OK = 0, CS_BAD_ARGUMENT = 1, CS_NO_MEMORY = 2 };

#if defined(__GNUC__)
#define CS_API __attribute__((visibility("default")))
#else
#define CS_API
#endif

// embed, quantise, qkv, rotate, attend, output, gate_up, down, head, sample, wait
#define CS_NUM_PARTS 11

typedef struct cs_team cs_team;
typedef struct cs_matrix cs_matrix;
typedef struct cs_network cs_network;
typedef struct cs_pool cs_pool;
typedef struct cs_sampler cs_sampler;
typedef struct cs_adapter cs_adapter;

typedef struct {
  int32_t hidden, num_heads, num_kv_heads, head_dim, ffn, num_layers, vocab;
  int32_t max_rows, max_positions;
  float eps;
} cs_shape;

typedef struct {
  const cs_matrix *qkv, *output, *gate_up, *down;
  const float *attention_norm, *mlp_norm;
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;  // padded to whole panels, or null
  const float *query_norm, *key_norm;                              // [head_dim], or null
  int32_t window;                                                  // tokens; 0: no window
} cs_layer;

typedef struct {
  const cs_matrix* head;
  const void* embedding;    // [vocab][hidden], or null: the head's rows
  int32_t embedding_dtype;  // 0 float32, 2 bfloat16
  const float* norm;
  const float *cos, *sin;  // [max_positions][head_dim / 2]
} cs_ends;

// What an adapter adds to one matrix's output for a row x: b diag(scales) a x, in half precision. Its
// output rows come 16 together, in the order in which they are packed: spans[3 s] is the first of
// their ranks, spans[3 s + 1] how many there are, spans[3 s + 2] where their rows of b begin.
typedef struct {
  const uint16_t* a;     // [rank][columns]
  const uint16_t* b;     // [num_b][16]
  const float* scales;   // [rank]
  const int32_t* spans;  // [rows rounded up to 32, over 16][3]
  int32_t rank;          // a multiple of 4; 0: the matrix stays as it is
  int32_t num_b;
} cs_low_rank;

// How one sequence's next token is picked. Lists of ids ascend; from one that
// does not, some ids are passed over.
typedef struct {
  double temperature, top_p;  // top_p >= 1: off
  double min_p_margin;        // temperature * ln(min_p); -inf: off
  uint64_t stream;            // random numbers; the token's position says which of them is used
  int64_t position;           // of the token that is picked
  int64_t masked_until;       // the first position at which the masked ids may stand
  const int32_t* seen_ids;    // that the repetition penalty is for
  const int32_t* offset_ids;
  const float* offsets;       // added to the logits of offset_ids
  const int32_t* masked_ids;
  const uint32_t* allowed;    // bit i of word w: 32 w + i may be picked; null: all
  int32_t num_seen, num_offsets, num_masked;
  int32_t top_k;  // 0: off
  int32_t is_greedy;
  float repetition_penalty;
} cs_sampling;

// Arrays as in chatserve::StepInput (network.h). With a sampler, which is on the network's team, the
// rows with a sampling are picked as cs_sampler_sample would pick them, while they are computed.
typedef struct {
  int32_t num_rows, num_segments, num_outputs;
  const int32_t *tokens, *positions;
  const int32_t *segment_starts, *segment_rows;
  const int32_t* const* block_tables;
  const cs_adapter* const* adapters;  // [num_segments] or null; each of the network's sizes, or null
  const int32_t* output_rows;
  float* logits;
  size_t logits_stride;
  cs_sampler* sampler;                  // or null
  const cs_sampling* const* samplings;  // [num_outputs], null where none
  int32_t* picked;                      // [num_outputs]: of rows with a sampling
} cs_step;

CS_API int cs_version(void);
// Names of the levels that this processor has, best first, separated by spaces.
CS_API const char* cs_levels(void);

CS_API cs_team* cs_team_create(int num_threads);
CS_API void cs_team_destroy(cs_team* team);

// bits 8 or 4; scaling 0: a scale per row (8 bits), 1: per 32 columns, 2: and a minimum (4 bits), 3:
// a scale and a zero point of 8 bits (4 bits);
// num_terms: 1 quantises activations to 8 bits, 2 to 16. Null: bad size, or no memory.
CS_API cs_matrix* cs_matrix_create(const char* level, int rows, int columns, int bits, int scaling,
                                   int num_terms);
CS_API void cs_matrix_destroy(cs_matrix* matrix);
CS_API size_t cs_matrix_bytes(const cs_matrix* matrix);
// dtype: 0 float32, 1 float16, 2 bfloat16. row_map: 0 plain, 1 gate, 2 up (rows of one half each).
CS_API int cs_matrix_load(cs_matrix* matrix, cs_team* team, int start, int num_rows, const void* rows,
                   int dtype, int row_map);
CS_API int cs_matrix_row(const cs_matrix* matrix, int row, float* out);
// y[num_rows][rows rounded up to 32] = x[num_rows][columns] times the transposed matrix.
CS_API int cs_matrix_multiply(const cs_matrix* matrix, cs_team* team, const float* x, int num_rows,
                       float* y);

CS_API cs_network* cs_network_create(const cs_shape* shape, const char* level, cs_team* team);
CS_API void cs_network_destroy(cs_network* network);
CS_API int cs_network_set_layer(cs_network* network, int index, const cs_layer* layer);
CS_API int cs_network_set_ends(cs_network* network, const cs_ends* ends);
// Also resizes the team, which no other network may use.
CS_API int cs_network_set_threads(cs_network* network, int num_threads);
// A hint that changes no result: bytes by which weights are fetched ahead in products with one row,
// which only wait for them, and with more rows, which compute as well.
CS_API int cs_network_set_prefetch(cs_network* network, size_t one_row, size_t more_rows);
// Adds the first thread's time of each part of a step to nanoseconds[CS_NUM_PARTS]; null: stop.
CS_API int cs_network_set_profile(cs_network* network, uint64_t* nanoseconds);
CS_API int cs_network_forward(cs_network* network, cs_pool* pool, const cs_step* step);
// out[num_rows][hidden]: the first rows of the last step, as the last layer has left them.
CS_API int cs_network_rows(const cs_network* network, int num_rows, float* out);

// changes[4 num_layers + 1]: qkv, output, gate_up, down of each layer, then the head, for networks of
// these sizes. What they point to is copied. Null: something does not fit, or no memory.
CS_API cs_adapter* cs_adapter_create(const cs_shape* shape, const cs_low_rank* changes);
CS_API void cs_adapter_destroy(cs_adapter* adapter);

CS_API cs_pool* cs_pool_create(const cs_shape* shape, int num_blocks);
CS_API void cs_pool_destroy(cs_pool* pool);
CS_API size_t cs_pool_bytes(const cs_pool* pool);
// Commits the memory of the first blocks before they are used; may run beside steps.
CS_API int cs_pool_warm(cs_pool* pool, int num_blocks);
CS_API int cs_pool_copy_block(cs_pool* pool, int source, int target);

// The forbidden ids, which are copied, are never picked.
CS_API cs_sampler* cs_sampler_create(const char* level, cs_team* team, int vocab,
                                     const int32_t* forbidden_ids, int num_forbidden);
CS_API void cs_sampler_destroy(cs_sampler* sampler);
// Changes logits[num_places][stride]. places[num_rows]: where each row's logits are, no two the same;
// null: in order. out[num_rows]: ids, or -1 where no logit is finite, or one is NaN or +inf.
CS_API int cs_sampler_sample(cs_sampler* sampler, float* logits, size_t stride, int num_places,
                             const int32_t* places, const cs_sampling* const* rows, int num_rows,
                             int32_t* out);
// Of logits that are changed already, by cs_sampler_sample or in a step, or never; lists of `rows` and
// `allowed` are not looked at. out[num_rows][1 + max_tops]: the natural logarithm of the probability
// with which ids[r] is picked, NaN where no logit is finite, or one is NaN or +inf; then those of the
// num_tops[r] likeliest, falling, whose ids are in top_ids[num_rows][max_tops], -1 where there are no
// more. A greedy row has them as if its temperature were 1, and no filter.
CS_API int cs_sampler_logprobs(cs_sampler* sampler, float* logits, size_t stride, int num_places,
                               const int32_t* places, const cs_sampling* const* rows,
                               const int32_t* ids, const int32_t* num_tops, int num_rows,
                               int max_tops, float* out, int32_t* top_ids);

#ifdef __cplusplus
}
#endif
