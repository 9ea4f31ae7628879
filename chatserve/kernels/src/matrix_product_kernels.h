// Tiles of a matrix product by products of two activation rows with two output rows of eight columns,
// for levels that have it. Included by level_kernels.h.
#pragma once

namespace {

// The row beside an even row; the last of an odd number stands beside itself, and that half of its
// products is left.
template <int M>
constexpr int partner(int even) {
  return even + 1 < M ? even + 1 : even;
}

// What `multiply_tile` does, to the bit, for two rows or more. `S` is the level's `Simd`: a parameter,
// so that it compiles only where `kHasMatrixProduct`.
template <class S, int M, int BITS, Scaling SCALING, bool AHEAD>
inline void multiply_pairs(const Matrix& w, int panel, int part, const Activations& a, size_t ahead,
                           float (*tile)[kPanelRows]) {
  constexpr int kPairs = (M + 1) / 2;
  constexpr int kVectors = kPanelRows / kLanes / S::kParts;
  constexpr int kColumns = 8;  // of one product
  const int groups = w.groups;
  const int first = part * kVectors * kLanes;  // row within the panel
  const uint8_t* codes = w.codes + w.panel_bytes * panel + 4 * first;
  const uint16_t* halves =
      is_grouped(SCALING)
          ? w.group_scales + static_cast<size_t>(panel) * groups * group_halves(SCALING) + first
          : nullptr;
  F sums[M][kVectors];
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) sums[m][v] = S::zero();
  }
  for (int g = 0; g < groups; g++) {
    I rows01[kPairs][kVectors], rows23[kPairs][kVectors];
    CS_UNROLL for (int p = 0; p < kPairs; p++) {
      const int even = 2 * p, odd = partner<M>(even);
      I start = S::start_pair(start_of<SCALING>(a.corrections[even * groups + g]),
                              start_of<SCALING>(a.corrections[odd * groups + g]));
      CS_UNROLL for (int v = 0; v < kVectors; v++) rows01[p][v] = rows23[p][v] = start;
    }
    for (int k = g * kGroup; k < (g + 1) * kGroup; k += kColumns) {
      I x[kPairs];
      CS_UNROLL for (int p = 0; p < kPairs; p++) {
        const int even = 2 * p, odd = partner<M>(even);
        x[p] = S::load_pair(a.codes + even * a.stride + k,
                            a.codes + odd * a.stride + k);
      }
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        const uint8_t* at = codes + 4 * kLanes * v;
        if (AHEAD) S::prefetch_l2(at + ahead);
        I near = S::load_codes(at), far;
        if (BITS == 8) {
          far = S::load_codes(at + 4 * kPanelRows);
          if (AHEAD) S::prefetch_l2(at + 4 * kPanelRows + ahead);
        } else {
          far = S::high_codes(near);
          near = S::low_codes(near);
        }
        I weights01 = S::rows01(near, far), weights23 = S::rows23(near, far);
        CS_UNROLL for (int p = 0; p < kPairs; p++) {
          rows01[p][v] = S::product(rows01[p][v], x[p], weights01);
          rows23[p][v] = S::product(rows23[p][v], x[p], weights23);
        }
      }
      codes += (BITS == 8 ? 2 : 1) * 4 * kPanelRows;
    }
    CS_UNROLL for (int m = 0; m < M; m++) {
      const RowFactors<SCALING> row(a.scales[m * groups + g], a.corrections[m * groups + g]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        const uint16_t* half = is_grouped(SCALING) ? halves + g * group_halves(SCALING) + v * kLanes : nullptr;
        I sum = m % 2 ? S::sums_of_b(rows01[m / 2][v], rows23[m / 2][v])
                      : S::sums_of_a(rows01[m / 2][v], rows23[m / 2][v]);
        sums[m][v] = add_group<SCALING>(sums[m][v], sum, row, half);
      }
    }
  }
  CS_UNROLL for (int m = 0; m < M; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      F sum = sums[m][v];
      if (has_row_scales(SCALING)) {
        sum = S::mul(sum, S::load(w.row_scales + panel * kPanelRows + first + v * kLanes));
      }
      S::store(tile[m] + first + v * kLanes, sum);
    }
  }
}

}  // namespace
