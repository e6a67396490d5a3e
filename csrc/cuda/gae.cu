// Generalized advantage estimation as a scan of affine maps from the right end of each row: what a thread's steps do to the
// state of the recurrence composes over the warp, the block and, where few rows would leave the device idle, a cluster of
// blocks that share a row. One thread then takes its steps one by one, from the state that the steps to its right leave.
#include "kernels.h"
#include "launch.cuh"

namespace fastrl::cuda {
namespace {

template <typename A>
struct Row {
  static constexpr int W = 16 / sizeof(A);
  static constexpr int64_t kStep = static_cast<int64_t>(kThreads) * W;  // time steps that a block takes at once

  const A *rewards, *values;
  const uint8_t* mask;
  A *advantages, *returns;
  int64_t cols, before;
  A gamma, decay;
  bool through_mask, values_aligned, mask_aligned, outputs_aligned;

  __device__ __forceinline__ Row(const GaeArgs& a, int64_t row)
      : rewards(static_cast<const A*>(a.rewards) + row * a.cols),
        values(static_cast<const A*>(a.values) + row * a.cols),
        mask(a.mask + row * a.cols),
        advantages(static_cast<A*>(a.advantages) + row * a.cols),
        returns(static_cast<A*>(a.returns) + row * a.cols),
        cols(a.cols),
        before(lead<W>(rewards)),
        gamma(static_cast<A>(a.gamma)),
        decay(static_cast<A>(a.gamma * a.lam)),
        through_mask(a.through_mask),
        values_aligned(is_aligned<W>(values - before)),
        mask_aligned(is_aligned<W>(mask - before)),
        outputs_aligned(is_aligned<W>(advantages - before) && is_aligned<W>(returns - before)) {}

  __device__ __forceinline__ int64_t first_step(int64_t piece) const {
    return piece * kStep + static_cast<int64_t>(threadIdx.x) * W - before;
  }
};

// The steps of one thread.
template <typename A>
struct Steps {
  static constexpr int W = Row<A>::W;
  Packet<A, W> rewards, values;
  Packet<uint8_t, W> mask;

  __device__ __forceinline__ Steps(const Row<A>& row, int64_t first)
      : rewards(read<W>(row.rewards, first, row.cols)),
        values(read<W>(row.values, first, row.cols, row.values_aligned)),
        mask(read<W>(row.mask, first, row.cols, row.mask_aligned)) {
#pragma unroll
    for (int k = 0; k < W; ++k) {  // never 0 * NaN
      rewards.x[k] = mask.x[k] ? rewards.x[k] : A(0);
      values.x[k] = mask.x[k] ? values.x[k] : A(0);
    }
  }

  // Steps outside of the row have mask 0; on its right, discounting through them does nothing to a state of 0.
  __device__ __forceinline__ GaeMap<A> map(const Row<A>& row) const {
    GaeMap<A> map;
#pragma unroll
    for (int k = W - 1; k >= 0; --k)
      if (mask.x[k] || row.through_mask) map = GaeMap<A>::of_step(rewards.x[k], values.x[k], row.gamma, row.decay).after(map);
    return map;
  }

  __device__ __forceinline__ void write_out(const Row<A>& row, int64_t first, GaeState<A> state) const {
    Packet<A, W> advantages, returns;
#pragma unroll
    for (int k = W - 1; k >= 0; --k) {
      if (mask.x[k] || row.through_mask) state.step(rewards.x[k], values.x[k], row.gamma, row.decay);
      advantages.x[k] = mask.x[k] ? state.advantage : A(0);
      returns.x[k] = mask.x[k] ? state.advantage + values.x[k] : A(0);
    }
    write(row.advantages, first, row.cols, advantages, row.outputs_aligned);
    write(row.returns, first, row.cols, returns, row.outputs_aligned);
  }
};

// The maps of all threads, composed: of those on the right of this one, and of the whole block.
template <typename A>
struct Scan {
  GaeMap<A> right, block;

  __device__ __forceinline__ Scan(GaeMap<A> mine, GaeMap<A>* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const auto other = shuffle_words(mine, [=](unsigned word) { return __shfl_down_sync(~0u, word, lanes); });
      if (lane + lanes < 32) mine = mine.after(other);
    }
    right = shuffle_words(mine, [=](unsigned word) { return __shfl_down_sync(~0u, word, 1); });
    if (lane == 31) right = GaeMap<A>();
    __syncthreads();  // scratch may still be read from the piece before
    if (lane == 0) scratch[warp] = mine;
    __syncthreads();
    GaeMap<A> warps;
    for (int w = kWarps - 1; w >= 0; --w) {
      if (w == warp) right = right.after(warps);
      warps = scratch[w].after(warps);
    }
    block = warps;
  }
};

template <typename A>
__global__ void __launch_bounds__(kThreads, kResident) gae_kernel(const GaeArgs a, const int blocks_per_row) {
  const RowBlocks blocks(blocks_per_row);
  const Row<A> row(a, blocks.row);
  GaeMap<A>* scratch = reinterpret_cast<GaeMap<A>*>(fastrl_shared);
  const int64_t pieces = (a.cols + row.before - 1) / Row<A>::kStep + 1;
  const int64_t begin = pieces * blocks.rank / blocks.count, end = pieces * (blocks.rank + 1) / blocks.count;

  GaeState<A> state;
  if (blocks.count > 1) {  // what the blocks on the right leave: every block tells the others what its steps do
    GaeMap<A>* parts = scratch + kWarps;
    GaeMap<A> mine;
    for (int64_t piece = end - 1; piece >= begin; --piece)
      mine = Scan<A>(Steps<A>(row, row.first_step(piece)).map(row), scratch).block.after(mine);
    blocks.collect(mine, parts, true);
    for (int other = blocks.count - 1; other > blocks.rank; --other) state = parts[other](state);
  }
  for (int64_t piece = end - 1; piece >= begin; --piece) {
    const Steps<A> steps(row, row.first_step(piece));
    const Scan<A> scan(steps.map(row), scratch);
    steps.write_out(row, row.first_step(piece), scan.right(state));
    state = scan.block(state);
  }
}

template <typename A>
void launch_gae(const GaeArgs& a, void* stream) {
  const int blocks = blocks_per_row(a.rows, a.cols / Row<A>::kStep);
  launch("gae", gae_kernel<A>, a.rows * blocks, blocks, shared_bytes<GaeMap<A>>, stream, a, blocks);
}

}  // namespace

void gae(const GaeArgs& a, void* stream) { a.fp64 ? launch_gae<double>(a, stream) : launch_gae<float>(a, stream); }

}  // namespace fastrl::cuda
