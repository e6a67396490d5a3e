// What the kernels share: 16-byte packets of a row, reductions over the threads of a block and over the blocks of a cluster
// (through distributed shared memory, sm_90 and later), and the launch.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../vector_math.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTRL_CLUSTERS
#endif

extern __shared__ __align__(16) unsigned char fastrl_shared[];

namespace fastrl::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kResident = 3;  // blocks that a multiprocessor should hold, or its memory idles: 80 registers a thread
constexpr int kMostBlocks = 8;  // of one row: the largest cluster that every chip takes

// W consecutive elements of a row, in one access.
template <typename T, int W>
struct alignas(sizeof(T) * W) Packet {
  T x[W];
};

template <int W, typename T>
__device__ __forceinline__ bool is_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % sizeof(Packet<T, W>) == 0;
}

// Elements before `x` in its packet: packets that start so much before a row are aligned, wherever the row starts.
template <int W, typename T>
__device__ __forceinline__ int64_t lead(const T* x) {
  return reinterpret_cast<uintptr_t>(x) / sizeof(T) % W;
}

template <int W>
__device__ __forceinline__ bool is_inside(int64_t column, int64_t cols) {
  return column >= 0 && column + W <= cols;
}

// Columns [column, column + W) of a row; 0 outside of it, where nothing is read.
template <int W, typename T>
__device__ __forceinline__ Packet<T, W> read(const T* row, int64_t column, int64_t cols, bool aligned = true) {
  if (aligned && is_inside<W>(column, cols)) return *reinterpret_cast<const Packet<T, W>*>(row + column);
  Packet<T, W> packet{};
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (is_inside<1>(column + k, cols)) packet.x[k] = row[column + k];
  return packet;
}

template <int W, typename T>
__device__ __forceinline__ void write(T* row, int64_t column, int64_t cols, const Packet<T, W>& packet, bool aligned = true) {
  if (aligned && is_inside<W>(column, cols)) {
    *reinterpret_cast<Packet<T, W>*>(row + column) = packet;
    return;
  }
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (is_inside<1>(column + k, cols)) row[column + k] = packet.x[k];
}

// Applies a warp shuffle to each word of a struct.
template <typename P, typename Shuffle>
__device__ __forceinline__ P shuffle_words(const P& x, const Shuffle& shuffle) {
  static_assert(sizeof(P) % sizeof(unsigned) == 0);
  unsigned words[sizeof(P) / sizeof(unsigned)];
  memcpy(words, &x, sizeof(P));
#pragma unroll
  for (unsigned& word : words) word = shuffle(word);
  P y;
  memcpy(&y, words, sizeof(P));
  return y;
}

// Merges the partial results of a warp, for all of its threads; always in the same order, so always to the same bits.
template <typename P>
__device__ __forceinline__ P merge_warp(P mine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    mine.merge(shuffle_words(mine, [=](unsigned word) { return __shfl_xor_sync(~0u, word, lanes); }));
  return mine;
}

// The threads of a block, for the first warp. `scratch` is kWarps long.
template <typename P>
__device__ __forceinline__ P merge_block(P mine, P* scratch) {
  mine = merge_warp(mine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
  __syncthreads();
  return threadIdx.x < 32 ? merge_warp(threadIdx.x < kWarps ? scratch[threadIdx.x] : P()) : mine;
}

// Gives what the first thread holds to every thread of the block.
template <typename P>
__device__ __forceinline__ P share_block(const P& mine, P* scratch) {
  __syncthreads();
  if (threadIdx.x == 0) *scratch = mine;
  __syncthreads();
  const P shared = *scratch;
  __syncthreads();
  return shared;
}

// The blocks that share a row: one, or a cluster on sm_90 and later. Construct it first and call `collect` once, in every
// thread: a block may write into the shared memory of another only after that one has begun and before it ends.
class RowBlocks {
 public:
  int count;
  int64_t row;
  int rank;

  __device__ __forceinline__ explicit RowBlocks(int blocks_per_row)
      : count(blocks_per_row), row(blockIdx.x / blocks_per_row), rank(static_cast<int>(blockIdx.x % blocks_per_row)) {
#if defined(FASTRL_CLUSTERS)
    if (count > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }

  // Puts the result of each block (its first thread's `mine`) into parts[rank] of the first block, or of every block.
  template <typename P>
  __device__ __forceinline__ void collect(const P& mine, P* parts, bool everywhere) const {
#if defined(FASTRL_CLUSTERS)
    if (count > 1) {
      const auto cluster = cooperative_groups::this_cluster();
      cluster.barrier_wait();
      if (threadIdx.x == 0)
        for (int other = 0; other < (everywhere ? count : 1); ++other) cluster.map_shared_rank(parts, other)[rank] = mine;
      cluster.sync();
    }
#endif
  }
};

// Merges `mine` of every thread of a row, for the first thread of its first block. Needs shared_bytes<P> of shared memory.
template <typename P>
constexpr size_t shared_bytes = sizeof(P) * (kWarps + kMostBlocks);

template <typename P>
__device__ __forceinline__ P merge_row(P mine, const RowBlocks& blocks) {
  P* scratch = reinterpret_cast<P*>(fastrl_shared);
  P* parts = scratch + kWarps;
  mine = merge_block(mine, scratch);
  blocks.collect(mine, parts, false);
  if (blocks.rank == 0 && threadIdx.x == 0)
    for (int other = 1; other < blocks.count; ++other) mine.merge(parts[other]);
  return mine;
}

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here, not once more by whoever asks next
  throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "no current CUDA device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "a CUDA device tells nothing of itself");
  return value;
}

// Blocks that share a row of `steps` steps of a block: where rows alone leave the device idle, a cluster of a power of two.
inline int blocks_per_row(int64_t rows, int64_t steps) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 1;
  const int64_t enough = 8 * static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount));
  int blocks = 1;
  while (blocks < kMostBlocks && rows * blocks < enough && 2 * blocks <= steps) blocks *= 2;
  return blocks;
}

// Blocks are counted on grid axis 0, which takes 2^31 - 1 of them; each `cluster` consecutive ones form a cluster.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int cluster, size_t shared, void* stream,
            const Args&... args) {
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(name) + ": too many rows for one launch");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), std::string("CUDA kernel ") + name);
}

}  // namespace fastrl::cuda
