#include "interface.h"

#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "network.h"
#include "sampling.h"

using namespace chatserve;

struct cs_team {
  Team team;
};
struct cs_matrix {
  PackedMatrix matrix;
};
struct cs_network {
  Network network;
  Team& team;
};
struct cs_pool {
  KVPool pool;
};
struct cs_adapter {
  Adapter adapter;
  cs_shape shape;
};
struct cs_sampler {
  Sampler sampler;
};

namespace {

const LevelKernels* const kLevels[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#elif defined(__aarch64__)
    &kNeonI8mm,
    &kNeon,
#endif
};

const LevelKernels* find_level(const char* name) {
  for (const LevelKernels* level : kLevels) {
    if (std::strcmp(level->name, name) == 0 && level->is_supported()) return level;
  }
  return nullptr;
}

const PackedMatrix* matrix_of(const cs_matrix* handle) {
  return handle ? &handle->matrix : nullptr;
}

// Whether `network` can multiply by the matrix as one of so many rows and columns.
bool fits(const Network& network, const cs_matrix* handle, int rows, int columns) {
  return handle && handle->matrix.view().rows == rows && handle->matrix.view().columns == columns &&
         &handle->matrix.level() == &network.level();
}

bool is_within(int value, int limit) { return value >= 0 && value < limit; }

// Far above every real network, and low enough that no product of sizes overflows.
constexpr int kMaxLayers = 1 << 12, kMaxVocab = 1 << 24, kMaxRows = 1 << 20;
constexpr int kMaxPositions = 1 << 28, kMaxBlocks = 1 << 24;

bool is_width(long size) { return size > 0 && size % kGroup == 0 && size <= kMaxColumns; }

bool is_count(int value, int limit) { return value > 0 && value <= limit; }

bool is_form(int bits, Scaling scaling) {
  return bits == 8 ? scaling <= Scaling::group : bits == 4 && scaling != Scaling::row;
}

bool is_valid(const cs_shape& s) {
  return is_width(s.hidden) && is_width(s.ffn) && is_count(s.head_dim, kMaxHeadDim) &&
         s.head_dim % 16 == 0 && s.num_heads > 0 && is_width(long{s.num_heads} * s.head_dim) &&
         is_count(s.num_kv_heads, s.num_heads) && s.num_heads % s.num_kv_heads == 0 &&
         is_count(s.num_layers, kMaxLayers) && is_count(s.vocab, kMaxVocab) &&
         is_count(s.max_rows, kMaxRows) && is_count(s.max_positions, kMaxPositions);
}

// Whether every rank and row of a change lies inside what it points into.
bool is_valid(const cs_low_rank& change, int rows) {
  if (!is_within(change.rank, kMaxRank + 1) || change.rank % kRankUnit) return false;
  if (!change.rank) return true;
  if (!change.a || !change.b || !change.scales || !change.spans) return false;
  const int panels = (rows + kPanelRows - 1) / kPanelRows;
  for (int s = 0; s < panels * kPanelSpans; s++) {
    const int first = change.spans[3 * s], count = change.spans[3 * s + 1];
    const int start = change.spans[3 * s + 2];
    if (first < 0 || count < 0 || start < 0 || count > change.rank - first ||
        count > change.num_b - start) {
      return false;
    }
  }
  return true;
}

// Puts the numbers of changes one behind the other at `place`; null: only counts their bytes.
class Copier {
 public:
  explicit Copier(char* place) : place_(place) {}
  size_t used() const { return used_; }

  void add(const cs_low_rank& from, int rows, int columns, LowRank& to) {
    to.rank = from.rank;
    if (!from.rank) return;
    static_assert(sizeof(RankSpan) == 3 * sizeof(int32_t), "spans are read as they come");
    const size_t panels = (rows + kPanelRows - 1) / kPanelRows;
    to.a = copy(from.a, static_cast<size_t>(from.rank) * columns);
    to.scales = copy(from.scales, from.rank);
    to.spans = reinterpret_cast<const RankSpan*>(copy(from.spans, 3 * kPanelSpans * panels));
    to.b = copy(from.b, static_cast<size_t>(from.num_b) * kSpanRows);
  }

