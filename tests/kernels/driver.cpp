// Drives the kernels through their C interface with random networks, on every level that this
// processor has: for sanitizers, and for processors that are only emulated.
//
// Judges by a network of its own in plain scalar code, which rounds where the kernels round, and by
// the bits: a row must not depend on its batch, its chunk or the number of threads, nor a product on
// the level. `driver levels` prints what levels there are, and that is all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "interface.h"

namespace {

using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

constexpr int kBlockSize = 32, kGroup = 32;
std::mt19937 draw(7);

void require(bool is_true, const std::string& what) {
  if (is_true) return;
  std::fprintf(stderr, "driver: %s\n", what.c_str());
  std::exit(1);
}

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(draw); }

Floats gaussian(size_t count, float deviation, float mean = 0) {
  std::normal_distribution<float> normal(mean, deviation);
  Floats values(count);
  for (float& value : values) value = normal(draw);
  return values;
}

// ---- half precision ----

uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const float unit = std::ldexp(1.0f, std::max(exponent - 11, -24));  // of the last place
  const float rounded = std::nearbyint(size / unit) * unit;
  if (rounded < std::ldexp(1.0f, -14)) {
    return sign | static_cast<uint16_t>(rounded / std::ldexp(1.0f, -24));
  }
  std::memcpy(&bits, &rounded, 4);
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return half & 0x8000 ? -size : size;
}

// ---- a packed matrix, and what it stands for ----

struct Packing {
  int bits, scaling, num_terms;
};

struct Matrix {
  cs_matrix* handle = nullptr;
  int rows = 0, columns = 0;
  Floats values;  // as the kernels read them, rows in their own order

  ~Matrix() { cs_matrix_destroy(handle); }

  // `is_gate_up`: the first half of the rows is gate, the second up.
  void build(const char* level, cs_team* team, Packing packing, int num_rows, int num_columns,
             bool is_gate_up = false) {
    rows = num_rows, columns = num_columns;
    handle = cs_matrix_create(level, rows, columns, packing.bits, packing.scaling,
                              packing.num_terms);
    require(handle, "a matrix was refused");
    const Floats source = gaussian(static_cast<size_t>(rows) * columns, 1.5f / std::sqrt(columns));
    const int half = is_gate_up ? rows / 2 : rows;
    for (int start = 0; start < rows;) {
      const int count = integer(1, std::min(40, (start / half + 1) * half - start));
      const int map = is_gate_up ? 1 + start / half : 0;
      load(team, source, start, count, start % half, map);
      start += count;
    }
    values.resize(source.size());
    for (int row = 0; row < rows; row++) {
      const int half_row = row % half;
      const int place = is_gate_up ? half_row / 16 * 32 + half_row % 16 + row / half * 16 : row;
      Floats out(columns);
      require(cs_matrix_row(handle, place, out.data()) == CS_OK, "a row was refused");
      std::copy(out.begin(), out.end(), values.begin() + static_cast<size_t>(row) * columns);
    }
    check(source, packing);
  }

  void load(cs_team* team, const Floats& source, int start, int count, int place, int map) {
    const size_t first = static_cast<size_t>(start) * columns;
    const size_t size = static_cast<size_t>(count) * columns;
    const int dtype = integer(0, 2);
    int status;
    if (dtype == 0) {
      const Floats rows(source.begin() + first, source.begin() + first + size);
      status = cs_matrix_load(handle, team, place, count, rows.data(), dtype, map);
    } else {
      std::vector<uint16_t> rows(size);
      for (size_t i = 0; i < size; i++) {
        uint32_t bits;
        std::memcpy(&bits, &source[first + i], 4);
        rows[i] = dtype == 1 ? to_half(source[first + i]) : static_cast<uint16_t>(bits >> 16);
      }
      status = cs_matrix_load(handle, team, place, count, rows.data(), dtype, map);
    }
    require(status == CS_OK, "rows were refused");
  }

