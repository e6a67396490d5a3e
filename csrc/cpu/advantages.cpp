// Group-relative advantages on the CPU: one look-up per run of equal ids and no sort.
#include "vectors.h"

#include <vector>

namespace fastrl {
namespace {

// Numbers the groups 0, 1, ... in the order they are met: a table of open addresses, at most half full.
class GroupIndex {
 public:
  explicit GroupIndex(int64_t most_groups) {
    while ((int64_t{1} << bits_) < 2 * most_groups) ++bits_;
    slots_.assign(size_t{1} << bits_, -1);
  }
  int64_t operator()(int64_t id) {
    const uint64_t last = slots_.size() - 1;
    uint64_t slot = (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> (64 - bits_);
    while (slots_[slot] >= 0 && ids_[slots_[slot]] != id) slot = (slot + 1) & last;
    if (slots_[slot] < 0) {
      slots_[slot] = static_cast<int64_t>(ids_.size());
      ids_.push_back(id);
    }
    return slots_[slot];
  }

 private:
  int bits_ = 1;
  std::vector<int64_t> slots_;  // number of a group, or -1
  std::vector<int64_t> ids_;    // of each group
};

template <typename T>
void advantages_typed(const AdvantageArgs& a) {
  const T* rewards = static_cast<const T*>(a.rewards);
  const auto begins_run = [&](int64_t i) { return i == 0 || a.group_ids[i] != a.group_ids[i - 1]; };
  int64_t runs = 0;  // completions of a prompt mostly stand together
  for (int64_t i = 0; i < a.count; ++i) runs += begins_run(i);
  GroupIndex index(runs);
  std::vector<int64_t> group_of(a.count);
  std::vector<Moments> groups;
  groups.reserve(runs);
  Moments batch;
  for (int64_t i = 0; i < a.count; ++i) {
    group_of[i] = begins_run(i) ? index(a.group_ids[i]) : group_of[i - 1];
    if (group_of[i] == static_cast<int64_t>(groups.size())) groups.emplace_back();
    const double r = rewards[i];
    if (r == r) groups[group_of[i]].add(r);
  }
  std::vector<double> means;
  means.reserve(groups.size());
  for (const Moments& group : groups) means.push_back(group.mean()), batch.merge(group);
  const double batch_mean = batch.mean();
  for (int64_t i = 0; i < a.count && a.scale != Scale::kNone; ++i) {
    const double r = rewards[i];
    if (r != r) continue;
    Moments& whole = a.scale == Scale::kGroup ? groups[group_of[i]] : batch;
    const double distance = r - (a.scale == Scale::kGroup ? means[group_of[i]] : batch_mean);
    whole.squares += distance * distance;
  }
  std::vector<double> divisors;
  divisors.reserve(groups.size());
  for (const Moments& group : groups) divisors.push_back(group_divisor(group, batch, a));
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t group = group_of[i];
    static_cast<T*>(a.advantages)[i] = static_cast<T>(group_advantage(rewards[i], groups[group], divisors[group], a));
  }
}

}  // namespace

void group_advantages(const AdvantageArgs& a) { a.fp64 ? advantages_typed<double>(a) : advantages_typed<float>(a); }

}  // namespace fastrl
