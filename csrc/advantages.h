// Group-relative advantages, (r - baseline) / (std + eps), over one flat batch of rewards: the options and the arithmetic,
// in double and in two passes (sums, then squared distances to the mean), shared by the C++ and the CUDA kernels.
#pragma once

#include "vector_math.h"

namespace fastrl {

enum class Baseline : int { kMean = 0, kLeaveOneOut = 1 };
enum class Scale : int { kGroup = 0, kBatch = 1, kNone = 2 };

// T is float (dtype kFloat32) or double (kFloat64).
struct AdvantageArgs {
  bool fp64;
  const void* rewards;       // [count] of T; NaN where there is no reward
  const int64_t* group_ids;  // [count], any values in any order
  int64_t count;
  Baseline baseline;
  Scale scale;
  double eps;
  void* advantages;  // [count] of T
};

namespace {

// Of the rewards of a group or of the batch.
struct Moments {
  int64_t count = 0;
  double sum = 0, squares = 0;  // squares: of the distance to the mean
  double low = __builtin_inf(), high = -__builtin_inf();

  FASTRL_METHOD double mean() const { return sum / static_cast<double>(count); }
  // Bessel's correction; NaN for fewer than two rewards, as torch has it. All equal: exactly 0.
  FASTRL_METHOD double deviation() const {
    if (count < 2) return __builtin_nan("");
    return low == high ? 0.0 : sqrt(squares / static_cast<double>(count - 1));
  }
  FASTRL_METHOD double centred_square(double r) const { return (r - mean()) * (r - mean()); }
  FASTRL_METHOD void add(double r) {
    ++count;
    sum += r;
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  FASTRL_METHOD void merge(const Moments& other) {  // before the squares, which need the whole's mean
    count += other.count;
    sum += other.sum;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

FASTRL_FN double group_divisor(const Moments& group, const Moments& batch, const AdvantageArgs& a) {
  if (a.scale == Scale::kNone) return 1.0;
  return (a.scale == Scale::kGroup ? group.deviation() : batch.deviation()) + a.eps;
}

FASTRL_FN double group_advantage(double r, const Moments& group, double divisor, const AdvantageArgs& a) {
  // A unanimous group is exactly 0, so that its rows are dropped from the loss; a lone reward has nothing to compare with.
  if (r != r || group.count < 2 || group.low == group.high) return 0;
  const double others = (group.sum - r) / static_cast<double>(group.count - 1);
  const double advantage = (r - (a.baseline == Baseline::kMean ? group.mean() : others)) / divisor;
  return advantage == advantage ? advantage : 0.0;
}

}  // namespace
}  // namespace fastrl