  void check(const Floats& source, Packing packing) const {
    const int span = packing.scaling ? kGroup : columns;
    for (size_t first = 0; first < source.size(); first += span) {
      float most = 0, error = 0;
      for (int i = 0; i < span; i++) {
        most = std::max(most, std::fabs(source[first + i]));
        error = std::max(error, std::fabs(source[first + i] - values[first + i]));
      }
      // half a step, and what the cut to bfloat16 takes; 4-bit codes end a step early on one side
      const float allowed = packing.bits == 8 ? most / 250 : most / 7.5f;
      require(error <= allowed + most / 128, "a packed weight is too far from its source");
    }
  }

  std::vector<double> multiply(const std::vector<double>& x, const Floats* bias) const {
    std::vector<double> y(rows);
    for (int row = 0; row < rows; row++) {
      double sum = bias ? (*bias)[row] : 0;
      for (int k = 0; k < columns; k++) {
        sum += x[k] * values[static_cast<size_t>(row) * columns + k];
      }
      y[row] = sum;
    }
    return y;
  }
};

// ---- a network, and the same in plain code ----

struct Features {
  int num_heads, num_kv_heads, head_dim, hidden, ffn, num_layers, vocab, window;
  bool has_biases, has_qk_norm, is_tied;
};

struct Layer {
  Matrix qkv, output, gate_up, down;
  Floats attention_norm, mlp_norm, qkv_bias, output_bias, gate_up_bias, packed_gate_up_bias;
  Floats down_bias, query_norm, key_norm;
};

using Row = std::vector<double>;

Row quantised(const Row& x, int num_terms) {
  Row y(x.size());
  for (size_t first = 0; first < x.size(); first += kGroup) {
    float most = 0;
    for (int i = 0; i < kGroup; i++) {
      most = std::max(most, std::fabs(static_cast<float>(x[first + i])));
    }
    if (most == 0) continue;
    const float inverse = 127.0f / most;
    for (int i = 0; i < kGroup; i++) {
      float scaled = static_cast<float>(x[first + i]) * inverse, step = most / 127.0f;
      for (int t = 0; t < num_terms; t++, step /= 254) {
        y[first + i] += static_cast<double>(std::nearbyint(scaled)) * step;
        scaled = (scaled - std::nearbyint(scaled)) * 254;
      }
    }
  }
  return y;
}

Row normed(const double* x, const Floats& weight, double eps) {
  double squares = 0;
  const size_t size = weight.size();
  for (size_t i = 0; i < size; i++) squares += x[i] * x[i];
  Row y(size);
  for (size_t i = 0; i < size; i++) y[i] = x[i] / std::sqrt(squares / size + eps) * weight[i];
  return y;
}

// What an adapter adds to one matrix: random spans of random ranks.
struct Change {
  std::vector<uint16_t> a, b;
  Floats scales;
  Ints spans;
  int rank = 0, columns = 0;

  void build(const Matrix& matrix) {
    if (!integer(0, 3)) return;
    columns = matrix.columns;
    rank = 4 * integer(1, 3);
    const int num_b = integer(rank, 40);
    for (float value : gaussian(static_cast<size_t>(rank) * columns, 1 / std::sqrt(columns))) {
      a.push_back(to_half(value));
    }
    for (float value : gaussian(static_cast<size_t>(num_b) * 16, 0.4f)) b.push_back(to_half(value));
    scales = gaussian(rank, 0.5f);
    for (int span = 0; span < (matrix.rows + 31) / 32 * 2; span++) {
      const int first = integer(0, rank), count = integer(0, rank - first);
      spans.insert(spans.end(), {first, count, integer(0, num_b - count)});
    }
  }

  cs_low_rank view() const {
    return {a.data(), b.data(), scales.data(), spans.data(), rank, static_cast<int>(b.size() / 16)};
  }

  // Adds to y, in the order of rows before they are packed, what belongs to x.
  void add_to(Row& y, const Row& x, bool is_gate_up = false) const {
    const int half = static_cast<int>(y.size()) / 2;
    for (int row = 0; rank && row < static_cast<int>(y.size()); row++) {
      const int at = row % half;
      const int place = is_gate_up ? at / 16 * 32 + at % 16 + row / half * 16 : row;
      const int* span = &spans[place / 16 * 3];
      for (int j = 0; j < span[1]; j++) {
        const int r = span[0] + j;
        double sum = 0;
        for (int k = 0; k < columns; k++) sum += from_half(a[r * columns + k]) * x[k];
        y[row] += sum * scales[r] * from_half(b[(span[2] + j) * 16 + place % 16]);
      }
    }
  }
};

