// Just enough of the CUDA runtime to compile csrc/cuda with a C++ compiler and run it on the CPU, for tests on machines without
// a GPU. Each CUDA thread is a fiber; those of a cluster take turns until all of them have ended. Wrong indices, rounding,
// deadlocks and misaligned packets show here. A missing barrier may not, since the turns are always in the same order: that is
// for `compute-sanitizer --tool racecheck` on a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define CUDART_VERSION 0
#define __host__
#define __device__
#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr size_t kSharedBytes = 4096, kStackBytes = 64 << 10;
constexpr int kMultiprocessors = 4;
inline int compute_capability() { return atoi(getenv("CUDA_ON_CPU_CAPABILITY")); }

// Where threads wait for each other: the last of `count` to arrive lets all of them pass.
struct Barrier {
  int count, arrived = 0, passed = 0;
  int arrive() {
    const int mine = passed;
    if (++arrived == count) arrived = 0, ++passed;
    return mine;
  }
};

struct Warp {
  Barrier barrier{32};
  unsigned words[32];
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[kSharedBytes];
};
struct Thread {
  ucontext_t start;
  jmp_buf here;  // swapcontext would enter the kernel of the operating system at every switch
  bool started = false;
  dim3 thread_index, block_index;
  int block = 0, cluster_token = 0;
  bool ended = false;
};

// The cluster that runs now.
inline std::vector<Block> blocks;
inline std::vector<Thread> threads;
inline Barrier cluster_barrier{0};
inline Thread* current = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool progress;
inline std::exception_ptr error;

inline void yield() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}
inline void resume(Thread& thread) {
  current = &thread;
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}
inline void wait(Barrier& barrier, int token) {
  while (barrier.passed == token) yield();
  progress = true;
}
inline Block& block() { return blocks[current->block]; }
inline Warp& warp() { return block().warps[current->thread_index.x / 32]; }
inline void run_thread() {
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
  current->ended = progress = true;
  yield();
}

// Shared memory has one address in a kernel, and one copy per block: the copy of the block that runs is in place.
void switch_shared(Block* from, Block* to);
unsigned char* shared_of(unsigned char* address, int block);  // an address of shared memory, as another block sees it

inline void run_cluster(dim3 first_block, int cluster, int block_size, const std::function<void()>& kernel) {
  body = kernel;
  blocks.clear();
  blocks.resize(cluster);
  cluster_barrier = Barrier{cluster * block_size};
  threads = std::vector<Thread>(static_cast<size_t>(cluster) * block_size);
  for (auto& block : blocks) {
    block.barrier = Barrier{block_size};
    block.warps.resize(block_size / 32);
    memset(block.shared, 0xff, kSharedBytes);  // NaN: nothing may rely on what was there
  }
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.block = static_cast<int>(i) / block_size;
    thread.thread_index = dim3(static_cast<unsigned>(i) % block_size);
    thread.block_index = dim3(first_block.x + thread.block);
    if (i == stacks.size()) stacks.emplace_back(new char[kStackBytes]);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks[i].get();
    thread.start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.start, run_thread, 0);
  }
  Block* in_place = nullptr;
  for (size_t running = threads.size(); running > 0;) {
    running = 0;
    progress = false;
    for (auto& thread : threads) {
      if (thread.ended) continue;
      if (in_place != &blocks[thread.block]) switch_shared(in_place, &blocks[thread.block]);
      in_place = &blocks[thread.block];
      resume(thread);
      if (error) std::rethrow_exception(std::exchange(error, nullptr));
      running += !thread.ended;
    }
    if (running > 0 && !progress) throw std::runtime_error("deadlock: threads wait for others that never arrive");
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread_index)
#define blockIdx (cuda_on_cpu::current->block_index)

inline void __syncthreads() {
  auto& barrier = cuda_on_cpu::block().barrier;
  cuda_on_cpu::wait(barrier, barrier.arrive());
}
inline unsigned exchange(unsigned word, int lane) {
  auto& warp = cuda_on_cpu::warp();
  const int mine = threadIdx.x % 32;
  warp.words[mine] = word;
  cuda_on_cpu::wait(warp.barrier, warp.barrier.arrive());
  const unsigned other = warp.words[lane < 32 ? lane : mine];
  cuda_on_cpu::wait(warp.barrier, warp.barrier.arrive());
  return other;
}
inline unsigned __shfl_xor_sync(unsigned, unsigned word, int lanes) { return exchange(word, (threadIdx.x % 32) ^ lanes); }
inline unsigned __shfl_down_sync(unsigned, unsigned word, int lanes) { return exchange(word, threadIdx.x % 32 + lanes); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? cuda_on_cpu::compute_capability() : cuda_on_cpu::kMultiprocessors;
  return cudaSuccess;
}

// A launch that a real device refuses is refused.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const bool fits = !getenv("CUDA_ON_CPU_REFUSES") && config->dynamicSmemBytes <= cuda_on_cpu::kSharedBytes && cluster <= 8 &&
                    (cluster == 1 || cuda_on_cpu::compute_capability() >= 9);
  if (!fits || config->gridDim.x == 0 || config->gridDim.x % cluster || config->blockDim.x % 32) return cudaErrorInvalidValue;
  for (unsigned first = 0; first < config->gridDim.x; first += cluster)
    cuda_on_cpu::run_cluster(dim3(first), static_cast<int>(cluster), static_cast<int>(config->blockDim.x),
                             [&] { kernel(args...); });
  return cudaSuccess;
}
