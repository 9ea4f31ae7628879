// Matrix products of packed weights and quantised rows, from tiles. Included by level_kernels.h.
#pragma once

namespace {

// Most activation rows that one tile takes.
constexpr int kMostRows = Simd::kHasMatrixProduct ? Simd::kMaxTile : kMaxWideRows;

template <int M, int BITS, Scaling SCALING, bool AHEAD>
inline void multiply_rows(const Matrix& w, int panel, const Activations& a, size_t ahead,
                          float (*tile)[kPanelRows]) {
  if constexpr (M > Simd::kMaxTile) {
    multiply_wide<M, BITS, SCALING, AHEAD>(w, panel, a, ahead, tile);
  } else {
    for (int part = 0; part < (M == 1 ? 1 : Simd::kParts); part++) {
      if constexpr (M > 1 && Simd::kHasMatrixProduct) {
        multiply_pairs<Simd, M, BITS, SCALING, AHEAD>(w, panel, part, a, ahead, tile);
      } else {
        multiply_tile<M, BITS, SCALING, AHEAD>(w, panel, part, a, ahead, tile);
      }
    }
  }
}

template <int BITS, Scaling SCALING, bool AHEAD>
inline void multiply_panel(const Matrix& w, int panel, int num_rows, const Activations& a,
                           size_t ahead, float (*tile)[kPanelRows]) {
  switch (num_rows) {
#define CS_CASE(n)                                                                               \
  case n:                                                                                        \
    if constexpr (n <= kMostRows) multiply_rows<n, BITS, SCALING, AHEAD>(w, panel, a, ahead, tile); \
    break;
    CS_CASE(1) CS_CASE(2) CS_CASE(3) CS_CASE(4) CS_CASE(5) CS_CASE(6) CS_CASE(7) CS_CASE(8)
    CS_CASE(9) CS_CASE(10) CS_CASE(11) CS_CASE(12) CS_CASE(13) CS_CASE(14) CS_CASE(15) CS_CASE(16)
#undef CS_CASE
  }
}

inline void finish_row(const Output& to, size_t row, int panel, const float* tile) {
  if (to.epilogue == Epilogue::swiglu) {
    constexpr int half = kPanelRows / 2;
    float* out = to.out + row * to.stride + panel * half;
    for (int i = 0; i < half; i += kLanes) {
      F gate = Simd::load(tile + i), up = Simd::load(tile + half + i);
      if (to.bias) {
        gate = Simd::add(gate, Simd::load(to.bias + panel * kPanelRows + i));
        up = Simd::add(up, Simd::load(to.bias + panel * kPanelRows + half + i));
      }
      F divisor = Simd::add(Simd::set1(1.0f), exponential(Simd::sub(Simd::zero(), gate)));
      Simd::store(out + i, Simd::mul(Simd::div(gate, divisor), up));
    }
    return;
  }
  float* out = to.out + row * to.stride + panel * kPanelRows;
  for (int i = 0; i < kPanelRows; i += kLanes) {
    F v = Simd::load(tile + i);
    if (to.bias) v = Simd::add(v, Simd::load(to.bias + panel * kPanelRows + i));
    if (to.epilogue == Epilogue::add) v = Simd::add(v, Simd::load(out + i));
    Simd::store(out + i, v);
  }
}

inline void add_tile_row(float* row, const float* other) {
  for (int i = 0; i < kPanelRows; i += kLanes) {
    Simd::store(row + i, Simd::add(Simd::load(row + i), Simd::load(other + i)));
  }
}

// Not inlined: what adapters need must not change the code of products without them.
[[gnu::noinline]] void add_deltas(const float* const* deltas, int num_rows, int terms,
                                  float (*tile)[kPanelRows]) {
  for (int m = 0; m < num_rows; m++) {
    if (deltas[m]) add_tile_row(tile[terms * m], deltas[m]);
  }
}

template <int BITS, Scaling SCALING>
void multiply_range(const Matrix& w, const Activations& a, int num_rows, int first_panel,
                    int last_panel, size_t ahead, const Output& to) {
  alignas(64) float tile[kMostRows][kPanelRows];
  const int terms = w.num_terms;
  // few rows wait for the weights, which are read once; many for the sums, which stay in registers
  const bool is_wide = terms * num_rows <= kMostRows;
  const int most = (is_wide ? kMostRows : Simd::kMaxTile) / terms;
  const int num_blocks = (num_rows + most - 1) / most;
  for (int panel = first_panel; panel < last_panel; panel++) {
    for (int block = 0; block < num_blocks; block++) {
      const long begin = static_cast<long>(num_rows) * block / num_blocks;
      const long end = static_cast<long>(num_rows) * (block + 1) / num_blocks;
      const long first = begin * terms;
      Activations part = {a.stride, a.codes + first * a.stride, a.scales + first * w.groups,
                          a.corrections + first * w.groups};
      const int count = static_cast<int>(end - begin);
      // the second pass over a panel finds it in the cache and has time to fetch the next one
      const size_t reach = block == 1 ? w.panel_bytes : is_wide ? ahead : 0;
      if (reach) {
        multiply_panel<BITS, SCALING, true>(w, panel, terms * count, part, reach, tile);
      } else {
        multiply_panel<BITS, SCALING, false>(w, panel, terms * count, part, 0, tile);
      }
      if (to.deltas) add_deltas(to.deltas + begin, count, terms, tile);
      for (int m = 0; m < count; m++) {
        float* row = tile[terms * m];
        if (terms == 2) add_tile_row(row, row + kPanelRows);
        finish_row(to, begin + m, panel, row);
      }
    }
  }
}

void multiply(const Matrix& w, const Activations& a, int num_rows, int first_panel, int last_panel,
              size_t ahead, const Output& to) {
  if (w.scaling == Scaling::affine) {
    multiply_range<4, Scaling::affine>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else if (w.scaling == Scaling::centred) {
    multiply_range<4, Scaling::centred>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else if (w.bits == 4) {
    multiply_range<4, Scaling::group>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else if (w.scaling == Scaling::group) {
    multiply_range<8, Scaling::group>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else {
    multiply_range<8, Scaling::row>(w, a, num_rows, first_panel, last_panel, ahead, to);
  }
}

}  // namespace