// Of a whole network; `changes` in the interface's order.
struct Adapter {
  std::vector<Change> changes;
  cs_adapter* handle = nullptr;
  ~Adapter() { cs_adapter_destroy(handle); }
};

class Network {
 public:
  Network(const char* level, cs_team* team, Packing packing, Features features, int num_blocks)
      : f_(features), num_terms_(packing.num_terms), layers_(features.num_layers) {
    const int heads_out = f_.num_heads * f_.head_dim;
    const int qkv_rows = heads_out + 2 * f_.num_kv_heads * f_.head_dim;
    num_positions_ = num_blocks * kBlockSize;
    shape_ = {f_.hidden, f_.num_heads, f_.num_kv_heads, f_.head_dim, f_.ffn, f_.num_layers,
              f_.vocab, kMaxRows, num_positions_, kEps};
    network_ = cs_network_create(&shape_, level, team);
    pool_ = cs_pool_create(&shape_, num_blocks);
    require(network_ && pool_, "a network was refused");
    head_.build(level, team, packing, f_.vocab, f_.hidden);
    embedding_ = f_.is_tied ? head_.values : gaussian(head_.values.size(), 1);
    if (!f_.is_tied) std::fill(embedding_.end() - f_.hidden, embedding_.end(), NAN);
    norm_ = gaussian(f_.hidden, 0.2f, 1);
    build_angles();
    const cs_ends ends = {head_.handle, f_.is_tied ? nullptr : embedding_.data(), 0, norm_.data(),
                          cos_.data(), sin_.data()};
    require(cs_network_set_ends(network_, &ends) == CS_OK, "ends were refused");
    for (int i = 0; i < f_.num_layers; i++) {
      Layer& l = layers_[i];
      l.qkv.build(level, team, packing, qkv_rows, f_.hidden);
      l.output.build(level, team, packing, f_.hidden, heads_out);
      l.gate_up.build(level, team, packing, 2 * f_.ffn, f_.hidden, true);
      l.down.build(level, team, packing, f_.hidden, f_.ffn);
      build_vectors(l, qkv_rows);
      const cs_layer parts = {
          l.qkv.handle, l.output.handle, l.gate_up.handle, l.down.handle, l.attention_norm.data(),
          l.mlp_norm.data(), pointer(l.qkv_bias), pointer(l.output_bias),
          pointer(l.packed_gate_up_bias), pointer(l.down_bias), pointer(l.query_norm),
          pointer(l.key_norm), i ? f_.window : 0};
      require(cs_network_set_layer(network_, i, &parts) == CS_OK, "a layer was refused");
    }
  }
  ~Network() {
    cs_network_destroy(network_);
    cs_pool_destroy(pool_);
  }
  Network(const Network&) = delete;

  static constexpr int kMaxRows = 48;
  cs_network* handle() { return network_; }
  cs_pool* pool() { return pool_; }
  const Features& features() const { return f_; }
  // Of an embedding of its own; the last.
  int nan_token() const { return f_.vocab - 1; }

  void build(Adapter& adapter) const {
    std::vector<const Matrix*> matrices;
    for (const Layer& l : layers_) {
      matrices.insert(matrices.end(), {&l.qkv, &l.output, &l.gate_up, &l.down});
    }
    matrices.push_back(&head_);
    std::vector<cs_low_rank> views;
    adapter.changes.resize(matrices.size());
    for (size_t i = 0; i < matrices.size(); i++) adapter.changes[i].build(*matrices[i]);
    for (const Change& change : adapter.changes) views.push_back(change.view());
    adapter.handle = cs_adapter_create(&shape_, views.data());
    require(adapter.handle, "an adapter was refused");
  }

