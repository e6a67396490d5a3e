// Row pass 1: each logit is read once, in 16-byte packets; a thread keeps online sums of its columns, which merge over the
// warp, the block and, where few rows would leave the device idle, a cluster of blocks. Never writes a logit.
#include "kernels.h"
#include "rows.cuh"

namespace fastrl::cuda {
namespace {

template <typename T, bool kCap>
__global__ void __launch_bounds__(kThreads, kResident) row_stats_kernel(const StatsArgs a,
                                                             const Logit<typename Accumulator<T>::type> logit,
                                                             const int blocks_per_row) {
  using A = typename Accumulator<T>::type;
  constexpr int W = 16 / sizeof(T);
  constexpr int64_t kStep = kStepColumns<W>;
  const A neg_inf = -static_cast<A>(__builtin_inf());
  const RowBlocks blocks(blocks_per_row);
  const T* x = static_cast<const T*>(a.tile) + blocks.row * a.stride;
  const bool writes = blocks.rank == 0 && threadIdx.x == 0;
  const A token_logit = writes ? logit.template of_token<kCap>(x, a.ids[blocks.row], a.cols) : neg_inf;

  Partial<A, A> mine;
  for (int64_t column = blocks.rank * kStep + threadIdx.x * W - lead<W>(x); column < a.cols; column += blocks.count * kStep) {
    Packet<T, W> packets[kLoads];
    A z[kLoads * W], slope[W], largest = neg_inf;
    read_step(x, column, a.cols, packets);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int64_t first = column + l * kThreads * W;
      logits_of<kCap>(logit, packets[l], first, a.cols, z + l * W, slope);
      if (!is_inside<W>(first, a.cols)) {
#pragma unroll
        for (int k = 0; k < W; ++k) z[l * W + k] = is_inside<1>(first + k, a.cols) ? z[l * W + k] : neg_inf;
      }
#pragma unroll
      for (int k = 0; k < W; ++k) largest = z[l * W + k] > largest ? z[l * W + k] : largest;
    }
    mine.raise(largest);
    mine.add(z, kLoads * W);
  }
  const Partial<A, A> total = merge_row(mine, blocks);
  if (writes) total.write(a, blocks.row, token_logit);
}

template <typename T>
void launch_stats(const StatsArgs& a, void* stream) {
  using A = typename Accumulator<T>::type;
  const int blocks = blocks_per_row(a.rows, a.cols / kStepColumns<16 / sizeof(T)>);
  launch("row_stats", a.transform.softcap > 0 ? row_stats_kernel<T, true> : row_stats_kernel<T, false>, a.rows * blocks,
         blocks, shared_bytes<Partial<A, A>>, stream, a, Logit<A>(a.transform), blocks);
}

}  // namespace

void row_stats(const StatsArgs& a, void* stream) {
  switch (a.dtype) {
    case DType::kFloat32: return launch_stats<float>(a, stream);
    case DType::kFloat64: return launch_stats<double>(a, stream);
    case DType::kBFloat16: return launch_stats<BFloat16>(a, stream);
    case DType::kFloat16: return launch_stats<Float16>(a, stream);
  }
}

}  // namespace fastrl::cuda
