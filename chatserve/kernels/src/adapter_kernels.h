// The two small products of a LoRA adapter, for one row. Included by level_kernels.h.
#pragma once

namespace {

// ranks[j] = scales[j] * a[j] x. Ranks come in units, so that each load of x serves several.
void shrink(const LowRank& change, const float* x, int columns, float* ranks) {
  for (int first = 0; first < change.rank; first += kRankUnit) {
    const uint16_t* a = change.a + static_cast<size_t>(first) * columns;
    // the next unit follows; rows of a few hundred columns are too short for the processor to guess
    const size_t ahead = static_cast<size_t>(kRankUnit) * columns;
    F even[kRankUnit], odd[kRankUnit];
    CS_UNROLL for (int j = 0; j < kRankUnit; j++) even[j] = odd[j] = Simd::zero();
    for (int k = 0; k < columns; k += 2 * kLanes) {
      F x0 = Simd::load(x + k), x1 = Simd::load(x + k + kLanes);
      CS_UNROLL for (int j = 0; j < kRankUnit; j++) {
        const uint16_t* row = a + static_cast<size_t>(j) * columns + k;
        even[j] = Simd::fma(Simd::load_half(row), x0, even[j]);
        odd[j] = Simd::fma(Simd::load_half(row + kLanes), x1, odd[j]);
        Simd::prefetch_l2(row + ahead);
      }
    }
    CS_UNROLL for (int j = 0; j < kRankUnit; j++) {
      ranks[first + j] = change.scales[first + j] * Simd::sum(Simd::add(even[j], odd[j]));
    }
  }
}

// delta[kPanelRows] = b ranks, for the output rows of one panel.
void expand(const LowRank& change, const float* ranks, int panel, float* delta) {
  constexpr int kVectors = kSpanRows / kLanes;
  for (int s = 0; s < kPanelSpans; s++) {
    const RankSpan& span = change.spans[panel * kPanelSpans + s];
    const uint16_t* b = change.b + static_cast<size_t>(span.start) * kSpanRows;
    const float* from = ranks + span.first;
    // the next panel's part: those of the other rows' adapters are read in between
    const size_t ahead = static_cast<size_t>(kPanelSpans) * span.count * kSpanRows;
    F even[kVectors], odd[kVectors];
    CS_UNROLL for (int v = 0; v < kVectors; v++) even[v] = odd[v] = Simd::zero();
    int r = 0;
    for (; r + 1 < span.count; r += 2, b += 2 * kSpanRows) {
      F h0 = Simd::set1(from[r]), h1 = Simd::set1(from[r + 1]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        even[v] = Simd::fma(Simd::load_half(b + v * kLanes), h0, even[v]);
        odd[v] = Simd::fma(Simd::load_half(b + kSpanRows + v * kLanes), h1, odd[v]);
      }
      Simd::prefetch_l2(b + ahead);
    }
    if (r < span.count) {
      F h = Simd::set1(from[r]);
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        even[v] = Simd::fma(Simd::load_half(b + v * kLanes), h, even[v]);
      }
    }
    CS_UNROLL for (int v = 0; v < kVectors; v++) {
      Simd::store(delta + s * kSpanRows + v * kLanes, Simd::add(even[v], odd[v]));
    }
  }
}

}  // namespace