  // Logits of every position, one sequence alone.
  std::vector<Row> reference(const Ints& tokens, const Adapter* adapter) const {
    const auto change = [&](Row& y, const Row& x, int matrix, bool is_gate_up = false) {
      if (adapter) adapter->changes[matrix].add_to(y, x, is_gate_up);
    };
    std::vector<std::vector<Row>> keys(f_.num_layers), values(f_.num_layers);
    std::vector<Row> all;
    for (size_t position = 0; position < tokens.size(); position++) {
      const float* start = embedding_.data() + static_cast<size_t>(tokens[position]) * f_.hidden;
      Row x(start, start + f_.hidden);
      for (int i = 0; i < f_.num_layers; i++) {
        const Layer& l = layers_[i];
        Row input = normed(x.data(), l.attention_norm, kEps);
        Row heads = l.qkv.multiply(quantised(input, num_terms_), if_any(l.qkv_bias));
        change(heads, input, 4 * i);
        const Row mixed = attend(l, i ? f_.window : 0, heads, position, keys[i], values[i]);
        add(x, l.output.multiply(quantised(mixed, num_terms_), if_any(l.output_bias)));
        change(x, mixed, 4 * i + 1);
        input = normed(x.data(), l.mlp_norm, kEps);
        Row both = l.gate_up.multiply(quantised(input, num_terms_), if_any(l.gate_up_bias));
        change(both, input, 4 * i + 2, true);
        Row inner(f_.ffn);
        for (int k = 0; k < f_.ffn; k++) {
          inner[k] = both[k] / (1 + std::exp(-both[k])) * both[f_.ffn + k];
        }
        add(x, l.down.multiply(quantised(inner, num_terms_), if_any(l.down_bias)));
        change(x, inner, 4 * i + 3);
      }
      const Row input = normed(x.data(), norm_, kEps);
      all.push_back(head_.multiply(quantised(input, num_terms_), nullptr));
      change(all.back(), input, 4 * f_.num_layers);
    }
    return all;
  }

 private:
  static constexpr float kEps = 1e-5f;

  static const float* pointer(const Floats& values) {
    return values.empty() ? nullptr : values.data();
  }
  static const Floats* if_any(const Floats& values) { return values.empty() ? nullptr : &values; }
  static void add(Row& x, const Row& y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
  }
  static size_t padded(int rows) { return static_cast<size_t>(rows + 31) / 32 * 32; }

  void build_vectors(Layer& l, int qkv_rows) {
    l.attention_norm = gaussian(f_.hidden, 0.2f, 1);
    l.mlp_norm = gaussian(f_.hidden, 0.2f, 1);
    if (f_.has_qk_norm) {
      l.query_norm = gaussian(f_.head_dim, 0.2f, 1);
      l.key_norm = gaussian(f_.head_dim, 0.2f, 1);
    }
    if (!f_.has_biases) return;
    l.qkv_bias = gaussian(padded(qkv_rows), 0.5f);
    l.output_bias = gaussian(padded(f_.hidden), 0.5f);
    l.down_bias = gaussian(padded(f_.hidden), 0.5f);
    l.gate_up_bias = gaussian(2 * f_.ffn, 0.5f);
    l.packed_gate_up_bias.resize(2 * f_.ffn);
    for (int i = 0; i < f_.ffn; i++) {
      l.packed_gate_up_bias[i / 16 * 32 + i % 16] = l.gate_up_bias[i];
      l.packed_gate_up_bias[i / 16 * 32 + i % 16 + 16] = l.gate_up_bias[f_.ffn + i];
    }
  }

