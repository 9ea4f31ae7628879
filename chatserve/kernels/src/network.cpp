#include "network.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace chatserve {
namespace {

// Up to so many rows the last thread at a barrier does a row's small work for all: cheaper than one
// more barrier.
constexpr int kSmallRows = 2;

uint64_t now_ns() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

// Panels of the head that are one block of logits for the sampler.
constexpr int kBlockPanels = kSamplingBlock / kPanelRows;
static_assert(kSamplingBlock % kPanelRows == 0);

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Elements of one KV block.
size_t stride_of(const NetworkShape& shape) {
  return static_cast<size_t>(2) * kBlockSize * shape.head_dim * shape.num_kv_heads;
}

// Columns of the widest matrix.
int widest_of(const NetworkShape& shape) {
  return std::max({shape.hidden, shape.ffn, shape.num_heads * shape.head_dim});
}

}  // namespace

// ---- matrix ----

bool PackedMatrix::create(const LevelKernels& level, int rows, int columns, int bits,
                          Scaling scaling, int num_terms) {
  level_ = &level;
  const int panels = (rows + kPanelRows - 1) / kPanelRows;
  const int groups = columns / kGroup;
  const size_t panel_bytes = static_cast<size_t>(columns) * kPanelRows * bits / 8;
  if (!codes_.allocate(panel_bytes * panels)) return false;
  const size_t num_rows = static_cast<size_t>(panels) * kPanelRows;
  const size_t halves = static_cast<size_t>(panels) * groups * group_halves(scaling);
  if (scaling != Scaling::row && !group_scales_.allocate(halves)) return false;
  if (has_row_scales(scaling) && !row_scales_.allocate(num_rows)) return false;
  view_ = {rows,           columns,     panels,         groups,
           bits,           scaling,     num_terms,      panel_bytes,
           codes_.data(),  group_scales_.data(), row_scales_.data()};
  return true;
}

Activations PackedMatrix::row_of(const Activations& all, int row) const {
  const size_t first = static_cast<size_t>(row) * view_.num_terms;
  return {all.stride, all.codes + first * all.stride, all.scales + first * view_.groups,
          all.corrections + first * view_.groups};
}

void PackedMatrix::load(Team& team, int start, int num_rows, const void* rows, Dtype dtype,
                        RowMap map) {
  struct Load {
    const PackedMatrix* self;
    Team* team;
    int start, num_rows;
    const void* rows;
    Dtype dtype;
    RowMap map;
  } load{this, &team, start, num_rows, rows, dtype, map};
  auto job = [](void* context, int thread) {
    const Load& load = *static_cast<Load*>(context);
    const int all = load.team->num_threads();
    const long begin = static_cast<long>(load.num_rows) * thread / all;
    const long end = static_cast<long>(load.num_rows) * (thread + 1) / all;
    const size_t item = load.dtype == Dtype::float32 ? 4 : 2;
    const char* from = static_cast<const char*>(load.rows) +
                       static_cast<size_t>(begin) * load.self->view_.columns * item;
    load.self->level_->pack(load.self->view_, load.start + static_cast<int>(begin),
                            static_cast<int>(end - begin), from, load.dtype, load.map);
  };
  team.run(job, &load);
}

bool PackedMatrix::multiply(Team& team, const float* x, int num_rows, float* y) const {
  Buffer<int8_t> codes;
  Buffer<float> scales;
  Buffer<int32_t> corrections;
  const size_t columns = view_.columns, groups = view_.groups;
  const size_t stride = code_stride(view_.columns);
  const size_t terms = static_cast<size_t>(num_rows) * view_.num_terms;
  if (!codes.allocate(terms * stride) || !scales.allocate(terms * groups) ||
      !corrections.allocate(terms * groups)) {
    return false;
  }
  const Activations all = {stride, codes.data(), scales.data(), corrections.data()};
  for (int row = 0; row < num_rows; row++) {
    level_->quantise(x + row * columns, nullptr, 0, view_.columns, offset(), view_.num_terms,
                     row_of(all, row));
  }
  struct Product {
    const PackedMatrix* self;
    int num_rows, num_threads;
    Activations activations;
    Output output;
  } product{this, num_rows, team.num_threads(),
            all,
            {Epilogue::store, y, static_cast<size_t>(view_.panels) * kPanelRows, nullptr}};
  auto job = [](void* context, int thread) {
    const Product& p = *static_cast<Product*>(context);
    const long panels = p.self->view_.panels;
    p.self->level_->multiply(p.self->view_, p.activations, p.num_rows,
                             static_cast<int>(panels * thread / p.num_threads),
                             static_cast<int>(panels * (thread + 1) / p.num_threads), 0, p.output);
  };
  team.run(job, &product);
  return true;
}

