// Clusters of blocks, for cuda_runtime.h beside this.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void barrier_arrive() const { cuda_on_cpu::current->cluster_token = cuda_on_cpu::cluster_barrier.arrive(); }
  void barrier_wait() const { cuda_on_cpu::wait(cuda_on_cpu::cluster_barrier, cuda_on_cpu::current->cluster_token); }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <typename T>
  T* map_shared_rank(T* address, int rank) const {
    return reinterpret_cast<T*>(cuda_on_cpu::shared_of(reinterpret_cast<unsigned char*>(address), rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
