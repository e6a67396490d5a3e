// Group-relative advantages: a warp per reward compares its group id with all of them, so there is no sort, no group index
// and no waiting for the host. Members of a group add the same numbers in the same order, and so agree to the bit.
#include "kernels.h"
#include "launch.cuh"

namespace fastrl::cuda {
namespace {

struct Squares {
  double sum = 0;
  FASTRL_METHOD void merge(const Squares& other) { sum += other.sum; }
};

// Calls take(reward, group id) for each reward of this thread: the `thread`-th of `threads` packets, and so on.
template <typename T, typename Take>
__device__ __forceinline__ void for_each_reward(const AdvantageArgs& a, int thread, int threads, const Take& take) {
  constexpr int W = 16 / sizeof(T);
  const T* rewards = static_cast<const T*>(a.rewards);
  const bool aligned = is_aligned<W>(rewards) && is_aligned<2>(a.group_ids);
  for (int64_t first = static_cast<int64_t>(thread) * W; first < a.count; first += static_cast<int64_t>(threads) * W) {
    const Packet<T, W> reward = read<W>(rewards, first, a.count, aligned);
#pragma unroll
    for (int k = 0; k < W; k += 2) {
      const Packet<int64_t, 2> id = read<2>(a.group_ids, first + k, a.count, aligned);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (first + k + j < a.count && reward.x[k + j] == reward.x[k + j]) take(reward.x[k + j], id.x[j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) group_advantages_kernel(const AdvantageArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const bool exists = mine < a.count;  // no thread leaves early: all of them sum the batch
  const double r = exists ? static_cast<const T*>(a.rewards)[mine] : 0;
  const int64_t group_id = exists ? a.group_ids[mine] : 0;

  Moments group, batch;
  for_each_reward<T>(a, lane, 32, [&](double other, int64_t id) {
    if (id == group_id) group.add(other);
  });
  group = merge_warp(group);
  Squares squares;
  for_each_reward<T>(a, lane, 32, [&](double other, int64_t id) {
    if (id == group_id) squares.sum += group.centred_square(other);
  });
  group.squares = merge_warp(squares).sum;

  if (a.scale == Scale::kBatch) {
    Moments* scratch = reinterpret_cast<Moments*>(fastrl_shared);
    for_each_reward<T>(a, threadIdx.x, kThreads, [&](double other, int64_t) { batch.add(other); });
    batch = share_block(merge_block(batch, scratch), scratch);
    Squares batch_squares;
    for_each_reward<T>(a, threadIdx.x, kThreads,
                       [&](double other, int64_t) { batch_squares.sum += batch.centred_square(other); });
    Squares* sums = reinterpret_cast<Squares*>(fastrl_shared);
    batch.squares = share_block(merge_block(batch_squares, sums), sums).sum;
  }
  if (exists && lane == 0)
    static_cast<T*>(a.advantages)[mine] = static_cast<T>(group_advantage(r, group, group_divisor(group, batch, a), a));
}

}  // namespace

void group_advantages(const AdvantageArgs& a, void* stream) {
  launch("group_advantages", a.fp64 ? group_advantages_kernel<double> : group_advantages_kernel<float>,
         (a.count - 1) / kWarps + 1, 1, sizeof(Moments) * kWarps, stream, a);
}

}  // namespace fastrl::cuda
