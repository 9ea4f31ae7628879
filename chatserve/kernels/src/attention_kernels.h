// Attention over a block table, over the level's `Simd`. Included by level_kernels.h.
#pragma once

namespace {

template <int R>
inline void score_keys(const AttentionJob& job, int first_block, int num_keys) {
  constexpr int kVectors = kKeyLanes / kLanes;
  constexpr int kChains = Simd::kScoreChains;
  const int dim = job.head_dim;
  const F scale = Simd::set1(job.scale), nothing = Simd::set1(-1e30f);
  for (int at = first_block * kBlockSize; at < num_keys; at += kKeyLanes) {
    const int block = at / kBlockSize, sub = at % kBlockSize / kKeyLanes;
    const uint16_t* keys = job.keys + job.block_stride * job.block_ids[block] +
                           static_cast<size_t>(sub) * dim * kKeyLanes;
    // Fetched meanwhile: the keys of the next block or job, and this block's values.
    const bool has_next = (block + 1) * kBlockSize < num_keys;
    const uint16_t* next =
        has_next ? job.keys + job.block_stride * job.block_ids[block + 1] : job.next;
    next += static_cast<size_t>(sub) * dim * kKeyLanes;
    const uint16_t* values = keys + static_cast<size_t>(kBlockSize) * dim;
    F acc[R][kVectors][kChains];
    CS_UNROLL for (int r = 0; r < R; r++) {
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        CS_UNROLL for (int c = 0; c < kChains; c++) acc[r][v][c] = Simd::zero();
      }
    }
    for (int d = 0; d < dim; d += 2) {
      Simd::prefetch_l2(next + d * kKeyLanes);
      Simd::prefetch_l2(values + d * kKeyLanes);
      CS_UNROLL for (int e = 0; e < 2; e++) {
        CS_UNROLL for (int v = 0; v < kVectors; v++) {
          F k = Simd::load_half(keys + (d + e) * kKeyLanes + v * kLanes);
          CS_UNROLL for (int r = 0; r < R; r++) {
            F& sum = acc[r][v][e % kChains];
            sum = Simd::fma(Simd::set1(job.queries[r][d + e]), k, sum);
          }
        }
      }
    }
    CS_UNROLL for (int r = 0; r < R; r++) {
      CS_UNROLL for (int v = 0; v < kVectors; v++) {
        F sum = acc[r][v][0];
        if (kChains == 2) sum = Simd::add(sum, acc[r][v][kChains - 1]);
        const int position = at + v * kLanes;
        I index = Simd::iadd(Simd::iset1(position), Simd::lane_index());
        sum = Simd::select(index, job.first[r], job.last[r], Simd::mul(sum, scale), nothing);
        Simd::store(job.scores + r * job.score_stride + position - first_block * kBlockSize, sum);
      }
    }
  }
}

// Scores to weights that are not divided yet; returns their sum.
inline float soften(const AttentionJob& job, int r, int first_block, int num_keys) {
  float* scores = job.scores + r * job.score_stride;
  const int origin = first_block * kBlockSize;
  F most = Simd::set1(-1e30f);
  for (int at = origin; at < num_keys; at += kLanes) {
    most = Simd::max(most, Simd::load(scores + at - origin));
  }
  const F top = Simd::set1(Simd::largest(most));
  F sum = Simd::zero();
  // whole groups of kKeyLanes, so that rows with neighbours and without add in the same order
  const int end = (num_keys + kKeyLanes - 1) / kKeyLanes * kKeyLanes;
  for (int at = origin; at < end; at += kLanes) {
    F e = exponential(Simd::sub(Simd::load(scores + at - origin), top));
    I index = Simd::iadd(Simd::iset1(at), Simd::lane_index());
    e = Simd::select(index, job.first[r], job.last[r], e, Simd::zero());
    sum = Simd::add(sum, e);
    Simd::store(scores + at - origin, e);
  }
  return Simd::sum(sum);
}

template <int R, int S>
inline void mix_values(const AttentionJob& job, int first_block, int num_keys, int d,
                       const float* inverse) {
  F acc[R][S];
  CS_UNROLL for (int r = 0; r < R; r++) {
    CS_UNROLL for (int s = 0; s < S; s++) acc[r][s] = Simd::zero();
  }
  const int dim = job.head_dim, origin = first_block * kBlockSize;
  for (int start = origin; start < num_keys; start += kBlockSize) {
    const uint16_t* values = job.keys + job.block_stride * job.block_ids[start / kBlockSize] +
                             static_cast<size_t>(kBlockSize) * dim + d;
    const int end = start + kBlockSize < num_keys ? start + kBlockSize : num_keys;
    for (int at = start; at < end; at++, values += dim) {
      F v[S];
      CS_UNROLL for (int s = 0; s < S; s++) v[s] = Simd::load_half(values + s * kLanes);
      CS_UNROLL for (int r = 0; r < R; r++) {
        F p = Simd::set1(job.scores[r * job.score_stride + at - origin]);
        CS_UNROLL for (int s = 0; s < S; s++) acc[r][s] = Simd::fma(p, v[s], acc[r][s]);
      }
    }
  }
  CS_UNROLL for (int r = 0; r < R; r++) {
    F factor = Simd::set1(inverse[r]);
    CS_UNROLL for (int s = 0; s < S; s++) {
      Simd::store(job.outputs[r] + d + s * kLanes, Simd::mul(acc[r][s], factor));
    }
  }
}

template <int R>
void attend_rows(const AttentionJob& job) {
  constexpr int kRoom = Simd::kMixAccumulators / R;
  constexpr int kSlice = kRoom >= 8 ? 8 : kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
  int first = job.first[0], last = job.last[0];
  for (int r = 1; r < R; r++) {
    first = job.first[r] < first ? job.first[r] : first;
    last = job.last[r] > last ? job.last[r] : last;
  }
  const int first_block = first / kBlockSize, num_keys = last + 1;
  score_keys<R>(job, first_block, num_keys);
  float inverse[R];
  for (int r = 0; r < R; r++) inverse[r] = 1.0f / soften(job, r, first_block, num_keys);
  int d = 0;
  for (; d + kSlice * kLanes <= job.head_dim; d += kSlice * kLanes) {
    mix_values<R, kSlice>(job, first_block, num_keys, d, inverse);
  }
  for (; d < job.head_dim; d += kLanes) mix_values<R, 1>(job, first_block, num_keys, d, inverse);
}

void attend(const AttentionJob& job) {
  switch (job.num_rows) {
    case 1: return attend_rows<1>(job);
    case 2: return attend_rows<2>(job);
    case 3: return attend_rows<3>(job);
    case 4: return attend_rows<4>(job);
    case 5: return attend_rows<5>(job);
    default: return attend_rows<6>(job);
  }
}

}  // namespace