 private:
  template <typename T>
  const T* copy(const T* from, size_t count) {
    char* to = place_ ? place_ + used_ : nullptr;
    if (to) std::memcpy(to, from, count * sizeof(T));
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<const T*>(to);
  }

  char* place_;
  size_t used_ = 0;
};

// Whether the matrices that `adapter` changes have the sizes of the network's.
bool fits(const cs_adapter& adapter, const NetworkShape& s) {
  const cs_shape& own = adapter.shape;
  return own.hidden == s.hidden && own.num_heads == s.num_heads &&
         own.num_kv_heads == s.num_kv_heads && own.head_dim == s.head_dim && own.ffn == s.ffn &&
         own.num_layers == s.num_layers && own.vocab == s.vocab;
}

// Whether every index of a step lies inside what it points into.
bool is_valid(const cs_step& step, const NetworkShape& shape, const KVPool& pool) {
  if (step.num_rows < 1 || step.num_rows > shape.max_rows || step.num_segments < 1 ||
      step.num_segments > step.num_rows || !is_within(step.num_outputs, step.num_rows + 1)) {
    return false;
  }
  int next_row = 0;
  for (int s = 0; s < step.num_segments; s++) {
    const int rows = step.segment_rows[s];
    if (step.segment_starts[s] != next_row || rows < 1 || rows > step.num_rows - next_row) {
      return false;
    }
    const int first = step.positions[next_row];
    if (!is_within(first, shape.max_positions)) return false;
    for (int i = 0; i < rows; i++) {
      const int row = next_row + i;
      if (!is_within(step.tokens[row], shape.vocab) || step.positions[row] != first + i) {
        return false;
      }
    }
    if (first + rows > shape.max_positions) return false;
    for (int b = 0; b <= (first + rows - 1) / kBlockSize; b++) {
      if (!is_within(step.block_tables[s][b], pool.num_blocks())) return false;
    }
    next_row += rows;
  }
  if (next_row != step.num_rows) return false;
  for (int i = 0; i < step.num_outputs; i++) {
    if (!is_within(step.output_rows[i], step.num_rows)) return false;
  }
  const size_t width = (static_cast<size_t>(shape.vocab) + kPanelRows - 1) / kPanelRows * kPanelRows;
  return step.num_outputs == 0 || (step.logits && step.logits_stride >= width);
}

bool are_within(const int32_t* ids, int count, int limit) {
  uint32_t largest = 0;  // negative ids are the largest of all
  for (int i = 0; i < count; i++) {
    const uint32_t id = static_cast<uint32_t>(ids[i]);
    largest = id > largest ? id : largest;
  }
  return count >= 0 && largest < static_cast<uint32_t>(limit);
}

bool ascend_within(const int32_t* ids, int count, int limit) {
  bool is_rising = true;
  for (int i = 1; i < count; i++) is_rising &= ids[i - 1] < ids[i];
  return count == 0 || (count > 0 && is_rising && ids[0] >= 0 && ids[count - 1] < limit);
}

// The lists are not read: sampling keeps to the vocabulary whatever is in them, and reading them here
// would cost as much as it does there.
bool is_valid(const cs_sampling& row) {
  return row.num_seen >= 0 && row.num_offsets >= 0 && row.num_masked >= 0 &&
         (row.is_greedy || row.temperature > 0);
}

// Rows to sample from, or to tell the probabilities of.
bool are_valid(const cs_sampler& sampler, size_t stride, int num_places, const int32_t* places,
               const cs_sampling* const* rows, int num_rows) {
  if (num_rows < 0 || stride < static_cast<size_t>(sampler.sampler.vocab()) ||
      (places ? !are_within(places, num_rows, num_places) : num_rows > num_places)) {
    return false;
  }
  for (int r = 0; r < num_rows; r++) {
    if (!is_valid(*rows[r])) return false;
  }
  return true;
}

}  // namespace

int cs_version(void) { return CS_VERSION; }

const char* cs_levels(void) {
  static const std::string names = [] {
    std::string all;
    for (const LevelKernels* level : kLevels) {
      if (level->is_supported()) all += (all.empty() ? "" : " ") + std::string(level->name);
    }
    return all;
  }();
  return names.c_str();
}

