// The shared memory of the block that runs, and the copies of the others.
#include "cuda_runtime.h"

alignas(16) unsigned char fastrl_shared[cuda_on_cpu::kSharedBytes];

namespace cuda_on_cpu {

void switch_shared(Block* from, Block* to) {
  if (from) memcpy(from->shared, fastrl_shared, kSharedBytes);
  memcpy(fastrl_shared, to->shared, kSharedBytes);
}

unsigned char* shared_of(unsigned char* address, int block) {
  if (block == current->block) return address;
  if (threads[static_cast<size_t>(block) * (threads.size() / blocks.size())].ended)
    throw std::runtime_error("shared memory of a block that has ended");
  return blocks[block].shared + (address - fastrl_shared);
}

}  // namespace cuda_on_cpu
