// Ops on vectors of rewards and values, on the CPU.
#pragma once

#include "../advantages.h"
#include "../gae.h"

namespace fastrl {

void group_advantages(const AdvantageArgs& args);
void gae(const GaeArgs& args, int64_t begin, int64_t end);  // the rows [begin, end), which are independent

}  // namespace fastrl