cs_team* cs_team_create(int num_threads) { return new (std::nothrow) cs_team{Team(num_threads)}; }

void cs_team_destroy(cs_team* team) { delete team; }

cs_matrix* cs_matrix_create(const char* level, int rows, int columns, int bits, int scaling,
                            int num_terms) {
  const LevelKernels* kernels = find_level(level);
  if (!kernels || !is_count(rows, kMaxVocab) || !is_width(columns) ||
      !is_within(scaling, 4) || !is_form(bits, static_cast<Scaling>(scaling)) ||
      !is_count(num_terms, kMaxTerms)) {
    return nullptr;
  }
  cs_matrix* handle = new (std::nothrow) cs_matrix;
  if (handle && !handle->matrix.create(*kernels, rows, columns, bits,
                                       static_cast<Scaling>(scaling), num_terms)) {
    delete handle;
    return nullptr;
  }
  return handle;
}

void cs_matrix_destroy(cs_matrix* matrix) { delete matrix; }

size_t cs_matrix_bytes(const cs_matrix* matrix) { return matrix->matrix.num_bytes(); }

int cs_matrix_load(cs_matrix* matrix, cs_team* team, int start, int num_rows, const void* rows,
                   int dtype, int row_map) {
  const Matrix& view = matrix->matrix.view();
  const int room = row_map == 0 ? view.rows : view.rows / 2;
  if (start < 0 || num_rows < 1 || num_rows > room - start || !is_within(dtype, 3) ||
      !is_within(row_map, 3) || (row_map && view.rows % kPanelRows)) {
    return CS_BAD_ARGUMENT;
  }
  matrix->matrix.load(team->team, start, num_rows, rows, static_cast<Dtype>(dtype),
                      static_cast<RowMap>(row_map));
  return CS_OK;
}

int cs_matrix_row(const cs_matrix* matrix, int row, float* out) {
  if (!is_within(row, matrix->matrix.view().rows)) return CS_BAD_ARGUMENT;
  matrix->matrix.level().unpack_row(matrix->matrix.view(), row, out);
  return CS_OK;
}

int cs_matrix_multiply(const cs_matrix* matrix, cs_team* team, const float* x, int num_rows,
                       float* y) {
  if (num_rows < 1) return CS_BAD_ARGUMENT;
  return matrix->matrix.multiply(team->team, x, num_rows, y) ? CS_OK : CS_NO_MEMORY;
}

cs_network* cs_network_create(const cs_shape* s, const char* level, cs_team* team) {
  const LevelKernels* kernels = find_level(level);
  if (!kernels || !is_valid(*s)) return nullptr;
  const NetworkShape shape = {s->hidden, s->num_heads,  s->num_kv_heads, s->head_dim,      s->ffn,
                              s->num_layers, s->vocab, s->max_rows,     s->max_positions, s->eps};
  cs_network* handle =
      new (std::nothrow) cs_network{Network(shape, *kernels, team->team), team->team};
  if (handle && !handle->network.create()) {
    delete handle;
    return nullptr;
  }
  return handle;
}

void cs_network_destroy(cs_network* network) { delete network; }

int cs_network_set_layer(cs_network* network, int index, const cs_layer* layer) {
  const Network& n = network->network;
  const NetworkShape& s = n.shape();
  const int heads_out = s.num_heads * s.head_dim;
  if (!is_within(index, s.num_layers) || layer->window < 0 || !layer->attention_norm ||
      !layer->mlp_norm ||
      !fits(n, layer->qkv, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.hidden) ||
      !fits(n, layer->output, s.hidden, heads_out) ||
      !fits(n, layer->gate_up, 2 * s.ffn, s.hidden) || !fits(n, layer->down, s.hidden, s.ffn)) {
    return CS_BAD_ARGUMENT;
  }
  network->network.set_layer(
      index, {matrix_of(layer->qkv), matrix_of(layer->output), matrix_of(layer->gate_up),
              matrix_of(layer->down), layer->attention_norm, layer->mlp_norm, layer->qkv_bias,
              layer->output_bias, layer->gate_up_bias, layer->down_bias, layer->query_norm,
              layer->key_norm, layer->window});
  return CS_OK;
}

