// Tiles of many activation rows that read the weights once, from memory: all rows of a group are done
// while it is at hand, and the sums of groups lie in the tile. Included by level_kernels.h.
#pragma once

namespace {

// Rows side by side in memory, addressed as one to three strides from every fourth: compilers keep a
// pointer for each row otherwise, more than there are registers. Hiding the addresses from them also
// keeps them from loading for one group of rows what belongs to another.
template <class T>
struct Rows {
  const T *first, *fifth;
  size_t stride, three;

  Rows(const T* start, size_t row_stride)
      : first(start), fifth(start + 4 * row_stride), stride(row_stride), three(3 * row_stride) {
    asm("" : "+r"(first), "+r"(fifth), "+r"(stride), "+r"(three));
  }
  const T* operator[](int m) const {
    const T* start = m < 4 ? first : fifth;
    return m % 4 == 3 ? start + three : start + stride * (m % 4);
  }
};

// One group of columns: S activation rows from `row` on times a part of the output rows. Of `SHARES`
// blocks of rows that read the same weights this one is number `SHARE`, and fetches that share of those
// to come; 0 blocks fetch nothing.
template <int S, int BITS, Scaling SCALING, int SHARE, int SHARES>
inline void add_products(const uint8_t* codes, const uint16_t* halves, const Activations& a, int row,
                         int group, int groups, size_t ahead, float (*tile)[kPanelRows]) {
  static_assert(S <= 8, "Rows addresses eight");
  constexpr int kVectors = kPanelRows / kLanes / Simd::kParts;
  constexpr int kColumns = BITS == 8 ? 4 : 8;  // of one chunk of codes
  const size_t first = static_cast<size_t>(row) * groups + group;
  const Rows<int8_t> x(a.codes + row * a.stride + group * kGroup, a.stride);
  const Rows<int32_t> corrections(a.corrections + first, groups);
  I acc[S][kVectors];
  CS_UNROLL for (int m = 0; m < S; m++) {
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      acc[m][v] = Simd::iset1(start_of<SCALING>(*corrections[m]));
    }
  }
  CS_UNROLL for (int k = 0; k < kGroup; k += kColumns) {
    I weights[kVectors];
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      weights[v] = Simd::load_codes(codes + 4 * kLanes * v);
      if (SHARES && (k / kColumns * kVectors + v) % SHARES == SHARE) {
        Simd::prefetch_l2(codes + 4 * kLanes * v + ahead);
      }
    }
    codes += 4 * kPanelRows;
    if (SHARES) keep_order();
    CS_UNROLL for (int part = 0; part < kColumns / 4; part++) {
      I side[kVectors];
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        side[v] = BITS == 8 ? weights[v]
                            : part ? Simd::high_codes(weights[v]) : Simd::low_codes(weights[v]);
      }
      CS_UNROLL for (int m = 0; m < S; m++) {
        I b = broadcast(x[m] + k + 4 * part);
        CS_UNROLL for (int v = 0; v < kVectors; v++) {
          acc[m][v] = BITS == 8 ? Simd::dot8(acc[m][v], side[v], b)
                                : Simd::dot4(acc[m][v], side[v], b);
        }
      }
    }
  }
  const Rows<float> scales(a.scales + first, groups);
  CS_UNROLL for (int m = 0; m < S; m++) {
    const RowFactors<SCALING> factors(*scales[m], *corrections[m]);
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      float* sum = tile[row + m] + v * kLanes;
      const uint16_t* half = is_grouped(SCALING) ? halves + v * kLanes : nullptr;
      Simd::store(sum, add_group<SCALING>(Simd::load(sum), acc[m][v], factors, half));
    }
  }
}

// All blocks of M rows from block B on, of equal size or one row fewer.
template <int M, int BITS, Scaling SCALING, bool AHEAD, int B>
inline void add_blocks(const uint8_t* codes, const uint16_t* halves, const Activations& a, int group,
                       int groups, size_t ahead, float (*tile)[kPanelRows]) {
  constexpr int kBlocks = (M + Simd::kWideTile - 1) / Simd::kWideTile;
  constexpr int kFirst = M * B / kBlocks, kEnd = M * (B + 1) / kBlocks;
  add_products<kEnd - kFirst, BITS, SCALING, B, AHEAD ? kBlocks : 0>(codes, halves, a, kFirst, group,
                                                                   groups, ahead, tile);
  if constexpr (B + 1 < kBlocks) {
    add_blocks<M, BITS, SCALING, AHEAD, B + 1>(codes, halves, a, group, groups, ahead, tile);
  }
}

// What `multiply_tile` does, to the bit, for more rows than its registers hold.
template <int M, int BITS, Scaling SCALING, bool AHEAD>
inline void multiply_wide(const Matrix& w, int panel, const Activations& a, size_t ahead,
                          float (*tile)[kPanelRows]) {
  constexpr int kPartRows = kPanelRows / Simd::kParts;
  const int groups = w.groups;
  const uint8_t* codes = w.codes + w.panel_bytes * panel;
  const uint16_t* halves =
      is_grouped(SCALING)
          ? w.group_scales + static_cast<size_t>(panel) * groups * group_halves(SCALING)
          : nullptr;
  std::memset(tile, 0, sizeof(float) * M * kPanelRows);
  for (int g = 0; g < groups; g++) {
    for (int part = 0; part < Simd::kParts; part++) {
      const int first = part * kPartRows;  // output row within the panel
      float(*sums)[kPanelRows] = reinterpret_cast<float(*)[kPanelRows]>(tile[0] + first);
      const uint8_t* at = codes + 4 * first;
      const uint16_t* half = is_grouped(SCALING) ? halves + g * group_halves(SCALING) + first : nullptr;
      add_blocks<M, BITS, SCALING, AHEAD, 0>(at, half, a, g, groups, ahead, sums);
    }
    codes += kGroup * BITS / 8 * kPanelRows;
  }
  if (!has_row_scales(SCALING)) return;
  for (int v = 0; v < kPanelRows; v += kLanes) {
    F scale = Simd::load(w.row_scales + panel * kPanelRows + v);
    for (int m = 0; m < M; m++) Simd::store(tile[m] + v, Simd::mul(Simd::load(tile[m] + v), scale));
  }
}

}  // namespace
