// How a block reads a row of raw products, alike in both row passes.
#pragma once

#include "../row_math.h"
#include "launch.cuh"

namespace fastrl::cuda {

constexpr int kLoads = 4;  // packets that a thread has in flight: 64 bytes

// Columns that a block takes in one step, in packets of W; packet l of a thread starts l * kThreads * W after its first.
template <int W>
constexpr int64_t kStepColumns = static_cast<int64_t>(kLoads) * kThreads * W;

template <int W, typename T>
__device__ __forceinline__ void read_step(const T* row, int64_t column, int64_t cols, Packet<T, W> (&packets)[kLoads]) {
#pragma unroll
  for (int l = 0; l < kLoads; ++l) packets[l] = read<W>(row, column + l * kThreads * W, cols);
}

// Logits of a packet, and their slopes.
template <bool kCap, int W, typename T, typename A>
__device__ __forceinline__ void logits_of(const Logit<A>& logit, const Packet<T, W>& packet, int64_t column, int64_t cols,
                                          A* z, A* slope) {
  A product[W];
#pragma unroll
  for (int k = 0; k < W; ++k) product[k] = load(&packet.x[k]);
  if (logit.bias) {
#pragma unroll
    for (int k = 0; k < W; ++k)
      if (is_inside<1>(column + k, cols)) product[k] += logit.bias[column + k];
  }
#pragma unroll
  for (int k = 0; k < W; ++k) z[k] = logit.template operator()<false, kCap>(product[k], column + k, slope[k]);
}

}  // namespace fastrl::cuda