int cs_network_set_ends(cs_network* network, const cs_ends* ends) {
  const NetworkShape& s = network->network.shape();
  if (!fits(network->network, ends->head, s.vocab, s.hidden) || !ends->norm || !ends->cos ||
      !ends->sin ||
      (ends->embedding && ends->embedding_dtype != 0 && ends->embedding_dtype != 2)) {
    return CS_BAD_ARGUMENT;
  }
  network->network.set_ends({matrix_of(ends->head), ends->embedding,
                             static_cast<Dtype>(ends->embedding_dtype), ends->norm, ends->cos,
                             ends->sin});
  return CS_OK;
}

int cs_network_set_threads(cs_network* network, int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) return CS_BAD_ARGUMENT;
  network->team.set_num_threads(num_threads);
  return network->network.create_scores() ? CS_OK : CS_NO_MEMORY;
}

int cs_network_set_prefetch(cs_network* network, size_t one_row, size_t more_rows) {
  network->network.set_prefetch(one_row, more_rows);
  return CS_OK;
}

int cs_network_set_profile(cs_network* network, uint64_t* nanoseconds) {
  static_assert(CS_NUM_PARTS == kNumParts, "interface.h names the parts");
  network->network.set_profile(nanoseconds);
  return CS_OK;
}

int cs_network_forward(cs_network* network, cs_pool* pool, const cs_step* step) {
  const Network& n = network->network;
  if (!n.is_complete() || !pool->pool.fits(n.shape()) ||
      !is_valid(*step, n.shape(), pool->pool)) {
    return CS_BAD_ARGUMENT;
  }
  std::vector<const Adapter*> adapters;
  for (int s = 0; step->adapters && s < step->num_segments; s++) {
    const cs_adapter* handle = step->adapters[s];
    if (handle && !fits(*handle, n.shape())) return CS_BAD_ARGUMENT;
    adapters.push_back(handle ? &handle->adapter : nullptr);
  }
  Sampler* sampler = step->sampler ? &step->sampler->sampler : nullptr;
  if (sampler) {
    if (&sampler->team() != &network->team || sampler->vocab() != n.shape().vocab) {
      return CS_BAD_ARGUMENT;
    }
    for (int i = 0; i < step->num_outputs; i++) {
      if (step->samplings[i] && !is_valid(*step->samplings[i])) {
        return CS_BAD_ARGUMENT;
      }
    }
    if (!sampler->begin_ahead(step->logits, step->logits_stride, step->samplings,
                              step->num_outputs, step->picked)) {
      return CS_NO_MEMORY;
    }
  }
  const bool is_done = network->network.forward(
      pool->pool,
      {step->num_rows, step->num_segments, step->num_outputs, step->tokens, step->positions,
       step->segment_starts, step->segment_rows, step->block_tables,
       step->adapters ? adapters.data() : nullptr, step->output_rows, step->logits,
       step->logits_stride, sampler});
  return is_done ? CS_OK : CS_NO_MEMORY;
}

int cs_network_rows(const cs_network* network, int num_rows, float* out) {
  const NetworkShape& shape = network->network.shape();
  if (!is_count(num_rows, shape.max_rows)) return CS_BAD_ARGUMENT;
  std::memcpy(out, network->network.rows(),
              sizeof(float) * static_cast<size_t>(num_rows) * shape.hidden);
  return CS_OK;
}