// ---- KV pool ----

bool KVPool::create(const NetworkShape& shape, int num_blocks) {
  num_layers_ = shape.num_layers;
  num_blocks_ = num_blocks;
  layer_stride_ = stride_of(shape);
  block_stride_ = layer_stride_ * num_layers_;
  return data_.allocate(block_stride_ * num_blocks_);
}

bool KVPool::fits(const NetworkShape& shape) const {
  return num_layers_ == shape.num_layers && layer_stride_ == stride_of(shape);
}

void KVPool::copy_block(int source, int target) {
  std::memcpy(data_.data() + block_stride_ * target, data_.data() + block_stride_ * source,
              block_stride_ * sizeof(uint16_t));
}

void KVPool::warm(int num_blocks) {
  commit_pages(data_.data(), block_stride_ * std::min(num_blocks, num_blocks_) * sizeof(uint16_t));
}

// ---- network ----

Network::Network(const NetworkShape& shape, const LevelKernels& level, Team& team)
    : shape_(shape), level_(level), team_(team), layers_(shape.num_layers) {
  qkv_stride_ = round_up((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, kPanelRows);
}

bool Network::create() {
  const size_t rows = shape_.max_rows;
  const int widest = widest_of(shape_);
  row_segments_.resize(rows);
  return create_scores() && x_.allocate(rows * shape_.hidden) &&
         qkv_.allocate(rows * qkv_stride_) &&
         mixed_.allocate(rows * shape_.num_heads * shape_.head_dim) &&
         ffn_.allocate(rows * shape_.ffn) && codes_.allocate(kMaxTerms * rows * code_stride(widest)) &&
         scales_.allocate(kMaxTerms * rows * (widest / kGroup)) &&
         corrections_.allocate(kMaxTerms * rows * (widest / kGroup));
}

bool Network::create_scores() {
  scores_.clear();
  for (int t = 0; t < team_.num_threads(); t++) {
    scores_.push_back(std::make_unique<Buffer<float>>());
    const size_t stride = round_up(shape_.max_positions, kBlockSize) + kBlockSize;
    if (!scores_.back()->allocate(stride * kMaxAttentionRows)) return false;
  }
  return true;
}

bool Network::is_complete() const {
  return ends_.head && std::all_of(layers_.begin(), layers_.end(),
                                   [](const LayerParts& layer) { return layer.qkv != nullptr; });
}

const PackedMatrix& Network::matrix(int index) const {
  if (is_head(index)) return *ends_.head;
  const LayerParts& layer = layers_[index / 4];
  const PackedMatrix* const parts[] = {layer.qkv, layer.output, layer.gate_up, layer.down};
  return *parts[index % 4];
}

bool Network::forward(KVPool& pool, const StepInput& input) {
  pool_ = &pool;
  input_ = input;
  is_small_ = input.num_rows <= kSmallRows;
  for (int s = 0; s < input.num_segments; s++) {
    for (int i = 0; i < input.segment_rows[s]; i++) row_segments_[input.segment_starts[s] + i] = s;
  }
  adapted_.clear();
  for (int s = 0; input.adapters && s < input.num_segments; s++) {
    if (!s && !adapted_.begin(team_.num_threads(), shape_.max_rows, widest_of(shape_))) return false;
    if (input.adapters[s] &&
        !adapted_.add(*input.adapters[s], input.segment_starts[s], input.segment_rows[s])) {
      return false;
    }
  }
  plan_jobs();
  if (profile_) profile_time_ = now_ns();
  units_.reset(input.num_rows, team_.num_threads());
  team_.run([](void* self, int thread) { static_cast<Network*>(self)->work(thread); }, this);
  return true;
}

// Which query heads read which keys together: as many rows as an attention job holds, over the
// heads of a KV head and the neighbouring tokens of a sequence.
void Network::plan_jobs() {
  jobs_.clear();
  const int group = shape_.num_heads / shape_.num_kv_heads;
  for (int s = 0; s < input_.num_segments; s++) {
    const int total = input_.segment_rows[s] * group;
    for (int kv_head = 0; kv_head < shape_.num_kv_heads; kv_head++) {
      for (int at = 0; at < total; at += kMaxAttentionRows) {
        const int rows = std::min(kMaxAttentionRows, total - at);
        jobs_.push_back({s, kv_head, input_.segment_starts[s] + at / group, at % group, rows});
      }
    }
  }
}

// The end of `part` of the step, for `thread`. Waiting is counted as waiting, and so is what the
// last thread does at the barrier by itself.
template <typename Last>
void Network::meet(int thread, Part part, int next_units, Last last) {
  count(thread, part);
  team_.barrier([&] {
    last();
    units_.reset(next_units, team_.num_threads());
  });
  count(thread, Part::wait);
}

void Network::count(int thread, Part part) {
  if (!profile_ || thread) return;
  const uint64_t now = now_ns();
  profile_[static_cast<int>(part)] += now - profile_time_;
  profile_time_ = now;
}

void Network::embed(int row) {
  float* out = x_.data() + static_cast<size_t>(row) * shape_.hidden;
  const int token = input_.tokens[row];
  if (!ends_.embedding) {
    ends_.head->level().unpack_row(ends_.head->view(), token, out);
    return;
  }
  const size_t first = static_cast<size_t>(token) * shape_.hidden;
  if (ends_.embedding_dtype == Dtype::float32) {
    std::memcpy(out, static_cast<const float*>(ends_.embedding) + first,
                sizeof(float) * shape_.hidden);
  } else {  // the caller stores half precision as bfloat16
    const uint16_t* in = static_cast<const uint16_t*>(ends_.embedding) + first;
    for (int i = 0; i < shape_.hidden; i++) {
      const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
}

void Network::prepare(int thread, const float* x, const float* norm, int next, int row) {
  const PackedMatrix& w = matrix(next);
  const int columns = w.view().columns;
  level_.quantise(x, norm, shape_.eps, columns, w.offset(), w.view().num_terms,
                  w.row_of(activations(w), row));
  if (const LowRank* low_rank = change(next, row)) {
    if (norm) level_.rms_norm(x, norm, shape_.eps, columns, adapted_.normed(thread));
    level_.shrink(*low_rank, norm ? adapted_.normed(thread) : x, columns, adapted_.ranks(row));
  }
}

// After this stage `codes_` holds the input of `next`, and the units are its panels.
void Network::quantise_stage(int thread, const float* x, size_t stride, const float* norm,
                             int next) {
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    for (int row = begin; row < end; row++) prepare(thread, x + row * stride, norm, next, row);
  }
  meet(thread, Part::quantise, matrix(next).view().panels, [] {});
}

void Network::multiply_stage(int thread, int index, int num_rows, const Output& to) {
  const PackedMatrix& w = matrix(index);
  const Activations a = activations(w);
  const bool is_plain = adapted_.is_empty();
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    if (is_plain) {
      level_.multiply(w.view(), a, num_rows, begin, end, ahead(num_rows), to);
    } else {
      multiply_panels(thread, index, num_rows, begin, end, to);
    }
  }
}

void Network::multiply_panels(int thread, int index, int num_rows, int begin, int end, Output to) {
  const PackedMatrix& w = matrix(index);
  const Activations a = activations(w);
  if (adapted_.is_empty()) {
    level_.multiply(w.view(), a, num_rows, begin, end, ahead(num_rows), to);
    return;
  }
  float* deltas = adapted_.deltas(thread);
  const float** rows = adapted_.delta_rows(thread);
  for (int row = 0; row < num_rows; row++) {
    rows[row] = change(index, row) ? deltas + static_cast<size_t>(row) * kPanelRows : nullptr;
  }
  to.deltas = rows;
  for (int panel = begin; panel < end; panel++) {
    for (int row = 0; row < num_rows; row++) {
      float* delta = deltas + static_cast<size_t>(row) * kPanelRows;
      if (rows[row]) level_.expand(*change(index, row), adapted_.ranks(row), panel, delta);
    }
    level_.multiply(w.view(), a, num_rows, panel, panel + 1, ahead(num_rows), to);
  }
}

void Network::rotate_and_store(const LayerParts& layer, int index, int row) {
  const int dim = shape_.head_dim, position = input_.positions[row];
  const float* cos = ends_.cos + static_cast<size_t>(position) * (dim / 2);
  const float* sin = ends_.sin + static_cast<size_t>(position) * (dim / 2);
  float* heads = qkv_.data() + static_cast<size_t>(row) * qkv_stride_;
  for (int h = 0; h < shape_.num_heads; h++) {
    level_.rotate(heads + h * dim, layer.query_norm, shape_.eps, cos, sin, dim);
  }
  float* keys = heads + static_cast<size_t>(shape_.num_heads) * dim;
  const float* values = keys + static_cast<size_t>(shape_.num_kv_heads) * dim;
  const int block_id = input_.block_tables[row_segments_[row]][position / kBlockSize];
  uint16_t* block = pool_->layer(index) + pool_->block_stride() * block_id;
  for (int k = 0; k < shape_.num_kv_heads; k++) {
    level_.rotate(keys + k * dim, layer.key_norm, shape_.eps, cos, sin, dim);
    level_.store_kv(keys + k * dim, values + k * dim, dim, position % kBlockSize,
                    block + static_cast<size_t>(2) * kBlockSize * dim * k);
  }
}

void Network::attend_stage(int thread, const LayerParts& layer, int index) {
  const int dim = shape_.head_dim, group = shape_.num_heads / shape_.num_kv_heads;
  const float* queries[kMaxAttentionRows];
  float* outputs[kMaxAttentionRows];
  int first[kMaxAttentionRows], last[kMaxAttentionRows];
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    for (int j = begin; j < end; j++) {
      const Job& job = jobs_[j];
      int row = job.first_row, head = job.first_head;
      for (int r = 0; r < job.num_rows; r++) {
        const int h = job.kv_head * group + head;
        queries[r] = qkv_.data() + static_cast<size_t>(row) * qkv_stride_ + h * dim;
        outputs[r] = mixed_.data() + (static_cast<size_t>(row) * shape_.num_heads + h) * dim;
        last[r] = input_.positions[row];
        first[r] = layer.window ? std::max(0, last[r] - layer.window + 1) : 0;
        if (++head == group) {
          head = 0;
          row++;
        }
      }
      AttentionJob work;
      work.queries = queries;
      work.outputs = outputs;
      work.first = first;
      work.last = last;
      work.num_rows = job.num_rows;
      work.head_dim = dim;
      work.scale = 1.0f / std::sqrt(static_cast<float>(dim));
      work.keys = pool_->layer(index) + static_cast<size_t>(2) * kBlockSize * dim * job.kv_head;
      work.block_stride = pool_->block_stride();
      work.block_ids = input_.block_tables[job.segment];
      const Job& next = jobs_[j + 1 < static_cast<int>(jobs_.size()) ? j + 1 : j];
      work.next = pool_->layer(index) +
                  static_cast<size_t>(2) * kBlockSize * dim * next.kv_head +
                  pool_->block_stride() * input_.block_tables[next.segment][0];
      work.scores = scores_[thread]->data();
      work.score_stride = round_up(shape_.max_positions, kBlockSize) + kBlockSize;
      level_.attend(work);
    }
  }
}