  void build_angles() {
    const int half = f_.head_dim / 2;
    for (int position = 0; position < num_positions_; position++) {
      for (int i = 0; i < half; i++) {
        const double angle = position * std::pow(10000.0, -static_cast<double>(i) / half);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }

  void rotate(double* head, const Floats& norm, size_t position) const {
    const int half = f_.head_dim / 2;
    if (!norm.empty()) {
      const Row y = normed(head, norm, kEps);
      std::copy(y.begin(), y.end(), head);
    }
    for (int i = 0; i < half; i++) {
      const double a = head[i], b = head[half + i];
      const double c = cos_[position * half + i], s = sin_[position * half + i];
      head[i] = a * c - b * s;
      head[half + i] = b * c + a * s;
    }
  }

  Row attend(const Layer& l, int window, Row& heads, size_t position, std::vector<Row>& keys,
             std::vector<Row>& values) const {
    const int dim = f_.head_dim, group = f_.num_heads / f_.num_kv_heads;
    for (int h = 0; h < f_.num_heads; h++) rotate(&heads[h * dim], l.query_norm, position);
    const auto first_key = heads.begin() + f_.num_heads * dim;
    const auto first_value = first_key + f_.num_kv_heads * dim;
    for (int k = 0; k < f_.num_kv_heads; k++) rotate(&*first_key + k * dim, l.key_norm, position);
    keys.emplace_back(first_key, first_value);
    values.emplace_back(first_value, heads.end());
    for (Row* row : {&keys.back(), &values.back()}) {
      for (double& value : *row) value = from_half(to_half(static_cast<float>(value)));
    }
    const size_t first = window && position + 1 > static_cast<size_t>(window)
                             ? position + 1 - window : 0;
    Row mixed(f_.num_heads * dim);
    for (int h = 0; h < f_.num_heads; h++) {
      const int offset = h / group * dim;
      Row weights;
      double most = -1e300, total = 0;
      for (size_t at = first; at <= position; at++) {
        double score = 0;
        for (int d = 0; d < dim; d++) score += heads[h * dim + d] * keys[at][offset + d];
        weights.push_back(score / std::sqrt(dim));
        most = std::max(most, weights.back());
      }
      for (double& weight : weights) total += weight = std::exp(weight - most);
      for (size_t at = first; at <= position; at++) {
        for (int d = 0; d < dim; d++) {
          mixed[h * dim + d] += weights[at - first] / total * values[at][offset + d];
        }
      }
    }
    return mixed;
  }

  Features f_;
  int num_terms_;
  cs_shape shape_;
  int num_positions_;
  cs_network* network_;
  cs_pool* pool_;
  Matrix head_;
  Floats embedding_, norm_, cos_, sin_;
  std::vector<Layer> layers_;
};

// ---- steps ----

struct Sequence {
  Ints tokens, blocks;
  const Adapter* adapter = nullptr;
  int num_past = 0;
  std::vector<Floats> logits;  // by position
};

// Feeds the next `counts[i]` tokens of each sequence; every array is exactly as large as it must be.
void step(Network& network, std::vector<Sequence*> sequences, const Ints& counts) {
  Ints tokens, positions, starts, rows, outputs;
  std::vector<Ints> tables;
  std::vector<const int32_t*> table_pointers;
  std::vector<const cs_adapter*> adapters;
  bool has_adapters = false;
  for (size_t i = 0; i < sequences.size(); i++) {
    const Sequence& s = *sequences[i];
    adapters.push_back(s.adapter ? s.adapter->handle : nullptr);
    has_adapters = has_adapters || s.adapter;
    starts.push_back(static_cast<int>(tokens.size()));
    rows.push_back(counts[i]);
    for (int p = s.num_past; p < s.num_past + counts[i]; p++) {
      outputs.push_back(static_cast<int>(tokens.size()));
      tokens.push_back(s.tokens[p]);
      positions.push_back(p);
    }
    const int num_blocks = (s.num_past + counts[i] - 1) / kBlockSize + 1;
    tables.emplace_back(s.blocks.begin(), s.blocks.begin() + num_blocks);
    tables.back().shrink_to_fit();
  }
  for (const Ints& table : tables) table_pointers.push_back(table.data());
  for (Ints* array : {&tokens, &positions, &starts, &rows, &outputs}) array->shrink_to_fit();
  const int vocab = network.features().vocab;
  const size_t stride = (static_cast<size_t>(vocab) + 31) / 32 * 32;
  Floats logits(stride * outputs.size());
  const cs_step input = {
      static_cast<int>(tokens.size()), static_cast<int>(starts.size()),
      static_cast<int>(outputs.size()), tokens.data(), positions.data(), starts.data(), rows.data(),
      table_pointers.data(), has_adapters ? adapters.data() : nullptr, outputs.data(),
      logits.data(), stride, nullptr, nullptr, nullptr};
  require(cs_network_forward(network.handle(), network.pool(), &input) == CS_OK, "refused a step");
  size_t row = 0;
  for (size_t i = 0; i < sequences.size(); i++) {
    for (int n = 0; n < counts[i]; n++, row++) {
      const auto first = logits.begin() + row * stride;
      sequences[i]->logits.emplace_back(first, first + vocab);
    }
    sequences[i]->num_past += counts[i];
  }
}

// Fills all blocks with keys and values that are not numbers: whoever reads too much is found out.
void spoil(Network& network, int num_blocks) {
  Sequence stale;
  for (int i = 0; i < num_blocks; i++) stale.blocks.push_back(i);
  stale.tokens.assign(num_blocks * kBlockSize, network.nan_token());
  for (int left = num_blocks * kBlockSize; left;) {
    const int count = std::min(left, Network::kMaxRows);
    step(network, {&stale}, {count});
    left -= count;
  }
  for (const Floats& row : stale.logits) {
    for (float logit : row) require(std::isnan(logit), "a number came out of none");
  }
}

void check_against_reference(const Network& network, const Sequence& s, const std::string& where) {
  const std::vector<Row> expected = network.reference(s.tokens, s.adapter);
  double worst = 0, total = 0;
  for (size_t row = 0; row < expected.size(); row++) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < expected[row].size(); i++) {
      difference += std::pow(expected[row][i] - s.logits[row][i], 2);
      size += std::pow(expected[row][i], 2);
    }
    const double error = std::sqrt(difference / size);
    worst = std::max(worst, std::isfinite(error) ? error : INFINITY);
    total += error;
  }
  // what codes amount to that round the other way; anything wrong gives errors near 1
  require(worst < 0.1 && total / expected.size() < 0.03,
          where + ": logits are " + std::to_string(worst) + " from the reference");
}