cs_adapter* cs_adapter_create(const cs_shape* s, const cs_low_rank* changes) {
  if (!is_valid(*s)) return nullptr;
  const int qkv = (s->num_heads + 2 * s->num_kv_heads) * s->head_dim;
  const int rows[] = {qkv, s->hidden, 2 * s->ffn, s->hidden};
  const int num_matrices = 4 * s->num_layers + 1;
  for (int i = 0; i < num_matrices; i++) {
    if (!is_valid(changes[i], i < num_matrices - 1 ? rows[i % 4] : s->vocab)) return nullptr;
  }
  std::unique_ptr<cs_adapter> handle(new (std::nothrow) cs_adapter{{}, *s});
  if (!handle) return nullptr;
  Adapter& adapter = handle->adapter;
  const int columns[] = {s->hidden, s->num_heads * s->head_dim, s->hidden, s->ffn};
  auto copy_all = [&](Copier copier) {
    for (int i = 0; i < num_matrices; i++) {
      const bool is_head = i == num_matrices - 1;
      copier.add(changes[i], is_head ? s->vocab : rows[i % 4], is_head ? s->hidden : columns[i % 4],
                 adapter.changes[i]);
    }
    return copier.used();
  };
  adapter.changes.resize(num_matrices);
  if (!adapter.numbers.allocate(copy_all(Copier(nullptr)))) return nullptr;
  copy_all(Copier(adapter.numbers.data()));
  return handle.release();
}

void cs_adapter_destroy(cs_adapter* adapter) { delete adapter; }

cs_pool* cs_pool_create(const cs_shape* s, int num_blocks) {
  if (!is_valid(*s) || !is_count(num_blocks, kMaxBlocks)) return nullptr;
  const NetworkShape shape = {s->hidden, s->num_heads,  s->num_kv_heads, s->head_dim,      s->ffn,
                              s->num_layers, s->vocab, s->max_rows,     s->max_positions, s->eps};
  cs_pool* handle = new (std::nothrow) cs_pool;
  if (handle && !handle->pool.create(shape, num_blocks)) {
    delete handle;
    return nullptr;
  }
  return handle;
}

void cs_pool_destroy(cs_pool* pool) { delete pool; }

size_t cs_pool_bytes(const cs_pool* pool) { return pool->pool.num_bytes(); }

int cs_pool_warm(cs_pool* pool, int num_blocks) {
  if (num_blocks < 0) return CS_BAD_ARGUMENT;
  pool->pool.warm(num_blocks);
  return CS_OK;
}

int cs_pool_copy_block(cs_pool* pool, int source, int target) {
  if (!is_within(source, pool->pool.num_blocks()) || !is_within(target, pool->pool.num_blocks())) {
    return CS_BAD_ARGUMENT;
  }
  pool->pool.copy_block(source, target);
  return CS_OK;
}

cs_sampler* cs_sampler_create(const char* level, cs_team* team, int vocab,
                              const int32_t* forbidden_ids, int num_forbidden) {
  const LevelKernels* kernels = find_level(level);
  if (!kernels || vocab < 1 || !ascend_within(forbidden_ids, num_forbidden, vocab)) {
    return nullptr;
  }
  cs_sampler* handle = new (std::nothrow) cs_sampler{Sampler(team->team)};
  if (handle && !handle->sampler.create(*kernels, vocab, forbidden_ids, num_forbidden)) {
    delete handle;
    return nullptr;
  }
  return handle;
}

void cs_sampler_destroy(cs_sampler* sampler) { delete sampler; }

int cs_sampler_sample(cs_sampler* sampler, float* logits, size_t stride, int num_places,
                      const int32_t* places, const cs_sampling* const* rows, int num_rows,
                      int32_t* out) {
  if (!are_valid(*sampler, stride, num_places, places, rows, num_rows)) return CS_BAD_ARGUMENT;
  return sampler->sampler.sample(logits, stride, places, rows, num_rows, out) ? CS_OK
                                                                             : CS_NO_MEMORY;
}

int cs_sampler_logprobs(cs_sampler* sampler, float* logits, size_t stride, int num_places,
                        const int32_t* places, const cs_sampling* const* rows, const int32_t* ids,
                        const int32_t* num_tops, int num_rows, int max_tops, float* out,
                        int32_t* top_ids) {
  const int vocab = sampler->sampler.vocab();
  if (!are_valid(*sampler, stride, num_places, places, rows, num_rows) || max_tops < 0 ||
      max_tops > vocab || !are_within(ids, num_rows, vocab) ||
      !are_within(num_tops, num_rows, max_tops + 1)) {
    return CS_BAD_ARGUMENT;
  }
  return sampler->sampler.logprobs(logits, stride, places, rows, ids, num_tops, num_rows, max_tops,
                                   out, top_ids)
             ? CS_OK
             : CS_NO_MEMORY;
}