void Network::work(int thread) {
  const int rows = input_.num_rows, hidden = shape_.hidden;
  const int heads_out = shape_.num_heads * shape_.head_dim;
  const int num_jobs = static_cast<int>(jobs_.size());
  float* x = x_.data();
  // One stage's units are set by the last thread at the barrier before it. With few rows that
  // thread also quantises them, and the stage of its own is left out.
  auto meet_and_quantise = [&](Part part, const float* from, size_t stride, const float* norm,
                               int next) {
    if (is_small_) {
      meet(thread, part, matrix(next).view().panels, [&] {
        for (int row = 0; row < rows; row++) prepare(thread, from + row * stride, norm, next, row);
      });
    } else {
      meet(thread, part, rows, [] {});
      quantise_stage(thread, from, stride, norm, next);
    }
  };

  for (int begin, end; units_.claim(thread, &begin, &end);) {
    for (int row = begin; row < end; row++) embed(row);
  }
  meet_and_quantise(Part::embed, x, hidden, layers_[0].attention_norm, 0);
  for (int index = 0; index < shape_.num_layers; index++) {
    const LayerParts& layer = layers_[index];
    const int qkv = 4 * index, output = qkv + 1, gate_up = qkv + 2, down = qkv + 3;
    multiply_stage(thread, qkv, rows,
                   {Epilogue::store, qkv_.data(), static_cast<size_t>(qkv_stride_),
                    layer.qkv_bias});
    if (is_small_) {
      meet(thread, Part::qkv, num_jobs, [&] {
        for (int row = 0; row < rows; row++) rotate_and_store(layer, index, row);
      });
    } else {
      meet(thread, Part::qkv, rows, [] {});
      for (int begin, end; units_.claim(thread, &begin, &end);) {
        for (int row = begin; row < end; row++) rotate_and_store(layer, index, row);
      }
      meet(thread, Part::rotate, num_jobs, [] {});
    }
    attend_stage(thread, layer, index);
    meet_and_quantise(Part::attend, mixed_.data(), heads_out, nullptr, output);
    multiply_stage(thread, output, rows,
                   {Epilogue::add, x, static_cast<size_t>(hidden), layer.output_bias});
    meet_and_quantise(Part::output, x, hidden, layer.mlp_norm, gate_up);
    multiply_stage(thread, gate_up, rows,
                   {Epilogue::swiglu, ffn_.data(), static_cast<size_t>(shape_.ffn),
                    layer.gate_up_bias});
    meet_and_quantise(Part::gate_up, ffn_.data(), shape_.ffn, nullptr, down);
    multiply_stage(thread, down, rows,
                   {Epilogue::add, x, static_cast<size_t>(hidden), layer.down_bias});
    if (index + 1 < shape_.num_layers) {
      meet_and_quantise(Part::down, x, hidden, layers_[index + 1].attention_norm, qkv + 4);
    }
  }
  const int num_outputs = input_.num_outputs, head = num_matrices() - 1;
  if (!num_outputs) return;
  meet(thread, Part::down, num_outputs, [] {});
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    for (int i = begin; i < end; i++) {
      prepare(thread, x + static_cast<size_t>(input_.output_rows[i]) * hidden, ends_.norm, head, i);
    }
  }
  meet(thread, Part::quantise, round_up(ends_.head->view().panels, kBlockPanels) / kBlockPanels,
       [] {});
  head_stage(thread);
  if (!input_.sampler) return;
  meet(thread, Part::head, num_outputs, [] {});
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    for (int row = begin; row < end; row++) input_.sampler->pick_ahead(thread, row);
  }
  count(thread, Part::sample);
}

// The logits, which the sampler sees while they are in this thread's cache.
void Network::head_stage(int thread) {
  const int head = num_matrices() - 1, panels = ends_.head->view().panels;
  const Output to = {Epilogue::store, input_.logits, input_.logits_stride, nullptr};
  for (int begin, end; units_.claim(thread, &begin, &end);) {
    multiply_panels(thread, head, input_.num_outputs, begin * kBlockPanels,
                    std::min(end * kBlockPanels, panels), to);
    count(thread, Part::head);
    if (input_.sampler) input_.sampler->look_ahead(begin, end);
    count(thread, Part::sample);
  }
}

}  // namespace chatserve