// The largest logit of each row, picked by the threads that compute the rows.
void check_picking_ahead(const char* level, cs_team* team, Network& network,
                         const Sequence& s) {
  const int vocab = network.features().vocab, rows = static_cast<int>(s.tokens.size());
  const size_t stride = (static_cast<size_t>(vocab) + 31) / 32 * 32;
  cs_sampler* sampler = cs_sampler_create(level, team, vocab, nullptr, 0);
  require(sampler, "a sampler was refused");
  cs_sampling greedy{};
  greedy.is_greedy = 1;
  Ints outputs(rows), positions(rows), out(rows);
  for (int i = 0; i < rows; i++) outputs[i] = positions[i] = i;
  std::vector<const cs_sampling*> samplings(rows, &greedy);
  const int32_t start = 0;
  const int32_t* table = s.blocks.data();
  Floats logits(stride * rows);
  const cs_step input = {rows, 1, rows, s.tokens.data(), positions.data(), &start, &rows, &table,
                         nullptr, outputs.data(), logits.data(), stride, sampler, samplings.data(),
                         out.data()};
  require(cs_network_forward(network.handle(), network.pool(), &input) == CS_OK, "refused a step");
  for (int i = 0; i < rows; i++) {
    const auto row = logits.begin() + stride * i;
    require(out[i] == std::max_element(row, row + vocab) - row, "another token was picked ahead");
  }
  cs_sampler_destroy(sampler);
}

