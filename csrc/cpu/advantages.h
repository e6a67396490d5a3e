// Group-relative advantages over one flat batch of rewards.
#pragma once

#include <cstdint>

namespace fastrl {

enum class Baseline : int { kMean = 0, kLeaveOneOut = 1 };
enum class Scale : int { kGroup = 0, kBatch = 1, kNone = 2 };

// rewards, advantages: [count] of T (float or double), NaN where there is no reward; group_ids: [count], any values and order.
template <typename T>
void group_advantages(const T* rewards, const int64_t* group_ids, int64_t count, Baseline baseline, Scale scale, double eps,
                      T* advantages);

}  // namespace fastrl
