// (r - baseline) / (std + eps), statistics per group of equal group_ids, in double and in two passes (mean, then centred
// squares), one hash look-up per row and no sort.
#include "advantages.h"

#include <cmath>
#include <unordered_map>
#include <vector>

namespace fastrl {
namespace {

struct Moments {
  int64_t count = 0;
  double sum = 0, squares = 0;  // squares: of the distance to the mean
  double low = INFINITY, high = -INFINITY;

  double mean() const { return sum / static_cast<double>(count); }
  // Bessel's correction; NaN for fewer than two rewards, as torch has it. All equal: exactly 0.
  double deviation() const {
    if (count < 2) return NAN;
    return low == high ? 0.0 : std::sqrt(squares / static_cast<double>(count - 1));
  }
  void add(double r) {
    ++count;
    sum += r;
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
};

}  // namespace

template <typename T>
void group_advantages(const T* rewards, const int64_t* group_ids, int64_t count, Baseline baseline, Scale scale, double eps,
                      T* advantages) {
  std::unordered_map<int64_t, int64_t> index;
  std::vector<int64_t> group_of(count);
  std::vector<Moments> groups;
  Moments batch;
  for (int64_t i = 0; i < count; ++i) {
    const auto [it, is_new] = index.try_emplace(group_ids[i], static_cast<int64_t>(groups.size()));
    if (is_new) groups.emplace_back();
    group_of[i] = it->second;
    const double r = rewards[i];
    if (std::isnan(r)) continue;
    groups[it->second].add(r);
    batch.add(r);
  }
  for (int64_t i = 0; i < count; ++i) {
    const double r = rewards[i];
    if (std::isnan(r)) continue;
    Moments& group = groups[group_of[i]];
    group.squares += (r - group.mean()) * (r - group.mean());
    batch.squares += (r - batch.mean()) * (r - batch.mean());
  }
  for (int64_t i = 0; i < count; ++i) {
    const double r = rewards[i];
    const Moments& group = groups[group_of[i]];
    // A unanimous group is exactly 0, so that its rows are dropped from the loss; a lone reward has nothing to compare with.
    if (std::isnan(r) || group.count < 2 || group.low == group.high) {
      advantages[i] = 0;
      continue;
    }
    double advantage = r - (baseline == Baseline::kMean ? group.mean() : (group.sum - r) / static_cast<double>(group.count - 1));
    if (scale != Scale::kNone) advantage /= (scale == Scale::kGroup ? group : batch).deviation() + eps;
    advantages[i] = static_cast<T>(std::isnan(advantage) ? 0.0 : advantage);
  }
}

template void group_advantages<float>(const float*, const int64_t*, int64_t, Baseline, Scale, double, float*);
template void group_advantages<double>(const double*, const int64_t*, int64_t, Baseline, Scale, double, double*);

}  // namespace fastrl