void check_network(const char* level, Packing packing, Features features) {
  std::ostringstream name;
  name << level << ", " << packing.bits << " bits" << (packing.scaling == 3 ? " centred" : packing.scaling == 2 ? " affine" : packing.scaling ? " grouped" : "")
       << (packing.num_terms == 2 ? " fine" : "") << ", "
       << features.num_heads << " heads on " << features.num_kv_heads << " of "
       << features.head_dim;
  cs_team* team = cs_team_create(2);
  require(team, "no team");
  {
    constexpr int kNumBlocks = 8;
    Network network(level, team, packing, features, kNumBlocks);
    Ints ids(kNumBlocks);
    for (int i = 0; i < kNumBlocks; i++) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), draw);
    if (!features.is_tied) spoil(network, kNumBlocks);
    Adapter adapters[2];
    for (Adapter& adapter : adapters) network.build(adapter);
    std::vector<Sequence> batched(3);
    const int lengths[] = {70, 33, 5};
    for (int i = 0; i < 3; i++) {
      for (int n = 0; n < lengths[i]; n++) batched[i].tokens.push_back(integer(0, features.vocab - 2));
      for (int b = 0; b < 3; b++) batched[i].blocks.push_back(ids[(i * 3 + b) % kNumBlocks]);
      if (i) batched[i].adapter = &adapters[i - 1];
    }
    std::vector<Sequence> alone = batched;
    for (bool is_done = false; !is_done;) {
      std::vector<Sequence*> some;
      Ints counts;
      int room = Network::kMaxRows;
      is_done = true;
      for (Sequence& s : batched) {
        const int left = static_cast<int>(s.tokens.size()) - s.num_past;
        if (left) is_done = false;
        if (!left || !room || !integer(0, 3)) continue;
        counts.push_back(integer(1, std::min({left, room, integer(0, 1) ? 4 : 40})));
        room -= counts.back();
        some.push_back(&s);
      }
      if (!some.empty()) step(network, some, counts);
    }
    for (const Sequence& s : batched) check_against_reference(network, s, name.str());
    for (int i = 0; i < 3; i++) {
      require(cs_network_set_threads(network.handle(), 1 + i) == CS_OK, "refused threads");
      require(cs_network_set_prefetch(network.handle(), i * 4096, i * 2048) == CS_OK, "refused a prefetch");
      while (alone[i].num_past < lengths[i]) step(network, {&alone[i]}, {1});
      for (int row = 0; row < lengths[i]; row++) {
        require(!std::memcmp(alone[i].logits[row].data(), batched[i].logits[row].data(),
                             features.vocab * sizeof(float)),
                name.str() + ": row " + std::to_string(row) + " has other bits alone");
      }
    }
    check_picking_ahead(level, team, network, alone[1]);
    require(cs_pool_copy_block(network.pool(), 0, kNumBlocks - 1) == CS_OK, "refused a copy");
  }
  cs_team_destroy(team);
  std::printf("%s: ok\n", name.str().c_str());
}

// Products of one weight: integer sums are exact and every group is rounded alike, so that all levels
// give the same bits, for any number of rows.
void check_products(const std::vector<std::string>& levels, Packing packing) {
  // a row of codes is longer than what buffers leave behind their end: reading one too many is found
  constexpr int kRows = 96, kColumns = 352, kMaxRows = 20;
  cs_team* team = cs_team_create(2);
  const Floats weight = gaussian(kRows * kColumns, 1), x = gaussian(kMaxRows * kColumns, 1);
  std::vector<Floats> expected;
  for (const std::string& level : levels) {
    cs_matrix* matrix =
        cs_matrix_create(level.c_str(), kRows, kColumns, packing.bits, packing.scaling,
                         packing.num_terms);
    require(team && matrix &&
                cs_matrix_load(matrix, team, 0, kRows, weight.data(), 0, 0) == CS_OK,
            "a matrix was refused");
    for (int num_rows = 1; num_rows <= kMaxRows; num_rows++) {
      Floats y(static_cast<size_t>(num_rows) * kRows);
      require(cs_matrix_multiply(matrix, team, x.data(), num_rows, y.data()) == CS_OK,
              "a product was refused");
      if (level == levels.front()) expected.push_back(y);
      require(!std::memcmp(y.data(), expected[num_rows - 1].data(), y.size() * sizeof(float)),
              level + " and " + levels.front() + ": other bits in a product of " +
                  std::to_string(num_rows) + " rows by " + std::to_string(packing.bits) + " bits");
    }
    cs_matrix_destroy(matrix);
  }
  cs_team_destroy(team);
}

