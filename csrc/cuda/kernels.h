// The CUDA kernels: each is queued on `stream` (a cudaStream_t) of the current device and returns at once. What a launch
// refuses is thrown as std::runtime_error.
#pragma once

#include "../advantages.h"
#include "../gae.h"
#include "../rows.h"

namespace fastrl::cuda {

int compiled_version();  // CUDART_VERSION, 13000 for 13.0
int device_count();      // 0 where there is no driver or no device

void row_stats(const StatsArgs& args, void* stream);
void row_grad(const GradArgs& args, void* stream);
void group_advantages(const AdvantageArgs& args, void* stream);
void gae(const GaeArgs& args, void* stream);

}  // namespace fastrl::cuda
