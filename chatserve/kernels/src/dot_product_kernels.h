// Tiles of a matrix product by dot products of four columns, over the level's `Simd`. Included by
// level_kernels.h.
#pragma once

namespace {

inline I broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, 4);
  return Simd::iset1(word);
}

// Compilers move the fetches of a whole group to its start, where they fill the few places for lines
// on their way and everything waits: 20 GB/s instead of 30 were seen with eight rows.
inline void keep_order() { asm volatile("" ::: "memory"); }

constexpr bool is_grouped(Scaling scaling) { return scaling != Scaling::row; }

// Whether codes count from 0, and what they count from enters by the sum of the activations.
constexpr bool has_floor(Scaling scaling) {
  return scaling == Scaling::affine || scaling == Scaling::centred;
}

// What the sums of a group start with.
template <Scaling SCALING>
inline int32_t start_of(int32_t correction) {
  return has_floor(SCALING) ? 0 : correction;
}

// What one activation row gives to a group: the scale of its codes, and their sum, which minima or
// zero points are multiplied with: scaled for the ones, in steps of the others.
template <Scaling SCALING>
struct RowFactors {
  F scale, sum;

  RowFactors(float row_scale, int32_t correction) : scale(Simd::set1(row_scale)) {
    constexpr float kPerCode = -1.0f / Simd::kOffset4;
    if (SCALING == Scaling::affine) {
      sum = Simd::set1(row_scale * (static_cast<float>(correction) * kPerCode));
    } else if (SCALING == Scaling::centred) {
      sum = Simd::set1(static_cast<float>(correction) * (-kPerCode / kZeroSteps));
    }
  }
};

// A group's exact sums added to those of the groups before. `halves`: scales of the output rows where
// weights are grouped, then their minima, or with their zero points. Tiles of every kind use it: a row has the same bits in all.
template <Scaling SCALING>
inline F add_group(F total, I sum, const RowFactors<SCALING>& row, const uint16_t* halves) {
  if (SCALING == Scaling::centred) {
    F scale, zero;
    Simd::load_bytes(halves, &scale, &zero);
    return Simd::fma(Simd::fma(zero, row.sum, Simd::to_float(sum)), Simd::mul(row.scale, scale), total);
  }
  F scale = is_grouped(SCALING) ? Simd::mul(row.scale, Simd::load_half(halves)) : row.scale;
  total = Simd::fma(Simd::to_float(sum), scale, total);
  if (SCALING != Scaling::affine) return total;
  return Simd::fma(row.sum, Simd::load_half(halves + kPanelRows), total);
}

// M activation rows times the rows [part] of one panel -> tile[M][kPanelRows].
template <int M, int BITS, Scaling SCALING, bool AHEAD>
inline void multiply_tile(const Matrix& w, int panel, int part, const Activations& a, size_t ahead,
                          float (*tile)[kPanelRows]) {
  constexpr int kParts = M == 1 ? 1 : Simd::kParts;
  constexpr int kVectors = kPanelRows / kLanes / kParts;
  constexpr int kChains = M == 1 ? Simd::kMaxChains : M == 2 ? (Simd::kMaxChains + 1) / 2 : 1;
  const int groups = w.groups;
  const int first = part * kVectors * kLanes;  // row within the panel
  const uint8_t* codes = w.codes + w.panel_bytes * panel + 4 * first;
  const uint16_t* halves =
      is_grouped(SCALING)
          ? w.group_scales + static_cast<size_t>(panel) * groups * group_halves(SCALING) + first
          : nullptr;
  F sums[M][kVectors];
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) sums[m][v] = Simd::zero();
  }
  for (int g = 0; g < groups; g++) {
    I acc[kChains][M][kVectors];
    CS_UNROLL for (int m = 0; m < M; m++) {
      I start = Simd::iset1(start_of<SCALING>(a.corrections[m * groups + g]));
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
          if (AHEAD) Simd::prefetch_l2(codes + 4 * kLanes * v + ahead);
        }
        codes += 4 * kPanelRows;
        if (AHEAD) keep_order();
        const int8_t* xs = x + k + kColumns * s;
        if (BITS == 8) {
          CS_UNROLL for (int m = 0; m < M; m++) {
            I b = broadcast(xs + m * a.stride);
            CS_UNROLL for (int v = 0; v < kVectors; v++) {
              acc[s % kChains][m][v] = Simd::dot8(acc[s % kChains][m][v], weights[v], b);
            }
          }
        } else {
          constexpr int kOther = kChains > 1 ? 1 : 0;
          CS_UNROLL for (int v = 0; v < kVectors; v++) {
            I low = Simd::low_codes(weights[v]), high = Simd::high_codes(weights[v]);
            CS_UNROLL for (int m = 0; m < M; m++) {
              const int8_t* xm = xs + m * a.stride;
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
      const RowFactors<SCALING> row(a.scales[m * groups + g], a.corrections[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        I sum = acc[0][m][v];
        CS_UNROLL for (int c = 1; c < kChains; c++) sum = Simd::iadd(sum, acc[c][m][v]);
        const uint16_t* half = is_grouped(SCALING) ? halves + g * group_halves(SCALING) + v * kLanes : nullptr;
        sums[m][v] = add_group<SCALING>(sums[m][v], sum, row, half);
      }
    }
  }
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F sum = sums[m][v];
      if (has_row_scales(SCALING)) {
        sum = Simd::mul(sum, Simd::load(w.row_scales + panel * kPanelRows + first + v * kLanes));
      }
      Simd::store(tile[m] + first + v * kLanes, sum);
    }
  }
}

}  // namespace