// Draws tokens from rows of logits of every kind; only where they may lie is checked.
void check_sampler(const char* level) {
  constexpr int kVocab = 3001, kRows = 5;
  cs_team* team = cs_team_create(2);
  const Ints forbidden = {7, 2999};
  cs_sampler* sampler = cs_sampler_create(level, team, kVocab, forbidden.data(), 2);
  require(sampler, "a sampler was refused");
  for (int round = 0; round < 40; round++) {
    Floats logits = gaussian(kVocab * kRows, integer(0, 1) ? 0.1f : 5.0f);
    std::vector<cs_sampling> params(kRows);
    std::vector<const cs_sampling*> rows;
    const Ints seen = {1, 5, 3000}, offset_ids = {2, 9};
    const Floats offsets = {-3.0f, 4.0f};
    // exactly as many words as the vocabulary needs, so that a read behind them is seen
    std::vector<uint32_t> allowed((kVocab + 31) / 32);
    for (uint32_t& word : allowed) word = integer(0, 2) ? ~0u : integer(0, 1) ? 0u : 0x5a5a0f01u;
    allowed[10] = 3;
    for (cs_sampling& p : params) {
      p = {0.1 + integer(0, 20) * 0.1, integer(0, 1) ? 1.0 : 0.9, integer(0, 1) ? -INFINITY : -2.0,
           static_cast<uint64_t>(round), integer(0, 100), 50, seen.data(), offset_ids.data(),
           offsets.data(), forbidden.data(), integer(0, 1) ? allowed.data() : nullptr, 3, 2, 2, integer(0, 1) * 40, integer(0, 3) == 0, 1.1f};
      rows.push_back(&p);
    }
    Ints out(kRows);
    require(cs_sampler_sample(sampler, logits.data(), kVocab, kRows, nullptr, rows.data(), kRows,
                              out.data()) == CS_OK, "a sample was refused");
    for (int r = 0; r < kRows; r++) {
      const int id = out[r];
      require(id >= 0 && id < kVocab && id != 7 && id != 2999, "a forbidden token");
      const uint32_t* words = params[r].allowed;
      require(!words || words[id / 32] >> id % 32 & 1, "a token that is not allowed");
    }
    const Ints num_tops = {0, 1, 20, 5, 20};
    Floats told(kRows * 21);
    Ints tops(kRows * 20);
    require(cs_sampler_logprobs(sampler, logits.data(), kVocab, kRows, nullptr, rows.data(),
                                out.data(), num_tops.data(), kRows, 20, told.data(),
                                tops.data()) == CS_OK, "logprobs were refused");
    for (int r = 0; r < kRows; r++) {
      require(told[21 * r] <= 1e-5f && std::isfinite(told[21 * r]), "a strange logprob");
      for (int i = 0; i < 20; i++) {
        const int id = tops[20 * r + i];
        require(id >= -1 && id < kVocab && (i < num_tops[r] || id == -1), "a strange top");
      }
    }
  }
  cs_sampler_destroy(sampler);
  cs_team_destroy(team);
  std::printf("%s, sampler: ok\n", level);
}

}  // namespace

int main(int num_words, char** words) {
  std::istringstream names(cs_levels());
  std::vector<std::string> levels;
  for (std::string level; names >> level;) levels.push_back(level);
  if (num_words == 2 && std::string(words[1]) == "levels") {
    std::printf("%s\n", cs_levels());
    return 0;
  }
  require(!levels.empty(), "this processor has no level");
  // every packing and every network at every level, but not every pair of them
  const bool is_quick = num_words == 2 && std::string(words[1]) == "quick";
  const Features networks[] = {
      {4, 2, 16, 64, 96, 2, 101, 0, false, false, false},
      {9, 3, 64, 96, 64, 2, 33, 20, false, false, true},
      {2, 1, 80, 32, 160, 2, 64, 0, true, true, false},
      {14, 2, 32, 64, 32, 2, 50, 33, true, false, true},
  };
  const Packing packings[] = {{8, 0, 1}, {8, 1, 1}, {8, 1, 2}, {4, 1, 1}, {4, 2, 1}, {4, 3, 1}};
  for (const Packing packing : packings) check_products(levels, packing);
  for (size_t level = 0; level < levels.size(); level++) {
    for (size_t p = 0; p < std::size(packings); p++) {
      for (size_t n = 0; n < std::size(networks); n++) {
        if (is_quick && (level + p + n) % std::size(networks)) continue;
        check_network(levels[level].c_str(), packings[p], networks[n]);
      }
    }
    check_sampler(levels[level].c_str());
  }
  return 0;
}
