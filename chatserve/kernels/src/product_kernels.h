// Matrix products of packed weights and quantised rows, over the level's `Simd`. Included by level_kernels.h.
#pragma once

namespace {

inline I broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, 4);
  return Simd::iset1(word);
}

// M activation rows times the rows [part] of one panel -> tile[M][kPanelRows].
template <int M, int BITS, bool GROUPED, bool PREFETCH>
inline void multiply_tile(const Matrix& w, int panel, int part, const Activations& a, size_t ahead,
                          float (*tile)[kPanelRows]) {
  constexpr int kParts = M == 1 ? 1 : Simd::kParts;
  constexpr int kVectors = kPanelRows / kLanes / kParts;
  constexpr int kChains = M == 1 ? Simd::kMaxChains : M == 2 ? (Simd::kMaxChains + 1) / 2 : 1;
  const int columns = w.columns, groups = w.groups;
  const int first = part * kVectors * kLanes;  // row within the panel
  const uint8_t* codes = w.codes + w.panel_bytes * panel + 4 * first;
  const uint16_t* halves =
      GROUPED ? w.group_scales + static_cast<size_t>(panel) * groups * kPanelRows + first : nullptr;
  F sums[M][kVectors];
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) sums[m][v] = Simd::zero();
  }
  for (int g = 0; g < groups; g++) {
    I acc[kChains][M][kVectors];
    CS_UNROLL for (int m = 0; m < M; m++) {
      I start = Simd::iset1(a.corrections[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        acc[0][m][v] = start;
        CS_UNROLL for (int c = 1; c < kChains; c++) acc[c][m][v] = Simd::izero();
      }
    }
    const int8_t* x = a.codes + g * kGroup;
    constexpr int kColumns = BITS == 8 ? 4 : 8;  // of one chunk of codes
    constexpr int kStep = BITS == 8 ? kChains : (kChains + 1) / 2;
    for (int k = 0; k < kGroup; k += kColumns * kStep) {
      CS_UNROLL for (int s = 0; s < kStep; s++) {
        I weights[kVectors];
        CS_UNROLL for (int v = 0; v < kVectors; v++) {
          weights[v] = Simd::load_codes(codes + 4 * kLanes * v);
          if (PREFETCH) Simd::prefetch_l2(codes + 4 * kLanes * v + ahead);
        }
        codes += 4 * kPanelRows;
        const int8_t* xs = x + k + kColumns * s;
        if (BITS == 8) {
          CS_UNROLL for (int m = 0; m < M; m++) {
            I b = broadcast(xs + static_cast<size_t>(m) * columns);
            CS_UNROLL for (int v = 0; v < kVectors; v++) {
              acc[s % kChains][m][v] = Simd::dot8(acc[s % kChains][m][v], weights[v], b);
            }
          }
        } else {
          constexpr int kOther = kChains > 1 ? 1 : 0;
          CS_UNROLL for (int v = 0; v < kVectors; v++) {
            I low = Simd::low_codes(weights[v]), high = Simd::high_codes(weights[v]);
            CS_UNROLL for (int m = 0; m < M; m++) {
              const int8_t* xm = xs + static_cast<size_t>(m) * columns;
              I& one = acc[2 * s % kChains][m][v];
              one = Simd::dot4(one, low, broadcast(xm));
              I& two = acc[(2 * s + kOther) % kChains][m][v];
              two = Simd::dot4(two, high, broadcast(xm + 4));
            }
          }
        }
      }
    }
    CS_UNROLL for (int m = 0; m < M; m++) {
      F scale = Simd::set1(a.scales[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        I sum = acc[0][m][v];
        CS_UNROLL for (int c = 1; c < kChains; c++) sum = Simd::iadd(sum, acc[c][m][v]);
        F both = scale;
        if (GROUPED) {
          both = Simd::mul(scale, Simd::load_half(halves + g * kPanelRows + v * kLanes));
        }
        sums[m][v] = Simd::fma(Simd::to_float(sum), both, sums[m][v]);
      }
    }
  }
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F sum = sums[m][v];
      if (!GROUPED) {
        sum = Simd::mul(sum, Simd::load(w.row_scales + panel * kPanelRows + first + v * kLanes));
      }
      Simd::store(tile[m] + first + v * kLanes, sum);
    }
  }
}

template <int BITS, bool GROUPED, bool PREFETCH>
inline void multiply_panel(const Matrix& w, int panel, int num_rows, const Activations& a,
                           size_t ahead, float (*tile)[kPanelRows]) {
  for (int part = 0; part < (num_rows == 1 ? 1 : Simd::kParts); part++) {
    switch (num_rows) {
#define CS_CASE(n)                                                                \
  case n:                                                                         \
    if constexpr (n <= Simd::kMaxTile)                                            \
      multiply_tile<n, BITS, GROUPED, PREFETCH>(w, panel, part, a, ahead, tile);         \
    break;
      CS_CASE(1) CS_CASE(2) CS_CASE(3) CS_CASE(4) CS_CASE(5) CS_CASE(6)
#undef CS_CASE
    }
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

template <int BITS, bool GROUPED>
void multiply_range(const Matrix& w, const Activations& a, int num_rows, int first_panel,
                    int last_panel, size_t ahead, const Output& to) {
  alignas(64) float tile[Simd::kMaxTile][kPanelRows];
  const int num_blocks = (num_rows + Simd::kMaxTile - 1) / Simd::kMaxTile;
  for (int panel = first_panel; panel < last_panel; panel++) {
    for (int block = 0; block < num_blocks; block++) {
      const long begin = static_cast<long>(num_rows) * block / num_blocks;
      const long end = static_cast<long>(num_rows) * (block + 1) / num_blocks;
      Activations part = {a.codes + begin * w.columns, a.scales + begin * w.groups,
                          a.corrections + begin * w.groups};
      const int count = static_cast<int>(end - begin);
      // the second pass over a panel finds it in the cache and has time to fetch the next one
      const size_t reach = block == 1 ? w.panel_bytes : num_blocks == 1 ? ahead : 0;
      if (reach) {
        multiply_panel<BITS, GROUPED, true>(w, panel, count, part, reach, tile);
      } else {
        multiply_panel<BITS, GROUPED, false>(w, panel, count, part, 0, tile);
      }
      for (int m = 0; m < count; m++) finish_row(to, begin + m, panel, tile[m]);
    }
  }
}

void multiply(const Matrix& w, const Activations& a, int num_rows, int first_panel, int last_panel,
              size_t ahead, const Output& to) {
  if (w.bits == 4) {
    multiply_range<4, true>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else if (w.is_grouped) {
    multiply_range<8, true>(w, a, num_rows, first_panel, last_panel, ahead, to);
  } else {
    multiply_range<8, false>(w, a, num_rows, first_panel, last_panel, ahead, to);
  }
}

}  // namespace
